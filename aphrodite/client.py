"""The openai package's clients, which here take this engine's fields as keyword arguments.

    from aphrodite import OpenAI

    client = OpenAI()  # the server of this machine
    client.chat.completions.create(model=…, messages=…, min_p=0.05, repetition_penalty=1.15)

Whatever openai's own methods know goes to them untouched; what only this engine knows travels in `extra_body`, which
is how the stock client sends it. A name that neither knows is the TypeError that it is there. Needs the extra
`client`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, cached_property, wraps
from typing import Any

try:
    import openai
except ImportError as error:
    raise ImportError(
        "aphrodite's client is built on the openai package: pip install 'aphrodite-engine[client]'"
    ) from (error)
from openai.resources.chat import AsyncChat, Chat
from openai.resources.completions import AsyncCompletions, Completions
from openai.resources.embeddings import AsyncEmbeddings, Embeddings
from openai.resources.responses import AsyncResponses, Responses

DEFAULT_URL = "http://127.0.0.1:2242/v1"


class OpenAI(openai.OpenAI):
    """`openai.OpenAI`, by default for a server on this machine.

    Args:
        base_url: of the server; `OPENAI_BASE_URL`, else `http://127.0.0.1:2242/v1`.
        api_key: `APHRODITE_API_KEY`, else `OPENAI_API_KEY`; a server without keys takes anything.
        options: everything else that `openai.OpenAI` takes.
    """

    def __init__(self, *, base_url: str | None = None, api_key: str | None = None, **options: Any) -> None:
        super().__init__(base_url=_base_url(base_url), api_key=_api_key(api_key), **options)

    @cached_property
    def chat(self) -> Chat:
        chat = Chat(self)
        _take_fields(chat.completions, "create", "parse", "stream")
        return chat

    @cached_property
    def completions(self) -> Completions:
        completions = Completions(self)
        _take_fields(completions, "create")
        return completions

    @cached_property
    def embeddings(self) -> Embeddings:
        embeddings = Embeddings(self)
        _take_fields(embeddings, "create", known=_embedding_fields)
        return embeddings

    @cached_property
    def responses(self) -> Responses:
        responses = Responses(self)
        _take_fields(responses, "create", "parse", "stream")
        return responses


class AsyncOpenAI(openai.AsyncOpenAI):
    """`openai.AsyncOpenAI`, with the same defaults and additions as `OpenAI`."""

    def __init__(self, *, base_url: str | None = None, api_key: str | None = None, **options: Any) -> None:
        super().__init__(base_url=_base_url(base_url), api_key=_api_key(api_key), **options)

    @cached_property
    def chat(self) -> AsyncChat:
        chat = AsyncChat(self)
        _take_fields(chat.completions, "create", "parse", "stream")
        return chat

    @cached_property
    def completions(self) -> AsyncCompletions:
        completions = AsyncCompletions(self)
        _take_fields(completions, "create")
        return completions

    @cached_property
    def embeddings(self) -> AsyncEmbeddings:
        embeddings = AsyncEmbeddings(self)
        _take_fields(embeddings, "create", known=_embedding_fields)
        return embeddings

    @cached_property
    def responses(self) -> AsyncResponses:
        responses = AsyncResponses(self)
        _take_fields(responses, "create", "parse", "stream")
        return responses


def _base_url(given: str | None) -> str:
    return given or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL


def _api_key(given: str | None) -> str:
    return given or os.environ.get("APHRODITE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"


@cache
def _engine_fields() -> frozenset[str]:
    """Every field of the generation endpoints, the samplers' aliases included."""
    from aphrodite.sampling.fields import canonical_names
    from aphrodite.server.openai.protocol import ChatFields, CompletionFields
    from aphrodite.server.openai.responses.fields import ResponsesFields

    endpoints = (ChatFields, CompletionFields, ResponsesFields)
    return frozenset({*canonical_names(), *(name for fields in endpoints for name in fields.model_fields)})


@cache
def _embedding_fields() -> frozenset[str]:
    """Every field of the embedding endpoint."""
    from aphrodite.server.embeddings import EmbeddingFields

    return frozenset(EmbeddingFields.model_fields)


def _take_fields(resource: object, *methods: str, known: Callable[[], frozenset[str]] = _engine_fields) -> None:
    """Have methods of an openai resource take this engine's fields.

    They are replaced on the object, so what openai derives of them (`with_raw_response` and the like) takes them too.
    """
    for name in methods:
        setattr(resource, name, _taking_fields(getattr(resource, name), known))


def _taking_fields(method: Callable[..., Any], known: Callable[[], frozenset[str]]) -> Callable[..., Any]:
    own = inspect.signature(method).parameters

    @wraps(method)
    def call(*args: Any, **fields: Any) -> Any:
        names = [name for name in fields if name not in own and name in known()]
        if names:
            extra = {name: fields.pop(name) for name in names}
            fields["extra_body"] = {**extra, **(fields.get("extra_body") or {})}
        return method(*args, **fields)

    return call
