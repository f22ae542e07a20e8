"""Readers of Gemma's calls: `call:f{city:<|"|>Paris<|"|>,days:3}`, texts between marks of their own, names bare.

Source: the chat templates of Google's Gemma 4, and of FunctionGemma, which marks texts with `<escape>`.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Final, NamedTuple

from aphrodite.chat.tools.json_text import MAX_DEPTH, MalformedCallError
from aphrodite.chat.tools.markup import Fields
from aphrodite.chat.tools.readers import (
    MAX_NAME,
    MAX_WORD,
    SPACE,
    Calls,
    Reader,
    after_space,
    checked_name,
    closing,
    json_string,
    next_char,
    one_of,
    until,
)

_ENDS: Final = ",}]"  # of a word


class _Value(NamedTuple):
    """A value: a word as it stands, anything else as JSON.

    Attributes:
        behind: the first character behind it that is not white space.
    """

    text: str
    is_word: bool
    behind: str

    def json(self) -> str:
        """The value as JSON."""
        if not self.is_word:
            return self.text
        try:
            return json.dumps(json.loads(self.text), allow_nan=False)
        except (ValueError, RecursionError):
            return json.dumps(self.text, ensure_ascii=False)


_ValueReader = Generator[None, str, _Value]


def gemma_call(calls: Calls, *, quote: str, end: str) -> Reader:
    """Behind the mark that opens a call.

    Args:
        quote: the mark around texts.
        end: the mark behind the call.
    """
    yield from one_of(("call:",), (yield from after_space()))
    fields = Fields(calls, checked_name((yield from until("{", MAX_NAME)).strip()))
    char = yield from after_space()
    while char != "}":
        key = yield from _key(char, quote)
        value = yield from _value((yield from after_space()), quote, 0)
        if value.is_word:
            fields.add(key, value.text)
        else:
            fields.add_json(key, value.text)
        char = value.behind
        if char == ",":
            char = yield from after_space()
        elif char != "}":
            raise MalformedCallError
    fields.end()
    return (yield from closing(end, calls))


def _key(first: str, quote: str) -> Reader:
    """A name up to its colon, in marks or without."""
    if not first:
        raise MalformedCallError
    if first == quote[0]:
        yield from one_of((quote,), first)
        key = yield from until(quote, MAX_NAME)
        yield from one_of((":",), (yield from after_space()))
        return key
    key = (first + (yield from until(":", MAX_NAME))).strip()
    if any(char in "{}[]," for char in key):
        raise MalformedCallError
    return key.strip('"')


def _value(first: str, quote: str, depth: int) -> _ValueReader:
    if not first or depth == MAX_DEPTH:
        raise MalformedCallError
    if first == quote[0]:
        yield from one_of((quote,), first)
        text = json.dumps((yield from until(quote)), ensure_ascii=False)
    elif first == '"':
        text = json.dumps((yield from json_string()), ensure_ascii=False)
    elif first == "{":
        text = yield from _object(quote, depth + 1)
    elif first == "[":
        text = yield from _array(quote, depth + 1)
    else:
        return (yield from _word(first))
    return _Value(text, False, (yield from after_space()))


def _object(quote: str, depth: int) -> Reader:
    pairs: list[str] = []
    char = yield from after_space()
    while char != "}":
        key = yield from _key(char, quote)
        value = yield from _value((yield from after_space()), quote, depth)
        pairs.append(f"{json.dumps(key, ensure_ascii=False)}: {value.json()}")
        char = value.behind
        if char == ",":
            char = yield from after_space()
        elif char != "}":
            raise MalformedCallError
    return "{" + ", ".join(pairs) + "}"


def _array(quote: str, depth: int) -> Reader:
    items: list[str] = []
    char = yield from after_space()
    while char != "]":
        value = yield from _value(char, quote, depth)
        items.append(value.json())
        char = value.behind
        if char == ",":
            char = yield from after_space()
        elif char != "]":
            raise MalformedCallError
    return "[" + ", ".join(items) + "]"


def _word(first: str) -> _ValueReader:
    """A number, a literal of JSON, or a text that the model left without marks."""
    word, char = "", first
    while char not in _ENDS:
        word += char
        if len(word) > MAX_WORD:
            raise MalformedCallError
        char = yield from next_char()
    if not word.strip(SPACE):
        raise MalformedCallError
    return _Value(word.strip(SPACE), True, char)
