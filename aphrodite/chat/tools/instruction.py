"""Tools for templates that know none: told in words, with calls and results as texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aphrodite.chat.content import part_texts
from aphrodite.chat.formats import ToolFormat

Message = Mapping[str, Any]

_RESULTS: Final = ("tool", "function")


def with_instruction(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the tools described in its system message, which is made if there is none.

    Earlier calls become texts in the form that is asked for, and their results become the user's.
    """
    spoken = without_calls(messages)
    instruction = _instruction(tools)
    if spoken and spoken[0].get("role") == "system":
        first = spoken[0]
        return [{**first, "content": _joined(first.get("content"), instruction)}, *spoken[1:]]
    return [{"role": "system", "content": instruction}, *spoken]


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a conversation has calls or results."""
    return any(message.get("tool_calls") or message.get("role") in _RESULTS for message in messages)


def without_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation with calls as the assistant's texts and results as the user's."""
    return [_spoken(message) for message in messages]


def with_spoken_calls(messages: Sequence[Message], tool_format: ToolFormat | None) -> list[dict[str, Any]]:
    """The conversation with calls as the assistant's texts, in the model's own format where that is Granite's."""
    return [_with_spoken_calls(message, tool_format) for message in messages]


def _instruction(tools: Sequence[Mapping[str, Any]]) -> str:
    described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call tools. Each line describes one:\n<tools>\n{described}\n</tools>\n\n"
        "To call a tool, write a JSON object with its name and arguments in this form, once for each call, and end "
        'your answer there:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "You get the results in <tool_response></tool_response>. Where no tool helps, just answer."
    )


def _spoken(message: Message) -> dict[str, Any]:
    """A message without calls, in a role that every template has."""
    if message.get("role") in _RESULTS:
        result = _joined("<tool_response>", message.get("content"), "</tool_response>", between="\n")
        return {"role": "user", "content": result}
    return _with_spoken_calls(message, None)


def _with_spoken_calls(message: Message, tool_format: ToolFormat | None) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return dict(message)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    objects = [_call_object(call) for call in calls]
    if tool_format == "granite":
        texts = [f"<|tool_call|>[{', '.join(objects)}]"]
    else:
        texts = [f"<tool_call>\n{text}\n</tool_call>" for text in objects]
    return {**rest, "content": _joined(message.get("content"), *texts, between="\n")}


def _call_object(call: Any) -> str:
    """A call as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {text}}}'


def _joined(*contents: Any, between: str = "\n\n") -> str:
    """Contents, each a text or a list of text parts, as one text."""
    return between.join(text for content in contents for text in part_texts(content) if text)
