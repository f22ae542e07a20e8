"""Ollama's API: `/api/chat`, `/api/generate`, and what its clients ask about models.

Sampling parameters stand in `options` under Ollama's names, which are among those of all endpoints (`repeat_penalty`,
`num_predict`, `tfs_z`, …), so every sampler works there; `num_predict` below 0 is no limit. Streams are lines of JSON.
Durations are nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.grammar_fields import json_schema
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import Grammar
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import Headers, unsupported
from aphrodite.server.generation import Generation
from aphrodite.server.ollama_answer import Answer, told_as_message, told_as_response
from aphrodite.server.ollama_format import (
    KEEP_ALIVE,
    LINES,
    keep_alive_seconds,
    resolve_ollama,
    timestamp,
    untagged,
)
from aphrodite.server.ollama_models import ollama_model_routes
from aphrodite.server.ollama_reading import read_messages, read_think
from aphrodite.server.openai.preparing import PreparedChat, prepare_chat
from aphrodite.server.openai.prompts import check_ids, encode
from aphrodite.server.openai.protocol import (
    ChatFields,
    ignored_header,
    is_known_field,
    sampling_params,
    without_empty_stops,
)
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post
from aphrodite.server.sse import EventResponse

_THINK = {"anyOf": [{"type": "boolean"}, {"enum": ["low", "medium", "high"]}, {"type": "null"}]}
_MESSAGES = {"type": "array", "items": {"type": "object"}}


class OptionFields(pydantic.BaseModel):
    """What of `options` is no sampling parameter."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    num_predict: int | None = Field(
        default=None, description="Most tokens of the answer; below 0 is no limit.", le=2**31
    )
    num_ctx: int | None = Field(default=None, description="Has no meaning here: the server's context holds.")
    num_keep: int | None = Field(default=None, description="Has no meaning here: prompts are not shifted.")


class OllamaFields(pydantic.BaseModel):
    """What both ways of generating take."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str = Field(description="A name from /api/tags.")
    stream: bool = Field(default=True, description="Send the answer piece by piece, a line of JSON each.")
    options: dict[str, Any] = Field(default={}, description="Sampling parameters.")
    preset: str | None = Field(default=None, description="A sampler preset of /v1/presets.", max_length=256)
    keep_alive: Any = KEEP_ALIVE
    format: Any = Field(default=None, description='"json", or a JSON schema that the answer has to fit.')
    think: Annotated[Any, WithJsonSchema(_THINK)] = Field(
        default=None,
        description="Whether to think, or how much: low, medium or high. By default models that can do.",
    )


class OllamaChatFields(OllamaFields):
    """`POST /api/chat`."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES)] = Field(default=[], description="The conversation so far.")
    tools: list[dict[str, Any]] = Field(
        default=[], description="Functions that the model may call, with JSON schemas of their parameters."
    )


class OllamaGenerateFields(OllamaFields):
    """`POST /api/generate`."""

    prompt: str = Field(default="", description="The text; the chat template puts it into a turn of the user's.")
    system: str = Field(default="", description="What the model is told before it.")
    raw: bool = Field(default=False, description="Take the prompt as it is, without a template.")
    suffix: str = Field(default="", description="Must be empty.")
    images: list[Any] = Field(default=[], description="Must be empty: this model reads text only.")
    context: list[int] = Field(default=[], description="Token ids of an earlier answer, to go on from.")
    template: str = Field(default="", description="Must be empty: the server's template holds.")


def ollama_routes(context: ServerContext) -> list[Route]:
    """All of the protocol's routes."""
    generate = OllamaEndpoints(context)
    return [
        post("/api/chat", generate.chat),
        post("/api/generate", generate.generate),
        *ollama_model_routes(context),
    ]


class OllamaEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def chat(self, request: Request) -> Response | ASGIApp:
        """Answer a conversation."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(OllamaChatFields, body)
        if fields.messages == [] and self._unloads(fields):
            return _empty(fields.model, "unload", told_as_message({}))
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        params = _params(request, fields, context)
        if fields.messages == []:
            return _empty(context.name, "load", told_as_message({}))
        if fields.tools and context.config.tool_parser == "none":
            raise unsupported("tools", f'"{context.name}" does not support tools; leave it out')
        think = read_think(fields.think, context)
        chat = ChatFields(messages=read_messages(fields.messages), tools=fields.tools, **think)
        prepared = await prepare_chat(chat, params, context)
        generation = Generation.of("ollama", context.name, [prepared.token_ids], prepared.params)
        answer = Answer(context, generation, prepared.reader, told_as_message)
        return await self._respond(request, fields, answer, _ignored(body, fields))

    async def generate(self, request: Request) -> Response | ASGIApp:
        """Continue or answer a text."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = parse(OllamaGenerateFields, body)
        for name in ("suffix", "images", "template"):
            if getattr(fields, name):
                raise unsupported(name, "is not supported here; leave it out")
        is_empty = not fields.prompt and not fields.context
        if is_empty and self._unloads(fields):
            return _empty(fields.model, "unload", told_as_response({}))
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        params = _params(request, fields, context)
        if is_empty:
            return _empty(context.name, "load", told_as_response({}))
        prepared = await _text_prompt(fields, params, context)
        generation = Generation.of("ollama", context.name, [prepared.token_ids], prepared.params)
        answer = Answer(context, generation, prepared.reader, told_as_response, tells_context=True)
        return await self._respond(request, fields, answer, _ignored(body, fields))

    def _unloads(self, fields: OllamaFields) -> bool:
        """Whether a request without a text asks to unload its model, which happens once nobody uses it."""
        if fields.keep_alive is None or keep_alive_seconds(fields.keep_alive) != 0:
            return False
        pool = self._context.models
        pool.set_keep_alive(pool.find(untagged(self._context, fields.model)), 0.0)
        return True

    async def _respond(
        self, request: Request, fields: OllamaFields, answer: Answer, headers: Headers
    ) -> Response | ASGIApp:
        context = self._context
        if fields.stream:
            timeout = context.config.write_timeout
            return EventResponse(
                answer.stream, context.supervisor, write_timeout=timeout, headers=headers, format=LINES
            )
        whole = await context.supervisor.run(answer.whole(), request.receive)
        return json_response(whole, headers)


def _params(request: Request, fields: OllamaFields, context: ModelContext) -> SamplingParams:
    options = parse(OptionFields, fields.options)
    preset = preset_of(request, fields.preset, context.config)
    limit = options.num_predict
    base = msgspec.structs.replace(
        context.engine.model.sampling_defaults,
        max_tokens=None if limit is None or limit < 0 else limit,
        grammar=_grammar(fields.format),
    )
    try:
        given = without_empty_stops(fields.options)
        params = sampling_params(given, OptionFields, context.engine.model, base=base, preset=preset)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param=f"options.{error.param}", code=error.code) from None
    if params.n != 1:
        raise unsupported("options.n", "there is one answer here; leave it out")
    return params


async def _text_prompt(fields: OllamaGenerateFields, params: SamplingParams, context: ModelContext) -> PreparedChat:
    """The text, in a turn of the user's or as it is."""
    earlier = fields.context
    check_ids(earlier, context, field="context")
    if fields.raw:
        if fields.think:
            raise unsupported("think", "a raw prompt has no template to think by; leave it out")
        ids = await encode(fields.prompt, context, field="prompt", special=not earlier, bounded=True)
        return PreparedChat([*earlier, *ids], params, None, [])
    messages = [{"role": "system", "content": fields.system}] if fields.system else []
    asked = [*messages, {"role": "user", "content": fields.prompt}]
    chat = ChatFields(messages=asked, **read_think(fields.think, context))
    prepared = await prepare_chat(chat, params, context)
    return prepared._replace(token_ids=[*earlier, *prepared.token_ids])


def _ignored(body: Mapping[str, Any], fields: OllamaFields) -> Headers:
    """The header that names what was not understood, in the body or among the options."""
    options = {name: value for name, value in fields.options.items() if not is_known_field(name, OptionFields)}
    return ignored_header({**body, **options}, type(fields))


def _empty(model: str, reason: str, nothing: Mapping[str, Any]) -> Response:
    """A request without a text asks that the model be loaded, or unloaded, which it is."""
    head = {"model": model, "created_at": timestamp(), **nothing}
    return json_response({**head, "done": True, "done_reason": reason})


def _grammar(wanted: Any) -> Grammar | None:
    """What `format` asks for."""
    if wanted is None or wanted == "" or wanted == {}:
        return None
    return Grammar("json_object", "") if wanted == "json" else json_schema(wanted, "format")
