"""Readers of calls in the formats that models write them in.

A reader is a generator that is sent one character at a time, and an empty text at the answer's end. It tells a `Calls`
of what it has understood, returns the characters that it took and did not need, and raises `MalformedCallError` where
the text is no call. Reading by characters makes the result independent of how the text is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, Protocol

from aphrodite.chat.tools.json_text import JsonScanner, MalformedCallError

Reader = Generator[None, str, str]

_NAME_KEYS: Final = ("name", "tool_name", "function")
_ARGUMENT_KEYS: Final = ("arguments", "parameters")
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
MAX_NAME: Final = 128
MAX_WORD: Final = 65_536  # characters of one string, parameter or pythonic list
SPACE: Final = " \t\r\n"


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
        if not char or char not in SPACE:
            return char


def until(mark: str, limit: int = MAX_WORD) -> Reader:
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


def closing(mark: str, calls: Calls, begun: str | None = None) -> Reader:
    """The mark that ends calls, behind white space; models leave it out at times. `begun` was taken already."""
    space: list[str] = []
    taken = ""
    char = (yield) if begun is None else begun
    while char:
        if not taken and char in SPACE:
            space.append(char)
        else:
            taken += char
            if taken == mark:
                calls.settle()
                return ""
            if not mark.startswith(taken):
                return "".join(space) + taken
        char = yield
    return ""


def checked_name(name: str) -> str:
    if not TOOL_NAME.fullmatch(name):
        raise MalformedCallError
    return name


def encodable(text: str) -> str:
    """A text from escapes, in which halves of surrogate pairs may stand: whole pairs as one character, no half ones."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
        if len(raw) > MAX_WORD:
            raise MalformedCallError
    try:
        return encodable(str(json.loads(f'"{raw}"', strict=False)))
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


def json_calls(calls: Calls, first: str, end: str) -> Reader:
    """A list of calls or one behind another, `first` being their first character, and the mark that ends them."""
    if first == "[":
        yield from call_json(calls, first)
        return (yield from closing(end, calls))
    behind = first
    while behind == "{":
        yield from call_object(calls)
        behind = yield from after_space()
        if behind and behind in ",;":
            behind = yield from after_space()
    if behind == first:
        raise MalformedCallError
    return (yield from closing(end, calls, behind))


# --- formats -----------------------------------------------------------------------------------------------------


def mistral(calls: Calls) -> Reader:
    """Behind `[TOOL_CALLS]`: a list, or a name and its arguments, `[CALL_ID]` and `[ARGS]` perhaps between."""
    first = yield from after_space()
    if first in ("{", "["):
        return (yield from call_json(calls, first))
    name = first
    while (char := (yield from next_char())) not in "[{":
        name += char
        if len(name) > MAX_NAME:
            raise MalformedCallError
    checked_name(name.strip())
    if char == "[":
        if (yield from one_of(("[CALL_ID]", "[ARGS]"), char)) == "[CALL_ID]":
            yield from until("[ARGS]", MAX_NAME)
        char = yield from after_space()
    return (yield from named(calls, name.strip(), char))


def named(calls: Calls, name: str, first: str) -> Reader:
    """The arguments of a call whose name is known."""
    if first != "{":
        raise MalformedCallError
    calls.begin(name)
    yield from nested(first, calls)
    calls.settle()
    return ""


def behind_name(calls: Calls, *, name: str) -> Reader:
    """Behind a tool's name on the answer's first line (GLM 4)."""
    return (yield from named(calls, name, (yield from after_space())))


def section(calls: Calls, call: Callable[[Calls], Reader], opening: str, end: str) -> Reader:
    """Calls behind the mark that opens all of them: `opening` before each, `end` behind the last."""
    mark = yield from one_of((opening,), (yield from after_space()))
    while mark == opening:
        yield from call(calls)
        char = yield from after_space()
        if not char:
            return ""
        mark = yield from one_of((opening, end), char)
    calls.settle()
    return ""


def deepseek(calls: Calls) -> Reader:
    """Behind `<｜tool▁calls▁begin｜>`: calls, each in marks of its own."""
    return (yield from section(calls, deepseek_call, "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"))


def deepseek_call(calls: Calls) -> Reader:
    """Behind `<｜tool▁call▁begin｜>`: name, separator, JSON; or `function`, separator, name, fenced JSON (V3, R1)."""
    name = (yield from until("<｜tool▁sep｜>", MAX_NAME)).strip()
    first = yield from after_space()
    if first == "{":
        yield from named(calls, checked_name(name), first)
    else:
        name = checked_name((first + (yield from until("\n", MAX_NAME))).strip())
        first = yield from after_space()
        if first == "`":
            yield from one_of(("```json",), first)
            first = yield from after_space()
        yield from named(calls, name, first)
    end = "<｜tool▁call▁end｜>"
    if (yield from one_of(("```", end), (yield from after_space()))) == "```":
        yield from one_of((end,), (yield from after_space()))
    calls.settle()
    return ""


def kimi_k2(calls: Calls) -> Reader:
    """Behind `<|tool_calls_section_begin|>`: calls, each in marks of its own."""
    return (yield from section(calls, kimi_k2_call, "<|tool_call_begin|>", "<|tool_calls_section_end|>"))


def kimi_k2_call(calls: Calls) -> Reader:
    """Behind `<|tool_call_begin|>`: an id made of the name and the call's number, a mark, JSON."""
    call_id = (yield from until("<|tool_call_argument_begin|>", 2 * MAX_NAME)).strip()
    name = checked_name(re.sub(r":[0-9]+$", "", call_id).removeprefix("functions."))
    yield from named(calls, name, (yield from after_space()))
    yield from one_of(("<|tool_call_end|>",), (yield from after_space()))
    calls.settle()
    return ""


def apertus(calls: Calls) -> Reader:
    """Behind `<|tools_prefix|>`: a list of objects, each with a name and the arguments as its value."""
    yield from one_of(("[",), (yield from after_space()))
    behind = ","
    while behind == ",":
        yield from one_of(("{",), (yield from after_space()))
        yield from one_of(('"',), (yield from after_space()))
        name = checked_name((yield from json_string()))
        yield from one_of((":",), (yield from after_space()))
        yield from named(calls, name, (yield from after_space()))
        yield from one_of(("}",), (yield from after_space()))
        calls.settle()
        behind = yield from after_space()
    yield from one_of(("]",), behind)
    return (yield from closing("<|tools_suffix|>", calls))


def json_until(calls: Calls, *, end: str) -> Reader:
    """JSON behind a mark of any name, with the mark `end` behind it (Hunyuan, Nemotron, Phi 4 mini)."""
    return (yield from json_calls(calls, (yield from after_space()), end))


def internlm(calls: Calls) -> Reader:
    """Behind `<|action_start|>`: a mark for functions, JSON; Python for the interpreter has another mark."""
    yield from one_of(("<|plugin|>",), (yield from after_space()))
    return (yield from json_until(calls, end="<|action_end|>"))


def functools(calls: Calls) -> Reader:
    """Behind `functools[`, as Phi 4 mini is asked to write at times."""
    return (yield from call_list(calls, (yield from after_space())))


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
