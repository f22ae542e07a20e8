"""Readers of calls in the formats that models write them in.

A reader is a generator that is sent one character at a time, and an empty text at the answer's end. It tells a `Calls`
of what it has understood, returns the characters that it took and did not need, and raises `MalformedCallError` where
the text is no call. Reading by characters makes the result independent of how the text is cut.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, Protocol

from aphrodite.chat.tools.json_text import MAX_DEPTH, JsonScanner, MalformedCallError

Reader = Generator[None, str, str]

_NAME_KEYS: Final = ("name", "tool_name", "function")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_MAX_NAME: Final = 128
_MAX_WORD: Final = 65_536  # characters of one string, parameter or pythonic list
_SPACE: Final = " \t\r\n"


class Calls(Protocol):
    """Takes the calls of one answer. `schemas` are the parameters of the tools there are, by name."""

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]: ...

    def begin(self, name: str) -> None:
        """A call begins."""

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""

    def settle(self) -> None:
        """What was read so far is part of calls, whatever follows."""


# --- characters --------------------------------------------------------------------------------------------------


def next_char() -> Reader:
    """The next character; there has to be one."""
    char = yield
    if not char:
        raise MalformedCallError
    return char


def after_space() -> Reader:
    """The first character that is not white space; nothing at the end."""
    while True:
        char = yield
        if not char or char not in _SPACE:
            return char


def until(mark: str, limit: int = _MAX_WORD) -> Reader:
    """The text before `mark`, which is taken as well."""
    text = ""
    while not text.endswith(mark):
        text += yield from next_char()
        if len(text) > limit + len(mark):
            raise MalformedCallError
    return text.removesuffix(mark)


def one_of(marks: Sequence[str], begun: str = "") -> Reader:
    """The mark that stands here, of which `begun` was taken already."""
    while begun not in marks:
        if not any(mark.startswith(begun) for mark in marks):
            raise MalformedCallError
        begun += yield from next_char()
    return begun


def closing(mark: str, calls: Calls) -> Reader:
    """The mark that ends calls, behind white space; models leave it out at times."""
    taken = ""
    while True:
        char = yield
        if not char:
            return ""
        taken += char
        rest = taken.lstrip(_SPACE)
        if rest == mark:
            calls.settle()
            return ""
        if not mark.startswith(rest):
            return taken


def checked_name(name: str) -> str:
    if not TOOL_NAME.fullmatch(name):
        raise MalformedCallError
    return name


# --- JSON --------------------------------------------------------------------------------------------------------


def json_string() -> Reader:
    """A string's value, its opening quote taken."""
    raw = ""
    while True:
        char = yield from next_char()
        if char == '"':
            break
        raw += char
        if char == "\\":
            raw += yield from next_char()
        if len(raw) > _MAX_WORD:
            raise MalformedCallError
    try:
        return str(json.loads(f'"{raw}"', strict=False))
    except ValueError:
        raise MalformedCallError from None


def nested(first: str, calls: Calls | None = None) -> Reader:
    """An object or array that begins with `first`, as text; told to `calls` as it comes if there are any."""
    scanner = JsonScanner()
    text = scanner.push(first)
    if calls is not None:
        calls.arguments(text)
    while not scanner.complete:
        piece = scanner.push((yield from next_char()))
        if calls is None:
            text += piece
        elif piece:
            calls.arguments(piece)
    return text


def other_value(first: str) -> Reader:
    """A value that means nothing here; returns the character behind it that is not white space."""
    if first in "{[":
        yield from nested(first)
    elif first == '"':
        yield from json_string()
    else:
        while first not in ",}":
            first = yield from next_char()
        return first
    return (yield from after_space())


