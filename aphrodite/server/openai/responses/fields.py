"""Fields of `POST /v1/responses` besides the sampling parameters, and what they are in a chat completion."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import Field, StringConstraints, WithJsonSchema

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.grammar_fields import read_grammar
from aphrodite.sampling.table import Grammar
from aphrodite.server.errors import unsupported
from aphrodite.server.openai.protocol import (
    TOOL_CHOICE_SCHEMA,
    ChatFields,
    ConversationFields,
    ReasoningEffort,
    Resumable,
    ReturnProgress,
    ReturnTimings,
)
from aphrodite.server.openai.tools import read_function
from aphrodite.server.resumable import refuse_resumable

LOGPROBS: Final = "message.output_text.logprobs"

_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "object", "properties": {"type": {"type": "string"}}}},
    ]
}
# What may be asked for beside an answer. All but the first belong to tools or inputs that are not there.
_Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_REFUSED: Final = {
    "conversation": "conversations are not kept under names; send previous_response_id",
    "prompt": "there are no stored prompts; send instructions and input",
    "context_management": 'nothing is compacted; send truncation "auto"',
}


class ReasoningFields(pydantic.BaseModel):
    """`reasoning` of a request."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    effort: ReasoningEffort | None = Field(
        default=None, description="How long to think, where the chat template has a way to say it."
    )
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="Nothing is summarised: what the model thinks is told in full."
    )


class TextFields(pydantic.BaseModel):
    """`text` of a request."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    format: dict[str, Any] | None = Field(
        default=None, description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "schema": …}.'
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="Has no effect: chat templates have no way to say it."
    )


class ResponsesFields(ConversationFields):
    """`POST /v1/responses` and `POST /v1/responses/input_tokens`."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(description="What to answer: text, or items.")
    instructions: str | None = Field(
        default=None, description="What the model is told before the conversation; not carried over to the next answer."
    )
    previous_response_id: str | None = Field(
        default=None, description="The stored answer that the conversation goes on from.", max_length=256
    )
    store: bool = Field(
        default=True, description="Keep the answer in memory, for previous_response_id, until others need the room."
    )
    tools: list[dict[str, Any]] = Field(
        default=[], description="Functions that the model may call, with JSON schemas of their parameters."
    )
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = Field(
        default=None, description="Whether to call: none, auto, required, or a function's name; by default auto."
    )
    max_tool_calls: int | None = Field(
        default=None, description="Counts calls of the server's own tools, which it has none of.", ge=1, lt=2**63
    )
    text: TextFields = Field(default=TextFields(), description="What form the answer's text has.")
    reasoning: ReasoningFields = Field(default=ReasoningFields(), description="How long to think.")
    include: list[_Include] = Field(
        default=[], description=f"{LOGPROBS}: add log-probabilities of the text's tokens.", max_length=64
    )
    top_logprobs: int | None = Field(
        default=None, description="Add log-probabilities, and those of so many most likely tokens.", ge=0, lt=2**63
    )
    truncation: Literal["auto", "disabled"] = Field(
        default="disabled",
        description="auto: a conversation that is too long loses its beginning; system messages stay. Room is left for "
        "max_output_tokens, else an eighth of the context.",
    )
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field(default={}, description="Up to 16 texts that come back with the answer.", max_length=16)
    user: str | None = Field(default=None, description="Comes back with the answer.", max_length=1024)
    safety_identifier: str | None = Field(default=None, description="Comes back with the answer.", max_length=1024)
    prompt_cache_key: str | None = Field(default=None, description="Comes back with the answer.", max_length=1024)
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = Field(
        default=None, description="There is one tier: default."
    )
    return_timings: ReturnTimings = False
    return_progress: ReturnProgress = False
    resumable: Resumable = False
    background: bool = Field(
        default=False, description="Answer whether or not somebody listens; needs store. GET tells what came of it."
    )
    conversation: Any = Field(default=None, description="Only null or empty.")
    prompt: Any = Field(default=None, description="Only null or empty.")
    context_management: list[Any] | None = Field(default=None, description="Only null or an empty list.")


def refuse_unsupported_fields(fields: ResponsesFields) -> None:
    """Refuse what would change the answer and is not there.

    Raises:
        ApiError: 400, naming the field.
    """
    for name, why in _REFUSED.items():
        if getattr(fields, name):
            raise unsupported(name, why)
    refuse_resumable(fields.resumable and (fields.background or not fields.stream))
    if fields.stream_options.continuous_usage_stats:
        raise unsupported("stream_options.continuous_usage_stats", "usage comes with the last event; leave it out")


def field_notes(fields: ResponsesFields) -> list[str]:
    """What to say of fields that have no effect here."""
    notes = []
    if fields.text.verbosity not in (None, "medium"):
        notes.append("`text.verbosity` has no effect: chat templates have no way to say it.")
    if fields.reasoning.summary is not None:
        notes.append("`reasoning.summary` has no effect: what the model thinks is told in full.")
    return notes


def text_grammar(text: TextFields) -> Grammar | None:
    """The grammar that `text.format` asks for.

    Raises:
        InvalidRequestError: it has no known form.
    """
    if text.format is None:
        return None
    try:
        return read_grammar([("response_format", text.format)])
    except InvalidRequestError as error:
        message = str(error).replace("response_format", "text.format").replace("format.json_schema.", "format.")
        param = "text.format.schema" if (error.param or "").endswith(".schema") else "text.format"
        raise InvalidRequestError(message, param=param, code=error.code) from None


def chat_fields(fields: ResponsesFields, messages: list[dict[str, Any]]) -> ChatFields:
    """The chat completion that a request is, of these messages.

    Raises:
        ApiError: 400: a tool is wrong, or is none that runs at the client.
    """
    shared = {name: getattr(fields, name) for name in ConversationFields.model_fields}
    return ChatFields(
        **shared,
        messages=messages,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(fields.tools)],
        tool_choice=_tool_choice(fields.tool_choice),
        reasoning_effort=fields.reasoning.effort,
    )


def echoed_tools(fields: ResponsesFields) -> list[dict[str, Any]]:
    """The tools as a response tells them."""
    keys = ("name", "description", "parameters", "strict")
    return [{"type": "function", **{key: tool.get(key) for key in keys}} for tool in fields.tools]


def _tool(tool: dict[str, Any], path: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise unsupported(f"{path}.type", f"functions only, which the client runs, not {str(kind)[:40]!r}")
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": read_function({key: tool.get(key) for key in keys}, path)}


def _tool_choice(choice: Any) -> Any:
    """`tool_choice` as chat completions have it; what it is not is left to be refused there."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        return {**choice, "tools": [_named(tool) for tool in choice["tools"]]}
    return _named(choice)


def _named(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice
