"""Readers of calls that are written as Python writes them: `[f(a=1, b="x"), g()]` (Llama 3.2 and 4, LFM 2, OLMo 3).

They are read, never run: names, keyword arguments and literals, those of JSON among them. Words that Python reserves
may name arguments, as in `f(from=1)`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Final, NamedTuple

from aphrodite.chat.tools.json_text import MAX_DEPTH, MalformedCallError
from aphrodite.chat.tools.readers import (
    MAX_NAME,
    MAX_WORD,
    SPACE,
    Calls,
    Reader,
    after_space,
    call_list,
    checked_name,
    closing,
    encodable,
    json_calls,
    next_char,
    one_of,
)

_WORDS: Final = {
    "True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null",
}  # fmt: skip
_ENDS: Final = ",:)]}" + SPACE  # of a literal without brackets or quotes
_ESCAPES: Final = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": "", "\\": "\\", "'": "'",
    '"': '"', "/": "/",
}  # fmt: skip
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}
_BRACKETS: Final = {"(": ")", "[": "]"}


class _Read(NamedTuple):
    """A text, and the first character behind it that is not white space."""

    text: str
    behind: str


class _Call(NamedTuple):
    """A call with its arguments in JSON."""

    name: str
    arguments: str


_ValueReader = Generator[None, str, _Read]


def bare_list(calls: Calls) -> Reader:
    """Behind a square bracket at the start of an answer: calls of known tools, in JSON or as Python writes them."""
    first = yield from after_space()
    if first == "{":
        return (yield from call_list(calls, first, known_only=True))
    found: list[_Call] = []

    def keep(call: _Call) -> None:
        if call.name not in calls.schemas:  # it is a list of anything else
            raise MalformedCallError
        found.append(call)

    yield from _list(first, keep)
    for call in found:
        _tell(calls, call)
    return ""


def lfm2(calls: Calls) -> Reader:
    """Behind `<|tool_call_start|>`."""
    return (yield from _marked(calls, "<|tool_call_end|>"))


def python_start(calls: Calls) -> Reader:
    """Behind `<|python_start|>` (Llama 4)."""
    return (yield from _marked(calls, "<|python_end|>"))


def olmo3(calls: Calls) -> Reader:
    """Behind `<function_calls>`: a call a line."""
    char = yield from after_space()
    while True:
        _tell(calls, (yield from _call(char)))
        char = yield from after_space()
        if not char:
            return ""
        if char == "<":
            break
    yield from one_of(("</function_calls>",), char)
    calls.settle()
    return ""


def _marked(calls: Calls, end: str) -> Reader:
    """A list as Python writes it, or JSON, and the mark behind it."""
    first = yield from after_space()
    if first == "{":
        return (yield from json_calls(calls, first, end))
    if first != "[":
        raise MalformedCallError
    first = yield from after_space()
    if first == "{":
        yield from call_list(calls, first)
    else:
        yield from _list(first, partial(_tell, calls))
    return (yield from closing(end, calls))


def _list(first: str, tell: Callable[[_Call], None]) -> Reader:
    """Calls up to a square bracket, `first` being the character behind the opening one."""
    while True:
        tell((yield from _call(first)))
        first = yield from after_space()
        if first == ",":
            first = yield from after_space()
        elif first != "]":
            raise MalformedCallError
        if first == "]":
            return ""


def _tell(calls: Calls, call: _Call) -> None:
    calls.begin(call.name)
    calls.arguments(call.arguments)
    calls.settle()


def _call(first: str) -> Generator[None, str, _Call]:
    """`f(a=1)`, of which `first` was taken."""
    name = yield from _word(first, "(")
    fields: list[str] = []
    char = yield from after_space()
    while char != ")":
        key = yield from _word(char, "=")
        value, char = yield from _value((yield from _present()), 0)
        fields.append(f"{json.dumps(key)}: {value}")
        if char == ",":
            char = yield from after_space()
        elif char != ")":
            raise MalformedCallError
    return _Call(checked_name(name), "{" + ", ".join(fields) + "}")


def _word(first: str, end: str) -> Reader:
    """A name up to `end`."""
    word, char = "", first
    while char != end:
        if not char or not (char.isalnum() or char in "_.-:/ ") or len(word) > MAX_NAME:
            raise MalformedCallError
        word += char
        char = yield from next_char()
    if not word.strip():
        raise MalformedCallError
    return word.strip()


def _present() -> Reader:
    """The first character that is not white space; there has to be one."""
    char = yield from after_space()
    if not char:
        raise MalformedCallError
    return char


def _value(first: str, depth: int) -> _ValueReader:
    """A literal as JSON."""
    if depth == MAX_DEPTH:
        raise MalformedCallError
    if first in "\"'":
        text, behind = yield from _string(first)
        return _Read(json.dumps(text, ensure_ascii=False), behind)
    if first in _BRACKETS:
        return (yield from _items(_BRACKETS[first], depth + 1))
    if first == "{":
        return (yield from _pairs(depth + 1))
    word, char = "", first
    while char not in _ENDS:
        word += char
        if len(word) > MAX_NAME:
            raise MalformedCallError
        char = yield from next_char()
    return _Read(_scalar(word), char if char not in SPACE else (yield from after_space()))


def _items(end: str, depth: int) -> _ValueReader:
    """A list or a tuple behind its bracket."""
    items: list[str] = []
    char = yield from _present()
    while char != end:
        item, char = yield from _value(char, depth)
        items.append(item)
        if char == ",":
            char = yield from _present()
        elif char != end:
            raise MalformedCallError
    return _Read("[" + ", ".join(items) + "]", (yield from after_space()))


def _pairs(depth: int) -> _ValueReader:
    """A dictionary behind its bracket."""
    pairs: list[str] = []
    char = yield from _present()
    while char != "}":
        if char not in "\"'":
            raise MalformedCallError
        key, char = yield from _string(char)
        if char != ":":
            raise MalformedCallError
        value, char = yield from _value((yield from _present()), depth)
        pairs.append(f"{json.dumps(key, ensure_ascii=False)}: {value}")
        if char == ",":
            char = yield from _present()
        elif char != "}":
            raise MalformedCallError
    return _Read("{" + ", ".join(pairs) + "}", (yield from after_space()))


def _string(quote: str) -> _ValueReader:
    """A text behind its opening quote, which may be one of three."""
    text, size, run = "", 1, 0
    char = yield from next_char()
    if char == quote:
        char = yield from next_char()
        if char != quote:
            return _Read("", char if char not in SPACE else (yield from after_space()))
        size = 3
        char = yield from next_char()
    while True:
        run = run + 1 if char == quote else 0
        text += (yield from _escaped()) if char == "\\" else char
        if run == size:
            return _Read(encodable(text[:-size]), (yield from after_space()))
        if len(text) > MAX_WORD:
            raise MalformedCallError
        char = yield from next_char()


def _escaped() -> Reader:
    """What stands behind a backslash."""
    char = yield from next_char()
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char not in _HEX_DIGITS:
        return "\\" + char
    digits = ""
    for _ in range(_HEX_DIGITS[char]):
        digits += yield from next_char()
    try:
        return chr(int(digits, 16))
    except (ValueError, OverflowError):
        raise MalformedCallError from None


def _scalar(word: str) -> str:
    """A word or a number as JSON."""
    if word in _WORDS:
        return _WORDS[word]
    try:
        return str(int(word))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        raise MalformedCallError from None
    if not math.isfinite(number):
        raise MalformedCallError
    return repr(number)
