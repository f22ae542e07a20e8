"""The items that a conversation of `/v1/responses` consists of, as OpenAI writes them."""

from __future__ import annotations

import uuid
from typing import Any, Literal

import msgspec

Status = Literal["in_progress", "completed", "incomplete"]
Role = Literal["user", "assistant", "system", "developer"]


class InputText(msgspec.Struct, frozen=True, tag_field="type", tag="input_text"):
    """What somebody else than the model says."""

    text: str


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """What the model says. `logprobs` has a chat completion's entries, one a token, if the request wanted them."""

    text: str
    annotations: list[Any] = []
    logprobs: list[dict[str, Any]] = []


class Refusal(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """What a model says instead of an answer; none comes from here, and other servers' are taken."""

    refusal: str


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """What the model thinks."""

    text: str


class SummaryText(msgspec.Struct, frozen=True, tag_field="type", tag="summary_text"):
    """What another server told of a model's thoughts."""

    text: str


class Message(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """A text of somebody's."""

    id: str
    role: Role
    content: list[InputText | OutputText | Refusal]
    status: Status = "completed"


class FunctionCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call that the model makes; `arguments` is JSON unless the model made a mistake or was cut off."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "completed"


class FunctionCallOutput(msgspec.Struct, frozen=True, tag_field="type", tag="function_call_output"):
    """What came of the call `call_id`."""

    id: str
    call_id: str
    output: str | list[InputText]
    status: Status = "completed"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thinks before it says or calls something."""

    id: str
    summary: list[SummaryText]
    content: list[ReasoningText]
    status: Status = "completed"


Item = Message | FunctionCall | FunctionCallOutput | ReasoningItem

encode_item = msgspec.json.Encoder().encode
decode_item = msgspec.json.Decoder(Item).decode


def new_id(prefix: str) -> str:
    """An id that no other item or response has."""
    return f"{prefix}_{uuid.uuid4().hex}"
