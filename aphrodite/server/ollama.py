"""Ollama's API: `/api/chat`, `/api/generate`, and what its clients ask about models.

Sampling parameters stand in `options` under Ollama's names, which are among those of all endpoints (`repeat_penalty`,
`num_predict`, `tfs_z`, …), so every sampler works there; `num_predict` below 0 is no limit. Streams are lines of JSON.
Durations are nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.errors import InvalidRequestError
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.sampling.grammar_fields import json_schema
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import Grammar
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import Headers, unsupported
from aphrodite.server.generation import Generation, collect, stream_pieces
from aphrodite.server.ollama_format import (
    KEEP_ALIVE,
    LINES,
    keep_alive_seconds,
    line,
    resolve_ollama,
    timestamp,
    untagged,
)
from aphrodite.server.ollama_models import ollama_model_routes
from aphrodite.server.openai.prompts import check_ids, encode
from aphrodite.server.openai.protocol import ChatFields, ignored_header, is_known_field, sampling_params
from aphrodite.server.openai.rendering import chat_prompt
from aphrodite.server.openai.tools import ToolUse
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post
from aphrodite.server.sse import EventResponse, EventStream

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
    think: bool = Field(default=False, description="Must be false: what a model thinks is part of its text here.")


class OllamaChatFields(OllamaFields):
    """`POST /api/chat`."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES)] = Field(default=[], description="The conversation so far.")
    tools: list[Any] = Field(default=[], description="Must be empty: tool calls are not supported yet.")


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
        if fields.tools:
            raise unsupported("tools", "tool calls are not supported yet; leave it out")
        if fields.messages == [] and self._unloads(fields):
            return _empty(fields.model, "unload", _as_message(""))
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        params = _params(request, fields, context)
        if fields.messages == []:
            return _empty(context.name, "load", _as_message(""))
        chat = ChatFields(messages=_messages(fields.messages))
        token_ids, params = await chat_prompt(chat, params, context, ToolUse())
        answer = _Answer(context, Generation.of("ollama", context.name, [token_ids], params), _as_message)
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
            return _empty(fields.model, "unload", _as_response(""))
        context = await resolve_ollama(self._context, request, fields.model, fields.keep_alive)
        params = _params(request, fields, context)
        if is_empty:
            return _empty(context.name, "load", _as_response(""))
        token_ids, params = await _prompt(fields, params, context)
        generation = Generation.of("ollama", context.name, [token_ids], params)
        answer = _Answer(context, generation, _as_response, tells_context=True)
        return await self._respond(request, fields, answer, _ignored(body, fields))

    def _unloads(self, fields: OllamaFields) -> bool:
        """Whether a request without a text asks to unload its model, which happens once nobody uses it."""
        if fields.keep_alive is None or keep_alive_seconds(fields.keep_alive) != 0:
            return False
        pool = self._context.models
        pool.set_keep_alive(pool.find(untagged(self._context, fields.model)), 0.0)
        return True

    async def _respond(
        self, request: Request, fields: OllamaFields, answer: _Answer, headers: Headers
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
    if fields.think:
        raise unsupported("think", "what a model thinks is part of its text here; leave it out")
    options = parse(OptionFields, fields.options)
    preset = preset_of(request, fields.preset, context.config)
    limit = options.num_predict
    base = msgspec.structs.replace(
        context.engine.model.sampling_defaults,
        max_tokens=None if limit is None or limit < 0 else limit,
        grammar=_grammar(fields.format),
    )
    try:
        params = sampling_params(fields.options, OptionFields, context.engine.model, base=base, preset=preset)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param=f"options.{error.param}", code=error.code) from None
    if params.n != 1:
        raise unsupported("options.n", "there is one answer here; leave it out")
    return params


async def _prompt(
    fields: OllamaGenerateFields, params: SamplingParams, context: ModelContext
) -> tuple[list[int], SamplingParams]:
    earlier = fields.context
    check_ids(earlier, context, field="context")
    if fields.raw:
        ids = await encode(fields.prompt, context, field="prompt", special=not earlier, bounded=True)
        return [*earlier, *ids], params
    messages = [{"role": "system", "content": fields.system}] if fields.system else []
    chat = ChatFields(messages=[*messages, {"role": "user", "content": fields.prompt}])
    token_ids, params = await chat_prompt(chat, params, context, ToolUse())
    return [*earlier, *token_ids], params


def _ignored(body: Mapping[str, Any], fields: OllamaFields) -> Headers:
    """The header that names what was not understood, in the body or among the options."""
    options = {name: value for name, value in fields.options.items() if not is_known_field(name, OptionFields)}
    return ignored_header({**body, **options}, type(fields))


def _messages(value: Any) -> Any:
    """Ollama's messages as OpenAI's: pictures, which these models do not see, are refused."""
    if isinstance(value, list):
        for index, message in enumerate(value):
            if isinstance(message, dict) and message.get("images"):
                raise unsupported(f"messages[{index}].images", "this model reads text only; leave it out")
    return value


def _as_message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _as_response(text: str) -> dict[str, Any]:
    return {"response": text}


def _empty(model: str, reason: str, nothing: Mapping[str, Any]) -> Response:
    """A request without a text asks that the model be loaded, or unloaded, which it is."""
    head = {"model": model, "created_at": timestamp(), **nothing}
    return json_response({**head, "done": True, "done_reason": reason})


@dataclass(slots=True)
class _Answer:
    """One answer, streamed or whole; `write` puts a text where the endpoint's clients look for it."""

    context: ModelContext
    generation: Generation
    write: Callable[[str], dict[str, Any]]
    tells_context: bool = False
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None

    async def whole(self) -> bytes:
        """The response's body."""
        (output,), _ = await collect(self.context, self.generation)
        return msgspec.json.encode(self._end(output.outputs[0], output.outputs[0].text, output.outputs[0].token_ids))

    async def stream(self, events: EventStream) -> None:
        """Write the answer's lines."""
        token_ids: list[int] = []
        pieces = stream_pieces(self.context, self.generation)
        async with aclosing(pieces):
            async for _, output in pieces:
                self.first = self.first or time.perf_counter()
                await events.write(self._lines(output, token_ids))

    def _lines(self, output: RequestOutput, token_ids: list[int]) -> bytes:
        (answer,) = output.outputs
        token_ids += answer.token_ids
        data = line({**self._head(), **self.write(answer.text), "done": False}) if answer.text else b""
        if answer.finish_reason is not None:
            data += line(self._end(answer, "", token_ids))
        return data

    def _head(self) -> dict[str, Any]:
        return {"model": self.generation.model, "created_at": timestamp()}

    def _end(self, answer: CompletionOutput, text: str, token_ids: list[int]) -> dict[str, Any]:
        now = time.perf_counter()
        first = self.first or now
        (prompt,) = self.generation.prompts
        extra = {"context": [*prompt, *token_ids]} if self.tells_context else {}
        return {
            **self._head(),
            **self.write(text),
            "done": True,
            "done_reason": "length" if answer.finish_reason == "length" else "stop",
            **extra,
            "total_duration": _nanoseconds(now - self.began),
            "load_duration": 0,
            "prompt_eval_count": len(prompt),
            "prompt_eval_duration": _nanoseconds(first - self.began),
            "eval_count": answer.num_tokens,
            "eval_duration": _nanoseconds(now - first),
        }


def _grammar(wanted: Any) -> Grammar | None:
    """What `format` asks for."""
    if wanted is None or wanted == "" or wanted == {}:
        return None
    return Grammar("json_object", "") if wanted == "json" else json_schema(wanted, "format")


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
