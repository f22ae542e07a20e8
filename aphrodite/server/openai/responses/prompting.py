"""From the items of a conversation to the prompt, which may lose its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.context import ModelContext
from aphrodite.server.openai.preparing import PreparedChat, prepare_chat
from aphrodite.server.openai.protocol import ChatFields
from aphrodite.server.openai.rendering import render_chat
from aphrodite.server.openai.responses.conversation import chat_messages
from aphrodite.server.openai.responses.fields import ResponsesFields, chat_fields
from aphrodite.server.openai.responses.items import FunctionCallOutput, Item, Message
from aphrodite.server.openai.tools import ToolUse, read_tool_use

_ROOM = 8  # the share of the context that is left for an answer of no given length: 1 / 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that was rendered.

    Attributes:
        chat: the chat completion that it is.
        num_dropped: how many items were left out for the others to fit.
    """

    chat: PreparedChat
    num_dropped: int


async def conversation_prompt(
    fields: ResponsesFields, items: Sequence[Item], params: SamplingParams, context: ModelContext
) -> Prompt:
    """The prompt of a conversation.

    Raises:
        ApiError, InvalidRequestError: 400, naming the field.
    """
    kept = await _fitting(fields, items, params, context) if fields.truncation == "auto" else items
    try:
        chat = await prepare_chat(_chat(fields, kept), params, context)
    except InvalidRequestError as error:
        raise _as_input(error) from None
    return Prompt(chat, len(items) - len(kept))


async def count_input_tokens(fields: ResponsesFields, items: Sequence[Item], context: ModelContext) -> int:
    """How many tokens the conversation has, as generation would see it before it is truncated."""
    chat = _chat(fields, items)
    try:
        return len(await render_chat(chat, context, read_tool_use(chat), bounded=False))
    except InvalidRequestError as error:
        raise _as_input(error) from None


def _chat(fields: ResponsesFields, items: Sequence[Item]) -> ChatFields:
    return chat_fields(fields, chat_messages(items, fields.instructions))


def _as_input(error: InvalidRequestError) -> InvalidRequestError:
    """What is said of messages, which this endpoint's clients know as input."""
    if not (error.param or "").startswith("messages"):
        return error
    return InvalidRequestError(str(error), param="input", code=error.code)


async def _fitting(
    fields: ResponsesFields, items: Sequence[Item], params: SamplingParams, context: ModelContext
) -> Sequence[Item]:
    """The most of the conversation's end that leaves room for an answer, by bisection over where it may begin."""
    length = context.engine.model.max_model_len
    room = length // _ROOM if params.max_tokens is None else params.max_tokens
    limit = length - min(room, length // 2)
    tools = read_tool_use(_chat(fields, items))

    async def fits(start: int) -> bool:
        chat = _chat(fields, _from(items, start))
        return await _fits(chat, limit, context, tools, params.thinking_token_budget)

    starts = [0, *_starts(items)]
    low, high = 0, len(starts) - 1  # what does not fit at all is refused where it is rendered
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    return _from(items, starts[low])


async def _fits(chat: ChatFields, limit: int, context: ModelContext, tools: ToolUse, budget: int | None) -> bool:
    try:
        return len(await render_chat(chat, context, tools, bounded=True, budget=budget)) <= limit
    except InvalidRequestError as error:
        if error.code != "context_length_exceeded":
            raise _as_input(error) from None
        return False


def _starts(items: Sequence[Item]) -> list[int]:
    """Where a conversation may begin: with what a user says, or what a model does once it has its calls' outputs."""
    starts = []
    for index in range(1, len(items)):
        item, before = items[index], items[index - 1]
        answered = isinstance(before, FunctionCallOutput) and not isinstance(item, FunctionCallOutput)
        if (isinstance(item, Message) and item.role == "user") or answered:
            starts.append(index)
    return starts


def _from(items: Sequence[Item], start: int) -> list[Item]:
    """The items from `start` on, and the system messages before them."""
    told = [item for item in items[:start] if isinstance(item, Message) and item.role in ("system", "developer")]
    return [*told, *items[start:]]
