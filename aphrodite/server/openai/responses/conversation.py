"""Items as the messages of a chat, which is what chat templates render."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aphrodite.server.openai.responses.items import (
    FunctionCall,
    FunctionCallOutput,
    InputText,
    Item,
    Message,
    OutputText,
    ReasoningItem,
    Refusal,
)


def chat_messages(items: Iterable[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """The messages that `items` stand for, with `instructions` as the system's before them.

    What a model thinks, says and calls in a row is one message: chat templates know one turn of the assistant's where
    there are several items.
    """
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    turn: dict[str, Any] | None = None  # the assistant's, which may go on
    for item in items:
        if isinstance(item, FunctionCallOutput) or (isinstance(item, Message) and item.role != "assistant"):
            turn = None
            messages.append(_heard(item))
            continue
        if turn is None or not _continues(turn, item):
            turn = {"role": "assistant", "content": None}
            messages.append(turn)
        _add(turn, item)
    return [{**message, "content": ""} if _is_silent(message) else message for message in messages]


def _heard(item: Message | FunctionCallOutput) -> dict[str, Any]:
    """What somebody else than the model says."""
    if isinstance(item, Message):
        return {"role": item.role, "content": _content(item.content)}
    content = item.output if isinstance(item.output, str) else _content(item.output)
    return {"role": "tool", "tool_call_id": item.call_id, "content": content}


def _continues(turn: dict[str, Any], item: Message | FunctionCall | ReasoningItem) -> bool:
    """Whether an item belongs to a turn that was begun: reasoning opens one, text comes before calls."""
    if isinstance(item, FunctionCall):
        return True
    spoken = turn["content"] is not None or "tool_calls" in turn
    return not spoken and not (isinstance(item, ReasoningItem) and "reasoning_content" in turn)


def _add(turn: dict[str, Any], item: Message | FunctionCall | ReasoningItem) -> None:
    match item:
        case ReasoningItem(summary=summary, content=content):
            thoughts = "\n".join(part.text for part in content or summary)
            if thoughts:
                turn["reasoning_content"] = thoughts
        case Message(content=parts):
            turn["content"] = "".join(part.refusal if isinstance(part, Refusal) else part.text for part in parts)
        case FunctionCall(call_id=call_id, name=name, arguments=arguments):
            function = {"name": name, "arguments": arguments}
            turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})


def _is_silent(message: dict[str, Any]) -> bool:
    return message["content"] is None and "tool_calls" not in message


def _content(parts: Iterable[InputText | OutputText | Refusal]) -> str | list[dict[str, str]]:
    """One part as its text, several as parts."""
    texts = [part.refusal if isinstance(part, Refusal) else part.text for part in parts]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
