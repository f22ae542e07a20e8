"""Conversations brought to what a template can show: names, turns in a row, system texts where there is no such role.

Templates differ in what they take: some refuse two turns of one role in a row, a system message anywhere but first, or
any at all; some leave a system message out without a word; few show the names of several speakers; and they take the
arguments of tool calls as an object or as text. A conversation is changed as little as a template needs, by
`adaptations` in their order, and never loses a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from aphrodite.chat.content import part_text, part_texts
from aphrodite.chat.tools.history import answered

Message = Mapping[str, Any]

_SPOKEN: Final = ("system", "user", "assistant")
# What templates call an answer's reasoning; Cohere's have a name of their own for what came before calls of tools.
_THOUGHT: Final = ("reasoning_content", "reasoning", "thinking")
_PLAN: Final = "tool_plan"
_BETWEEN: Final = "\n\n"  # two texts in one turn


def adaptations(messages: Sequence[Message]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Ever more changed forms of a conversation, each with what was done; none that equals the one before."""
    planless = without_plans(messages)
    told = answered(planless)
    steps = (
        ("what was thought before calls with words was left out", planless),
        ("an empty answer was put behind results of tools", told),
        ("turns of one role in a row became one turn", merge_turns(told)),
        ("system messages after the first became the user's", merge_turns(demote_system(told, keep_first=True))),
        ("system messages became part of the user's turns", merge_turns(demote_system(told, keep_first=False))),
        ("an empty user's turn was put first", open_with_user(demote_system(told, keep_first=False))),
    )
    before = [dict(message) for message in messages]
    for what, changed in steps:
        if changed != before:
            yield what, changed
        before = changed


def merge_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Neighbouring turns of one role as one, their texts two line ends apart. Tools' turns stay by themselves."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and _can_join(merged[-1], message):
            merged[-1] = {**merged[-1], "content": _joined(merged[-1].get("content"), message.get("content"))}
        else:
            merged.append(dict(message))
    return merged


def demote_system(messages: Sequence[Message], *, keep_first: bool) -> list[dict[str, Any]]:
    """System messages as the user's, in their places; with `keep_first` those that open the conversation stay."""
    result: list[dict[str, Any]] = []
    opening = keep_first
    for message in messages:
        opening = opening and message.get("role") == "system"
        demoted = message.get("role") == "system" and not opening
        result.append({**message, "role": "user"} if demoted else dict(message))
    return result


def open_with_user(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Merged turns that begin with the user's, an empty one if need be: a character's greeting often comes first."""
    merged = merge_turns(messages)
    if merged and merged[0].get("role") == "assistant":
        merged.insert(0, {"role": "user", "content": ""})
    return merged


def with_names(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`NAME: ` before the text of every message that has a `name` and does not begin with it already."""
    return [_named(message) for message in messages]


def with_thoughts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What was thought before earlier answers, under every name that templates have for it."""
    told = []
    for message in messages:
        thought = next((message[name] for name in _THOUGHT if message.get(name)), None)
        names = () if thought is None else (*_THOUGHT, _PLAN) if message.get("tool_calls") else _THOUGHT
        told.append({**message, **{name: message.get(name) or thought for name in names}})
    return told


def without_plans(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns that call tools with words, and without what was thought before them: some templates show either."""
    return [
        {key: value for key, value in message.items() if key not in (*_THOUGHT, _PLAN)}
        if message.get("tool_calls") and message.get("content")
        else dict(message)
        for message in messages
    ]


def with_arguments(messages: Sequence[Message], *, as_text: bool) -> list[dict[str, Any]]:
    """The arguments of tool calls as JSON text, or as the objects that such text describes; other text stays."""
    return [_converted(message, as_text) if message.get("tool_calls") else dict(message) for message in messages]


def with_contents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns without a content with an empty one: many templates print what there is, be it nothing."""
    return [dict(message) if message.get("content") is not None else {**message, "content": ""} for message in messages]


def system_texts(messages: Sequence[Message]) -> list[str]:
    """The texts of all system messages, without white space around them and without empty ones."""
    texts: list[str] = []
    for message in messages:
        if message.get("role") == "system":
            texts.extend(stripped for text in part_texts(message.get("content")) if (stripped := text.strip()))
    return texts


def _converted(message: Message, as_text: bool) -> dict[str, Any]:
    calls = message["tool_calls"]
    if not isinstance(calls, list):  # the template may say what is wrong
        return dict(message)
    converted = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"], as_text)}}
        converted.append(call)
    return {**message, "tool_calls": converted}


def _arguments(value: Any, as_text: bool) -> Any:
    if as_text and isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if not as_text and isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # a model may have written anything
            return value
        return parsed if isinstance(parsed, dict) else value
    return value


def _can_join(first: Message, second: Message) -> bool:
    role = first.get("role")
    plain = not any(key in message for message in (first, second) for key in ("tool_calls", "tool_call_id"))
    return role in _SPOKEN and role == second.get("role") and plain


def _joined(first: Any, second: Any) -> Any:
    """Two contents as one: a text if both are, else a list of parts."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return first + _BETWEEN + second
    parts = [part for content in (first, second) for part in ([content] if isinstance(content, str) else content)]
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _named(message: Message) -> dict[str, Any]:
    name, content = message.get("name"), message.get("content")
    if message.get("role") not in _SPOKEN or not isinstance(name, str) or not name:
        return dict(message)
    prefix = f"{name}: "
    if isinstance(content, str) and not content.startswith(f"{name}:"):
        return {**message, "content": prefix + content}
    if isinstance(content, list) and content and not part_text(content[0]).startswith(f"{name}:"):
        first = content[0]
        named = prefix + first if isinstance(first, str) else {**first, "text": prefix + part_text(first)}
        return {**message, "content": [named, *content[1:]]}
    return dict(message)