def arguments_text(first: str) -> Reader:
    """Arguments that cannot be told yet, or are written as a string, or as null."""
    if first == "{":
        return (yield from nested(first))
    if first == '"':
        text = yield from json_string()
        try:
            whole = isinstance(json.loads(text or "{}"), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise MalformedCallError
        return text or "{}"
    yield from one_of(("null",), first)
    return "{}"


def call_object(calls: Calls, *, known_only: bool = False) -> Reader:
    """`{"name": …, "arguments": {…}}` behind its bracket, keys in any order and under their usual names.

    Args:
        known_only: a name that no tool has makes it no call, for text without marks may be JSON of another kind.
    """
    name, held, told = "", "", False
    char = yield from after_space()
    while char != "}":
        if char != '"':
            raise MalformedCallError
        key = yield from json_string()
        if (yield from after_space()) != ":":
            raise MalformedCallError
        char = yield from after_space()
        if not char:
            raise MalformedCallError
        if key in _NAME_KEYS and char == '"' and not name and not told:
            name = checked_name((yield from json_string()))
            if known_only and name not in calls.schemas:
                raise MalformedCallError
            char = yield from after_space()
        elif key in _ARGUMENT_KEYS and not held and not told:
            if name and char == "{":
                calls.begin(name)
                yield from nested(char, calls)
                told = True
            else:
                held = yield from arguments_text(char)
            char = yield from after_space()
        elif key == "function" and char == "{" and not name and not told:
            yield from call_object(calls, known_only=known_only)
            told = True
            char = yield from after_space()
        else:
            char = yield from other_value(char)
        if char == ",":
            char = yield from after_space()
        elif char != "}":
            raise MalformedCallError
    if not told:
        calls.begin(checked_name(name))
        calls.arguments(held or "{}")
    calls.settle()
    return ""


def call_list(calls: Calls, first: str, *, known_only: bool = False) -> Reader:
    """Calls in an array whose bracket was taken, `first` being the character after it."""
    while True:
        if first != "{":
            raise MalformedCallError
        yield from call_object(calls, known_only=known_only)
        after = yield from after_space()
        if after == "]":
            calls.settle()
            return ""
        if after != ",":
            raise MalformedCallError
        first = yield from after_space()


def call_json(calls: Calls, first: str, *, known_only: bool = False) -> Reader:
    """One call, or a list of them."""
    if first == "{":
        return (yield from call_object(calls, known_only=known_only))
    if first != "[":
        raise MalformedCallError
    char = yield from after_space()
    return (yield from call_list(calls, char, known_only=known_only))


# --- formats -----------------------------------------------------------------------------------------------------


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
    name = checked_name((yield from until(">", _MAX_NAME)))
    first = yield from after_space()
    if first == "{":
        yield from _named(calls, name, first)
        return (yield from closing("</function>", calls))
    fields = _Fields(calls, name)
    mark = yield from one_of(("<parameter=", "</function>"), first)
    while mark != "</function>":
        key = yield from until(">", _MAX_NAME)
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
        if len(name) > _MAX_NAME:
            raise MalformedCallError
    fields = _Fields(calls, checked_name(name.strip()))
    marks = ("<arg_key>", "</tool_call>")
    mark = yield from one_of(marks, char if char == "<" else (yield from after_space()))
    while mark != "</tool_call>":
        key = yield from until("</arg_key>", _MAX_NAME)
        yield from one_of(("<arg_value>",), (yield from after_space()))
        value = yield from until("</arg_value>")
        fields.add(key.strip(), value)
        mark = yield from one_of(marks, (yield from after_space()))
    fields.end()
    return ""


class _Fields:
    """Arguments that come as texts, one by one; what each is, the tool's schema says."""

    def __init__(self, calls: Calls, name: str) -> None:
        self._calls = calls
        self._name = name
        properties = calls.schemas.get(name, {}).get("properties")
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._count = 0

    def add(self, key: str, value: str) -> None:
        if not self._count:
            self._calls.begin(self._name)
        opening = ", " if self._count else "{"
        self._count += 1
        self._calls.arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {self._json(key, value)}")

    def end(self) -> None:
        if not self._count:
            self._calls.begin(self._name)
        self._calls.arguments("}" if self._count else "{}")
        self._calls.settle()

    def _json(self, key: str, value: str) -> str:
        schema = self._properties.get(key)
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if kind != "string":
            try:
                return json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                pass  # a text
        return json.dumps(value, ensure_ascii=False)


def mistral(calls: Calls) -> Reader:
    """Behind `[TOOL_CALLS]`: a list, or a name and its arguments, `[CALL_ID]` and `[ARGS]` perhaps between."""
    first = yield from after_space()
    if first in ("{", "["):
        return (yield from call_json(calls, first))
    name = first
    while (char := (yield from next_char())) not in "[{":
        name += char
        if len(name) > _MAX_NAME:
            raise MalformedCallError
    checked_name(name.strip())
    if char == "[":
        if (yield from one_of(("[CALL_ID]", "[ARGS]"), char)) == "[CALL_ID]":
            yield from until("[ARGS]", _MAX_NAME)
        char = yield from after_space()
    return (yield from _named(calls, name.strip(), char))


def _named(calls: Calls, name: str, first: str) -> Reader:
    """The arguments of a call whose name is known."""
    if first != "{":
        raise MalformedCallError
    calls.begin(name)
    yield from nested(first, calls)
    calls.settle()
    return ""


def behind_name(calls: Calls, *, name: str) -> Reader:
    """Behind a tool's name on the answer's first line (GLM 4)."""
    return (yield from _named(calls, name, (yield from after_space())))


def deepseek(calls: Calls) -> Reader:
    """Behind `<｜tool▁calls▁begin｜>`: calls, each in marks of its own."""
    marks = ("<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>")
    mark = yield from one_of(marks, (yield from after_space()))
    while mark == marks[0]:
        yield from deepseek_call(calls)
        char = yield from after_space()
        if not char:
            return ""
        mark = yield from one_of(marks, char)
    calls.settle()
    return ""


def deepseek_call(calls: Calls) -> Reader:
    """Behind `<｜tool▁call▁begin｜>`: name, separator, JSON; or `function`, separator, name, fenced JSON (V3, R1)."""
    name = (yield from until("<｜tool▁sep｜>", _MAX_NAME)).strip()
    first = yield from after_space()
    if first == "{":
        yield from _named(calls, checked_name(name), first)
    else:
        name = checked_name((first + (yield from until("\n", _MAX_NAME))).strip())
        first = yield from after_space()
        if first == "`":
            yield from one_of(("```json",), first)
            first = yield from after_space()
        yield from _named(calls, name, first)
    end = "<｜tool▁call▁end｜>"
    if (yield from one_of(("```", end), (yield from after_space()))) == "```":
        yield from one_of((end,), (yield from after_space()))
    calls.settle()
    return ""


def listed(calls: Calls) -> Reader:
    """A list or an object with nothing at its end (Granite)."""
    return (yield from call_json(calls, (yield from after_space())))


def command_r_action(calls: Calls) -> Reader:
    """Behind `<|START_ACTION|>` (Command R7B and later)."""
    yield from listed(calls)
    return (yield from closing("<|END_ACTION|>", calls))


def command_r_fenced(calls: Calls) -> Reader:
    """Behind `Action:` (Command R and R+)."""
    first = yield from after_space()
    if first == "`":
        yield from one_of(("```json",), first)
        first = yield from after_space()
    yield from call_json(calls, first)
    return (yield from closing("```", calls))


def fenced(calls: Calls) -> Reader:
    """Behind a fence of JSON at the start of an answer, where only the tools there are count."""
    yield from call_json(calls, (yield from after_space()), known_only=True)
    return (yield from closing("```", calls))


def bare_object(calls: Calls) -> Reader:
    """Behind a bracket at the start of an answer: a call of a known tool, and further ones behind semicolons."""
    while True:
        yield from call_object(calls, known_only=True)
        char = yield from after_space()
        if char != ";":
            return char
        if (yield from after_space()) != "{":
            raise MalformedCallError


def python_tag(calls: Calls) -> Reader:
    """Behind `<|python_tag|>` (Llama 3): calls as objects behind each other."""
    if (yield from after_space()) != "{":
        raise MalformedCallError
    return (yield from bare_object(calls))


def bare_list(calls: Calls) -> Reader:
    """Behind a square bracket at the start of an answer: calls in JSON, or as Python writes them."""
    first = yield from after_space()
    if first == "{":
        return (yield from call_list(calls, first, known_only=True))
    return (yield from _pythonic(calls, first))


def _pythonic(calls: Calls, first: str) -> Reader:
    """`[f(a=1), g(b="x")]` behind its bracket."""
    text, char = "[", first
    while char != "(":  # a list of anything else is told from calls early
        if not (char.isalnum() or char in "_.") or len(text) > _MAX_NAME:
            raise MalformedCallError
        text += char
        char = yield from next_char()
    depth, quote = 1, ""
    while True:
        text += char
        if len(text) > _MAX_WORD:
            raise MalformedCallError
        if quote:
            if char == "\\":
                text += yield from next_char()
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if depth > MAX_DEPTH:
                raise MalformedCallError
            if not depth:
                break
        char = yield from next_char()
    for name, arguments in _python_calls(text, calls.schemas):
        calls.begin(name)
        calls.arguments(arguments)
    calls.settle()
    return ""


def _python_calls(text: str, known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The calls in a Python list, their arguments as JSON; it is read, never run."""
    try:
        expression = ast.parse(text, mode="eval").body
        if not isinstance(expression, ast.List) or not expression.elts:
            raise MalformedCallError
        found = []
        for call in expression.elts:
            if not isinstance(call, ast.Call) or call.args:
                raise MalformedCallError
            name = ast.unparse(call.func)
            if name not in known or any(keyword.arg is None for keyword in call.keywords):
                raise MalformedCallError
            values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            found.append((name, json.dumps(values, ensure_ascii=False, allow_nan=False)))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise MalformedCallError from None
    return found
