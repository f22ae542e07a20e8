"""JSON that arrives character by character: whether it is well formed so far, and where it ends."""

from __future__ import annotations

import re
from typing import Final, Literal

MAX_DEPTH: Final = 64
_SPACE: Final = " \t\r\n"
_SCALAR: Final = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MAX_SCALAR: Final = 400
_ESCAPES: Final = '"\\/bfnrtu'
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_Expected = Literal["value", "first_key", "key", "colon", "comma", "first_item", "end"]


class MalformedCallError(Exception):
    """The model's text is no call in the format that it began as."""


class JsonScanner:
    """Follows one JSON object or array.

    It is lenient in one point: control characters inside of strings, which models write, become escapes.

    Attributes:
        complete: the value has ended.
    """

    def __init__(self) -> None:
        self.complete = False
        self._open: list[str] = []  # brackets
        self._expected: _Expected = "value"
        self._in_string = False
        self._is_key = False
        self._escaped = 0  # characters that an escape still needs; -1: its letter
        self._scalar = ""

    def push(self, char: str) -> str:
        """Take a character; returns what it adds to well-formed JSON text.

        Raises:
            MalformedCallError: it cannot stand there.
        """
        if self._in_string:
            return self._string(char)
        if self._scalar:
            if char not in _SPACE + ",]}":
                self._scalar += char
                if len(self._scalar) > _MAX_SCALAR:
                    raise MalformedCallError
                return ""
            if not _SCALAR.fullmatch(self._scalar):
                raise MalformedCallError
            scalar, self._scalar = self._scalar, ""
            self._after_value()
            return scalar + self._between(char)
        return self._between(char)

    def _string(self, char: str) -> str:
        if self._escaped == -1:
            if char not in _ESCAPES:
                raise MalformedCallError
            self._escaped = 4 if char == "u" else 0
        elif self._escaped:
            if char not in _HEX:
                raise MalformedCallError
            self._escaped -= 1
        elif char == "\\":
            self._escaped = -1
        elif char == '"':
            self._in_string = False
            if self._is_key:
                self._expected = "colon"
            else:
                self._after_value()
        elif char < " ":
            return f"\\u{ord(char):04x}"
        return char

    def _between(self, char: str) -> str:
        if char in _SPACE:
            return char
        expected = self._expected
        if char == '"' and expected != "colon" and expected != "comma":
            self._in_string, self._is_key = True, expected in ("key", "first_key")
        elif expected == "colon" and char == ":":
            self._expected = "value"
        elif expected == "comma" and char == ",":
            self._expected = "key" if self._open[-1] == "{" else "value"
        elif char in "}]" and expected in ("comma", "first_key", "first_item"):
            if not self._open or self._open.pop() != ("{" if char == "}" else "["):
                raise MalformedCallError
            self._after_value()
        elif expected not in ("value", "first_item"):
            raise MalformedCallError
        elif char in "{[":
            if len(self._open) == MAX_DEPTH:
                raise MalformedCallError
            self._open.append(char)
            self._expected = "first_key" if char == "{" else "first_item"
        elif self._open and (char.isalnum() or char == "-"):
            self._scalar = char
            return ""
        else:
            raise MalformedCallError
        return char

    def _after_value(self) -> None:
        self._expected = "comma" if self._open else "end"
        self.complete = not self._open
