"""What an answer consists of: text, reasoning and calls of tools, in the pieces in which they become certain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec


class TextPiece(NamedTuple):
    """A part of the answer's text."""

    text: str


class ReasoningPiece(NamedTuple):
    """A part of what the model thinks before it answers."""

    text: str


class CallStart(NamedTuple):
    """A call of the tool `name` begins; `number` counts the answer's calls from 0."""

    number: int
    name: str


class CallArguments(NamedTuple):
    """A part of a call's arguments, which are JSON when put together."""

    number: int
    text: str


Event = TextPiece | ReasoningPiece | CallStart | CallArguments


class AnswerParser(Protocol):
    """Takes an answer's text in any cuts; what it gives does not depend on them but in where its pieces end.

    Attributes:
        reasoning_chars: how many characters of the text, from its first one, belong to reasoning, marks included.
    """

    @property
    def reasoning_chars(self) -> int: ...

    def feed(self, text: str) -> list[Event]:
        """Take more of the text; returns what became certain."""

    def finish(self) -> list[Event]:
        """Take the end of the text; returns what was held back."""


@dataclass(slots=True)
class ToolCall:
    """A call as the model wrote it; `arguments` is JSON unless the model made a mistake or was cut off."""

    name: str
    arguments: str = ""

    def arguments_object(self) -> dict[str, Any] | None:
        """The arguments as the object that they describe; None: they are none."""
        try:
            value = msgspec.json.decode(self.arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


@dataclass(slots=True)
class ParsedAnswer:
    """An answer put together from its events."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> ParsedAnswer:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[tuple[str, list[str]]] = []
        for event in events:
            match event:
                case TextPiece(text):
                    texts.append(text)
                case ReasoningPiece(text):
                    thoughts.append(text)
                case CallStart(_, name):
                    calls.append((name, []))
                case CallArguments(number, text):
                    calls[number][1].append(text)
        whole = [ToolCall(name, "".join(pieces)) for name, pieces in calls]
        return cls("".join(texts), "".join(thoughts), whole)


def held_suffix(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = min(len(text), max((len(mark) - 1 for mark in marks), default=0))
    for size in range(longest, 0, -1):
        tail = text[-size:]
        if any(len(mark) > size and mark.startswith(tail) for mark in marks):
            return size
    return 0
