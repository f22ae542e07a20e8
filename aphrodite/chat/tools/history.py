"""Earlier calls of tools and their results, brought to what a template can show.

Templates differ: some have no place for words beside calls, some show one call a turn, some demand an answer behind
results, and some models know ids of a certain form only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

from aphrodite.chat.formats import ToolFormat

Message = Mapping[str, Any]

_SHORT_ID: Final = re.compile(r"[A-Za-z0-9]{9}")


def with_ids(messages: Sequence[Message], tool_format: ToolFormat | None) -> list[dict[str, Any]]:
    """Calls and results with ids of the form that the model knows, where it knows one only.

    Mistral's are nine letters and digits, and its templates refuse others. Kimi's consist of the name and the call's
    number in the conversation (https://github.com/MoonshotAI/Kimi-K2/blob/main/docs/tool_call_guidance.md).
    """
    if tool_format not in ("mistral", "kimi_k2"):
        return [dict(message) for message in messages]
    named, known, count = [], dict[Any, str](), 0
    for message in messages:
        changed = dict(message)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
            changed["tool_calls"] = []
            for call in calls:
                new = _short_id(call, count) if tool_format == "mistral" else _kimi_id(call, count)
                known[_hashable(call.get("id"))] = new
                changed["tool_calls"].append({**call, "id": new})
                count += 1
        answered = message.get("tool_call_id")
        if answered is not None:
            without_call = _short_id({"id": answered}, count) if tool_format == "mistral" else answered
            changed["tool_call_id"] = known.get(_hashable(answered), without_call)
        named.append(changed)
    return named


def words_apart(messages: Sequence[Message], content: str | None) -> list[dict[str, Any]]:
    """Turns that call tools with `content` for their content; what they say becomes a turn before them."""
    apart: list[dict[str, Any]] = []
    for message in messages:
        if not message.get("tool_calls"):
            apart.append(dict(message))
            continue
        if message.get("content"):
            apart.append({key: value for key, value in message.items() if key != "tool_calls"})
        apart.append({**message, "content": content})
    return apart


def without_words(messages: Sequence[Message], content: str | None) -> list[dict[str, Any]]:
    """Turns that call tools with `content` for their content."""
    return [{**message, "content": content} if message.get("tool_calls") else dict(message) for message in messages]


def one_call_a_turn(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Each call in a turn of its own, its result behind it; the first has what was said and thought before all."""
    single: list[dict[str, Any]] = []
    shown = 0  # messages before this one are there
    for index, message in enumerate(messages):
        if index < shown:  # a result that has been put behind its call
            continue
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or len(calls) < 2:
            single.append(dict(message))
            continue
        results = _results_behind(messages, index)
        shown = index + 1 + len(results)
        rest: dict[Any, list[int]] = {}  # places among the results by the ids of their calls
        for place, result in enumerate(results):
            rest.setdefault(_hashable(result.get("tool_call_id")), []).append(place)
        for number, call in enumerate(calls):
            turn = dict(message) if not number else {"role": message.get("role"), "content": ""}
            single.append({**turn, "tool_calls": [call]})
            call_id = call.get("id") if isinstance(call, Mapping) else None
            own = rest.get(_hashable(call_id)) if call_id is not None else None
            if own:
                single.append(dict(results[own.pop(0)]))
        single += (dict(results[place]) for place in sorted(place for left in rest.values() for place in left))
    return single


def answered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """An answer of a space behind calls and results that a turn of the user follows: some templates refuse less."""
    told: list[dict[str, Any]] = []
    for message in messages:
        last = told[-1] if told else {}
        if message.get("role") == "user" and (last.get("role") == "tool" or last.get("tool_calls")):
            told.append({"role": "assistant", "content": " "})
        told.append(dict(message))
    return told


def _results_behind(messages: Sequence[Message], index: int) -> list[Message]:
    """The results right behind a turn that calls."""
    found: list[Message] = []
    for message in messages[index + 1 :]:
        if message.get("role") != "tool":
            break
        found.append(message)
    return found


def _hashable(call_id: Any) -> Any:
    return call_id if isinstance(call_id, str) else repr(call_id)


def _short_id(call: Message, count: int) -> str:
    """The id if it has Mistral's form, else one that is made of it."""
    given = call.get("id")
    if isinstance(given, str) and _SHORT_ID.fullmatch(given):
        return given
    return sha256(repr((given, count if given is None else None)).encode()).hexdigest()[:9]


def _kimi_id(call: Message, count: int) -> str:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return f"functions.{name}:{count}"
