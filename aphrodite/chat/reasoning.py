"""Reasoning split from an answer: what stands between a start and an end mark before the text begins."""

from __future__ import annotations

from typing import Literal

from aphrodite.chat.events import Event, ReasoningPiece, TextPiece, held_suffix
from aphrodite.chat.formats import ReasoningName
from aphrodite.chat.traits import REASONING_MARKS, Reasoning, TemplateTraits

ReasoningParserName = Literal["none"] | ReasoningName


def reasoning_marks(traits: TemplateTraits, chosen: ReasoningParserName | None) -> Reasoning | None:
    """How an answer marks reasoning, if at all: as `chosen`, else as its template does."""
    if chosen is None:
        return traits.reasoning
    if chosen == "none":
        return None
    start, end = REASONING_MARKS[chosen]
    return Reasoning(start, end, opened=False, switch=None)


def is_harmony(reasoning: Reasoning | None) -> bool:
    """Whether reasoning is one of harmony's channels, which a parser of their own reads."""
    return reasoning is not None and reasoning.start == REASONING_MARKS["harmony"][0]


class ReasoningParser:
    """Splits off the reasoning that an answer begins with; marks after that are text like any other.

    White space next to the marks is left out.

    Args:
        reasoning: the marks.
        is_open: the prompt ended inside reasoning.
    """

    def __init__(self, reasoning: Reasoning, *, is_open: bool) -> None:
        self._start, self._end = reasoning.start, reasoning.end
        self._is_open = is_open
        self._phase: Literal["start", "reasoning", "between", "text"] = "start"
        self._begun = False  # reasoning has text
        self._buffer = ""
        self._taken = 0  # characters taken in all
        self._ended_at: int | None = None

    @property
    def reasoning_chars(self) -> int:
        if self._ended_at is not None:
            return self._ended_at
        thinking = self._phase == "reasoning" or (self._is_open and self._phase == "start")
        return self._taken if thinking else 0

    def feed(self, text: str) -> list[Event]:
        self._taken += len(text)
        if self._phase == "text":
            return [TextPiece(text)] if text else []
        self._buffer += text
        events: list[Event] = []
        if self._phase == "start":
            self._look_for_start()
        if self._phase == "reasoning":
            self._think(events)
        if self._phase == "between":
            self._skip_space()
        self._speak(events)
        return events

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._phase == "start" and not self._is_open:
            return [TextPiece(rest)] if rest else []
        rest = rest.rstrip() if self._begun else rest.strip()
        return [ReasoningPiece(rest)] if rest and self._phase in ("start", "reasoning") else []

    def _look_for_start(self) -> None:
        begun = self._buffer.lstrip()
        if begun.startswith(self._start):
            self._buffer = begun[len(self._start) :]
            self._phase = "reasoning"
        elif not self._start.startswith(begun):  # true of no text at all, too
            self._phase = "reasoning" if self._is_open else "text"

    def _think(self, events: list[Event]) -> None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        thought, mark, rest = self._buffer.partition(self._end)
        if mark:
            self._ended_at = self._taken - len(rest)
            self._phase = "between"
            thought = thought.rstrip()
        else:
            thought = thought[: len(thought) - held_suffix(thought, (self._end,))].rstrip()
            rest = self._buffer[len(thought) :]
        self._buffer = rest
        if thought:
            self._begun = True
            events.append(ReasoningPiece(thought))

    def _skip_space(self) -> None:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._phase = "text"

    def _speak(self, events: list[Event]) -> None:
        if self._phase == "text" and self._buffer:
            events.append(TextPiece(self._buffer))
            self._buffer = ""
