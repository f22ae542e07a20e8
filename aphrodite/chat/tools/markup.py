"""Readers of calls in markup: tags around names and values, which are texts (Qwen Coder, GLM, MiniMax, DeepSeek V3.2).

What a value is, the tool's schema says, where the format does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from aphrodite.chat.tools.json_text import MalformedCallError
from aphrodite.chat.tools.readers import (
    MAX_NAME,
    Calls,
    Reader,
    after_space,
    call_json,
    checked_name,
    closing,
    encodable,
    named,
    next_char,
    one_of,
    section,
    until,
)

# What stands in the tags of a call and of an argument behind their names.
_CALL_TAG: Final = re.compile(r"""\s*name=(["']?)([^"'<>]+)\1\s*""")
_ARGUMENT_TAG: Final = re.compile(r"""\s*name=(["']?)([^"'<>]+)\1(?:\s+string=(["']?)(true|false)\3)?\s*""")
_CHARACTER_DATA: Final = re.compile(r"\s*<!\[CDATA\[(.*)\]\]>\s*", re.DOTALL)


def tagged(calls: Calls) -> Reader:
    """Behind `<tool_call>`: JSON (Hermes, Qwen), `<function=…>` (Qwen Coder), or a name and `<arg_key>` (GLM)."""
    first = yield from after_space()
    if first in ("{", "["):
        yield from call_json(calls, first)
        return (yield from closing("</tool_call>", calls))
    if first == "<":
        yield from one_of(("<function=",), first)
        yield from function_tag(calls)
        return (yield from closing("</tool_call>", calls))
    return (yield from _glm(calls, first))


def coder_function(calls: Calls) -> Reader:
    """Behind a `<function=` that no `<tool_call>` came before, as Qwen Coder writes at times."""
    yield from function_tag(calls)
    return (yield from closing("</tool_call>", calls))


def function_tag(calls: Calls) -> Reader:
    """Behind `<function=`: a name, then JSON (Llama), or parameters in tags (Qwen Coder)."""
    name = checked_name((yield from until(">", MAX_NAME)))
    first = yield from after_space()
    if first == "{":
        yield from named(calls, name, first)
        return (yield from closing("</function>", calls))
    fields = Fields(calls, name)
    mark = yield from one_of(("<parameter=", "</function>"), first)
    while mark != "</function>":
        key = yield from until(">", MAX_NAME)
        value = yield from until("</parameter>")
        fields.add(key, value.removeprefix("\n").removesuffix("\n"))
        mark = yield from one_of(("<parameter=", "</function>"), (yield from after_space()))
    fields.end()
    return ""


def _glm(calls: Calls, first: str) -> Reader:
    """A name on a line, then keys and values in tags; `first` is the name's first character."""
    name = first
    while (char := (yield from next_char())) not in "<\n":
        name += char
        if len(name) > MAX_NAME:
            raise MalformedCallError
    fields = Fields(calls, checked_name(name.strip()))
    marks = ("<arg_key>", "</tool_call>")
    mark = yield from one_of(marks, char if char == "<" else (yield from after_space()))
    while mark != "</tool_call>":
        key = yield from until("</arg_key>", MAX_NAME)
        yield from one_of(("<arg_value>",), (yield from after_space()))
        value = yield from until("</arg_value>")
        fields.add(key.strip(), value)
        mark = yield from one_of(marks, (yield from after_space()))
    fields.end()
    return ""


def seed_oss(calls: Calls) -> Reader:
    """Behind `<seed:tool_call>`: a function with parameters in tags."""
    yield from one_of(("<function=",), (yield from after_space()))
    yield from function_tag(calls)
    return (yield from closing("</seed:tool_call>", calls))


def invocations(calls: Calls, *, prefix: str, end: str) -> Reader:
    """Behind the mark that opens calls: each in `<invoke name="f">`, its arguments in `<parameter name="a">`.

    Args:
        prefix: what stands before the names of tags.
        end: the mark behind the last call.
    """
    return (yield from section(calls, partial(_invocation, prefix=prefix), f"<{prefix}invoke", end))


def step3(calls: Calls) -> Reader:
    """Behind `<｜tool_calls_begin｜>`: calls in tags of that kind, each in marks of its own."""
    return (yield from section(calls, _step3_call, "<｜tool_call_begin｜>", "<｜tool_calls_end｜>"))


def _step3_call(calls: Calls) -> Reader:
    if (yield from until("<｜tool_sep｜>", MAX_NAME)).strip() != "function":
        raise MalformedCallError
    yield from one_of(("<steptml:invoke",), (yield from after_space()))
    yield from _invocation(calls, prefix="steptml:")
    return (yield from one_of(("<｜tool_call_end｜>",), (yield from after_space())))


def minicpm5(calls: Calls) -> Reader:
    """Behind `<function name=`: a name, and arguments in tags, those of several lines as character data."""
    yield from _call_tag(calls, "name=", "param", "</function>")
    return ""


def _invocation(calls: Calls, *, prefix: str) -> Reader:
    """Behind `<invoke`: a name, and arguments in tags."""
    return (yield from _call_tag(calls, "", f"{prefix}parameter", f"</{prefix}invoke>"))


def _call_tag(calls: Calls, begun: str, argument: str, end: str) -> Reader:
    """A name in a tag of which `begun` was taken, and arguments in tags up to `end`."""
    called = _CALL_TAG.fullmatch(begun + (yield from until(">", 2 * MAX_NAME)))
    if called is None:
        raise MalformedCallError
    fields = Fields(calls, checked_name(called.group(2)))
    marks = (f"<{argument}", end)
    mark = yield from one_of(marks, (yield from after_space()))
    while mark == marks[0]:
        tag = _ARGUMENT_TAG.fullmatch((yield from until(">", 2 * MAX_NAME)))
        if tag is None:
            raise MalformedCallError
        value = yield from until(f"</{argument}>")
        if tag.group(4) is None:
            fields.add(tag.group(2), _unwrapped(value))
        else:
            fields.add_json(tag.group(2), json.dumps(value, ensure_ascii=False) if tag.group(4) == "true" else value)
        mark = yield from one_of(marks, (yield from after_space()))
    fields.end()
    return ""


def _unwrapped(value: str) -> str:
    """A value without the line ends next to its tags, or what it marks as character data."""
    data = _CHARACTER_DATA.fullmatch(value)
    return value.removeprefix("\n").removesuffix("\n") if data is None else data.group(1)


class Fields:
    """Arguments that come one by one."""

    def __init__(self, calls: Calls, name: str) -> None:
        self._calls = calls
        self._name = name
        properties = calls.schemas.get(name, {}).get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._count = 0

    def add(self, key: str, value: str) -> None:
        """An argument in words: a text, or JSON where the tool's schema asks for something else."""
        kinds = _kinds(self._properties.get(key))
        if kinds == {"string"} or (kinds == {"string", "null"} and value.strip() != "null"):
            value = json.dumps(value, ensure_ascii=False)
        self.add_json(key, value)

    def add_json(self, key: str, value: str) -> None:
        """An argument as JSON; what is none is a text."""
        if not self._count:
            self._calls.begin(self._name)
        opening = ", " if self._count else "{"
        self._count += 1
        self._calls.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {_json(value)}")

    def end(self) -> None:
        if not self._count:
            self._calls.begin(self._name)
        self._calls.arguments("}" if self._count else "{}")
        self._calls.settle()


def _json(value: str) -> str:
    """A value as JSON in one form, be it that it is JSON or a text."""
    try:
        return encodable(json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)


def _kinds(schema: Any) -> set[str]:
    """The types of a schema's values, those of its alternatives included."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    kinds = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
    for name in ("anyOf", "oneOf"):
        alternatives = schema.get(name)
        for alternative in alternatives if isinstance(alternatives, list) else ():
            kinds |= _kinds(alternative)
    choices = schema.get("enum")
    if not kinds and isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
        return {"string"}
    return kinds
