"""Anthropic's Messages API: `POST /v1/messages`, streamed or whole, and `POST /v1/messages/count_tokens`.

A conversation becomes a chat completion's: `system` its first message, blocks of text its contents, and a last message
of the assistant is continued. Besides Anthropic's fields it takes every sampling parameter by its own name.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.errors import InvalidRequestError
from aphrodite.outputs import CompletionOutput
from aphrodite.server.body import off_loop, parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, invalid, prompt_as, unsupported
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.openai.protocol import ChatFields, ignored_header, refuse_unsupported, sampling_params
from aphrodite.server.openai.rendering import chat_prompt, render_chat
from aphrodite.server.openai.tools import ToolUse
from aphrodite.server.openai.warnings import field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post
from aphrodite.server.sse import EventResponse, EventStream, StreamFormat, named_event

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_BLOCKS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": _BLOCKS},
    },
}


class CountTokensFields(pydantic.BaseModel):
    """`POST /v1/messages/count_tokens`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    messages: Annotated[Any, WithJsonSchema(_MESSAGES)] = Field(description="The conversation so far.")
    system: Annotated[Any, WithJsonSchema({"anyOf": [*_BLOCKS["anyOf"], {"type": "null"}]})] = Field(
        default=None, description="What the model is told before it."
    )


class MessagesFields(CountTokensFields):
    """`POST /v1/messages`."""

    max_tokens: int = Field(description="Most tokens of the answer.", ge=1, le=2**31 - 1)
    stop_sequences: list[str] = Field(default=[], description="Texts that end the answer.", max_length=1024)
    stream: bool = Field(default=False, description="Send the answer piece by piece as server-sent events.")
    preset: str | None = Field(default=None, description="A sampler preset of /v1/presets.", max_length=256)
    metadata: dict[str, Any] = Field(default={}, description="Has no meaning here.")
    thinking: dict[str, Any] = Field(default={}, description='Only {"type": "disabled"}.')


Fields = TypeVar("Fields", bound=CountTokensFields)


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _failure(error: ApiError) -> bytes:
    return named_event("error", error.encode(anthropic_error))


_FORMAT = StreamFormat(mark=b"", ping=named_event("ping", b'{"type":"ping"}'), failure=_failure)


def anthropic_routes(context: ServerContext) -> list[Route]:
    """All of the protocol's routes."""
    endpoints = MessagesEndpoints(context)
    return [post("/v1/messages", endpoints.create), post("/v1/messages/count_tokens", endpoints.count_tokens)]


class MessagesEndpoints:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def create(self, request: Request) -> Response | ASGIApp:
        """Answer a conversation."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = _checked(MessagesFields, body)
        context = await self._context.resolve(request, fields.model)
        preset = preset_of(request, fields.preset, context.config)
        base = msgspec.structs.replace(
            context.engine.model.sampling_defaults, max_tokens=fields.max_tokens, stop=tuple(fields.stop_sequences)
        )
        params = sampling_params(body, MessagesFields, context.engine.model, base=base, preset=preset)
        if params.n != 1:
            raise unsupported("n", "a message is one answer; leave it out")
        token_ids, params = await chat_prompt(_chat_fields(fields), params, context, ToolUse())
        answer = _Answer(context, Generation.of("msg", context.name, [token_ids], params), fields.stop_sequences)
        answer.warnings = field_warnings(body, MessagesFields, preset)
        headers = ignored_header(body, MessagesFields)
        try:
            if fields.stream:
                timeout = context.config.write_timeout
                return EventResponse(
                    answer.stream, context.supervisor, write_timeout=timeout, headers=headers, format=_FORMAT
                )
            whole = await context.supervisor.run(answer.whole(), request.receive)
        except InvalidRequestError as error:
            raise prompt_as(error, "messages") from None
        return json_response(whole, headers)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a conversation has, as generation would see it."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        fields = _checked(CountTokensFields, body)
        context = await self._context.resolve(request, fields.model)
        token_ids = await render_chat(_chat_fields(fields), context, ToolUse(), bounded=False)
        return json_response({"input_tokens": len(token_ids)})


def _checked(model: type[Fields], body: dict[str, Any]) -> Fields:
    """The request's fields, once what would change the answer and is not there has been refused."""
    refuse_unsupported(body)
    thinking = body.get("thinking")
    if thinking not in (None, {}, {"type": "disabled"}):
        raise unsupported(
            "thinking", 'what a model thinks is part of its text here; leave it out or {"type": "disabled"}'
        )
    return parse(model, body)


