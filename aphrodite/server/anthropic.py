"""Anthropic's Messages API: `POST /v1/messages`, streamed or whole, and `POST /v1/messages/count_tokens`.

A conversation becomes a chat completion's: `system` its first message, and a last message of the assistant is
continued. Thinking is off unless it is asked for, so that a message begins with what its client looks for. Besides
Anthropic's fields it takes every sampling parameter by its own name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.grammar_fields import json_schema
from aphrodite.sampling.table import Grammar
from aphrodite.server.anthropic_answer import Answer
from aphrodite.server.anthropic_reading import (
    Thinking,
    read_conversation,
    read_thinking,
    read_tool_choice,
    read_tools,
)
from aphrodite.server.body import parse, read_object
from aphrodite.server.context import ModelContext, ServerContext
from aphrodite.server.errors import ApiError, invalid, prompt_as, unsupported
from aphrodite.server.generation import Generation
from aphrodite.server.openai.preparing import PreparedChat, prepare_chat
from aphrodite.server.openai.protocol import ChatFields, ignored_header, refuse_unsupported, sampling_params
from aphrodite.server.openai.rendering import render_chat
from aphrodite.server.openai.tools import read_tool_use
from aphrodite.server.openai.warnings import field_warnings
from aphrodite.server.presets import preset_of
from aphrodite.server.responses import json_response
from aphrodite.server.routing import post
from aphrodite.server.sse import EventResponse, StreamFormat, named_event

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
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _BLOCKS},
    },
}


class OutputConfig(pydantic.BaseModel):
    """`output_config`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="How much to think, where thinking is on and the chat template can say it."
    )
    format: dict[str, Any] | None = Field(
        default=None, description='`{"type": "json_schema", "schema": …}`: what the answer has to be.'
    )


class CountTokensFields(pydantic.BaseModel):
    """`POST /v1/messages/count_tokens`."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    messages: Annotated[Any, WithJsonSchema(_MESSAGES)] = Field(description="The conversation so far.")
    system: Annotated[Any, WithJsonSchema({"anyOf": [*_BLOCKS["anyOf"], {"type": "null"}]})] = Field(
        default=None, description="What the model is told before it."
    )
    tools: list[dict[str, Any]] = Field(default=[], description="Tools of your own, with `input_schema`.")
    tool_choice: dict[str, Any] = Field(
        default={}, description='`{"type": …}`: auto, any, none, or tool with a `name`; `disable_parallel_tool_use`.'
    )
    thinking: dict[str, Any] = Field(
        default={},
        description='`{"type": …}`: enabled with `budget_tokens`, adaptive, or disabled, as it is by default.',
    )
    output_config: OutputConfig = OutputConfig()


class MessagesFields(CountTokensFields):
    """`POST /v1/messages`."""

    max_tokens: int = Field(description="Most tokens of the answer, thinking included.", ge=1, le=2**31 - 1)
    stop_sequences: list[str] = Field(default=[], description="Texts that end the answer.", max_length=1024)
    stream: bool = Field(default=False, description="Send the answer piece by piece as server-sent events.")
    preset: str | None = Field(default=None, description="A sampler preset of /v1/presets.", max_length=256)
    metadata: dict[str, Any] = Field(default={}, description="Has no meaning here.")


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
        refuse_unsupported(body, MessagesFields)
        fields = parse(MessagesFields, body)
        thinking = read_thinking(fields.thinking)
        conversation = _chat_fields(fields, thinking)
        context = await self._context.resolve(request, fields.model, stream=_FORMAT if fields.stream else None)
        preset = preset_of(request, fields.preset, context.config)
        base = msgspec.structs.replace(
            context.engine.model.sampling_defaults,
            max_tokens=fields.max_tokens,
            stop=tuple(fields.stop_sequences),
            thinking_token_budget=thinking.budget,
            grammar=_grammar(fields.output_config.format),
        )
        params = sampling_params(body, MessagesFields, context.engine.model, base=base, preset=preset)
        if params.n != 1:
            raise unsupported("n", "a message is one answer; leave it out")
        chat = await prepare_chat(conversation, params, context)
        warnings = [*field_warnings(body, MessagesFields, preset), *_warnings(thinking, chat, context)]
        generation = Generation.of("msg", context.name, [chat.token_ids], chat.params)
        answer = Answer(context, generation, chat.reader, fields.stop_sequences, thinking.shown, warnings)
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
        """How many tokens a conversation has with its tools, as generation would see it."""
        body = await read_object(request, max_depth=self._context.config.max_json_depth)
        refuse_unsupported(body, CountTokensFields)
        fields = parse(CountTokensFields, body)
        thinking = read_thinking(fields.thinking)
        conversation = _chat_fields(fields, thinking)
        context = await self._context.resolve(request, fields.model)
        tools = read_tool_use(conversation)
        token_ids = await render_chat(conversation, context, tools, bounded=False, budget=thinking.budget)
        return json_response({"input_tokens": len(token_ids)})


def _chat_fields(fields: CountTokensFields, thinking: Thinking) -> ChatFields:
    """The conversation as a chat completion's, the answer that was begun to be continued."""
    messages = read_conversation(fields.messages, fields.system)
    choice = read_tool_choice(fields.tool_choice)
    continues = messages[-1]["role"] == "assistant"
    return ChatFields(
        messages=messages,
        continue_final_message=continues,
        tools=read_tools(fields.tools),
        tool_choice=choice.choice,
        parallel_tool_calls=choice.parallel,
        reasoning_effort=fields.output_config.effort if thinking.on else "none",
        chat_template_kwargs={"enable_thinking": True} if thinking.on else {},
        include_reasoning=thinking.on,
    )


def _grammar(wanted: dict[str, Any] | None) -> Grammar | None:
    """What `output_config.format` asks for."""
    if wanted is None:
        return None
    if wanted.get("type") != "json_schema":
        raise invalid("output_config.format.type", "must be json_schema")
    return json_schema(wanted.get("schema"), "output_config.format.schema")


def _warnings(thinking: Thinking, chat: PreparedChat, context: ModelContext) -> list[str]:
    """What to say of thinking that the model has no use for; that there is none by itself is what was asked for."""
    if not thinking.on:
        return []
    template = context.engine.chat_template
    if reasoning_marks(template.traits, context.config.reasoning_parser) is None:
        return [f"`thinking` has no effect: {template.name} says nothing of reasoning."]
    return [text.replace("reasoning_effort", "output_config.effort") for text in chat.warnings]