def _chat_fields(fields: CountTokensFields) -> ChatFields:
    """The conversation as a chat completion's, the answer that was begun to be continued."""
    messages = fields.messages
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "must be a list with at least one message", code="invalid_type")
    chat = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    system = None if fields.system is None else _blocks(fields.system, "system")
    continues = chat[-1]["role"] == "assistant"
    leading = [] if system is None else [{"role": "system", "content": system}]
    return ChatFields(messages=[*leading, *chat], continue_final_message=continues)


def _message(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(path, "must be an object with role and content", code="invalid_type")
    if value.get("role") not in ("user", "assistant"):
        raise invalid(f"{path}.role", "must be user or assistant; what a system says goes into `system`")
    return {"role": value["role"], "content": _blocks(value.get("content"), f"{path}.content")}


def _blocks(value: Any, path: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(path, "must be text or a list of blocks", code="invalid_type")
    return [{"type": "text", "text": _block(block, f"{path}[{index}]")} for index, block in enumerate(value)]


def _block(block: Any, path: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise invalid(path, 'must be an object such as {"type": "text", "text": …}', code="invalid_type")
    if kind != "text":
        raise unsupported(path, f"blocks of text only, not {kind[:40]!r}")
    if not isinstance(block.get("text"), str):
        raise invalid(f"{path}.text", "must be text", code="invalid_type")
    return str(block["text"])


class _Answer:
    """One message, streamed or whole."""

    def __init__(self, context: ModelContext, generation: Generation, stops: list[str]) -> None:
        self._context = context
        self._generation = generation
        self._stops = stops
        self.warnings: list[str] = []

    async def whole(self) -> bytes:
        """The response's body."""
        (output,), counter = await collect(self._context, self._generation)
        (answer,) = output.outputs
        message = self._message([{"type": "text", "text": answer.text}], counter) | self._ending(answer)
        if self.warnings:
            message["warnings"] = self.warnings
        return await off_loop(self._generation.body_bytes(answer.num_tokens), lambda: msgspec.json.encode(message))

    async def stream(self, events: EventStream) -> None:
        """Write the message's events."""
        counter = UsageCounter(self._generation.prompts)
        opened = False
        pieces = stream_pieces(self._context, self._generation)
        async with aclosing(pieces):
            async for number, output in pieces:
                counter.observe(number, output)
                (answer,) = output.outputs
                data = b"" if opened else self._opening(counter)
                opened = True
                if answer.text:
                    delta = {"type": "text_delta", "text": answer.text}
                    data += _event("content_block_delta", index=0, delta=delta)
                if answer.finish_reason is not None:
                    data += self._closing(answer, counter)
                await events.write(data)

    def _opening(self, counter: UsageCounter) -> bytes:
        extra = {"warnings": self.warnings} if self.warnings else {}
        message = self._message([], counter) | {"stop_reason": None, "stop_sequence": None} | extra
        block = {"type": "text", "text": ""}
        return _event("message_start", message=message) + _event("content_block_start", index=0, content_block=block)

    def _closing(self, answer: CompletionOutput, counter: UsageCounter) -> bytes:
        usage = _usage(counter)
        stop = _event("content_block_stop", index=0)
        return stop + _event("message_delta", delta=self._ending(answer), usage=usage) + _event("message_stop")

    def _message(self, content: list[dict[str, Any]], counter: UsageCounter) -> dict[str, Any]:
        generation = self._generation
        return {
            "id": generation.response_id.replace("msg-", "msg_", 1),
            "type": "message",
            "role": "assistant",
            "model": generation.model,
            "content": content,
            "usage": _usage(counter),
        }

    def _ending(self, answer: CompletionOutput) -> dict[str, Any]:
        """Why it ended. A stop of the template's own is the end of the turn."""
        named = isinstance(answer.stop_reason, str) and answer.stop_reason in self._stops
        reason = "max_tokens" if answer.finish_reason == "length" else "stop_sequence" if named else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stop_reason if named else None}


def _usage(counter: UsageCounter) -> dict[str, int]:
    """Anthropic counts what the cache brought apart from the rest of the prompt."""
    usage = counter.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _event(name: str, **content: Any) -> bytes:
    return named_event(name, msgspec.json.encode({"type": name, **content}))
