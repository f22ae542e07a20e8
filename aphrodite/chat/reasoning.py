"""Reasoning split from an answer: what stands between a start and an end mark before the text begins."""

from __future__ import annotations

from typing import Literal

from aphrodite.chat.events import Event, ReasoningPiece, TextPiece, held_suffix
from aphrodite.chat.formats import ReasoningName
from aphrodite.chat.traits import ANSWER_MARKS, REASONING_MARKS, Reasoning, TemplateTraits

ReasoningParserName = Literal["none"] | ReasoningName


def reasoning_marks(traits: TemplateTraits, chosen: ReasoningParserName | None) -> Reasoning | None:
    """How an answer marks reasoning, if at all: as `chosen`, else as its template does."""
    if chosen is None:
        return traits.reasoning
    if chosen == "none":
        return None
    start, end = REASONING_MARKS[chosen]
    return Reasoning(start, end, opened=False, switch=None, around=ANSWER_MARKS.get(chosen, ("", "")))


def is_harmony(reasoning: Reasoning | None) -> bool:
    """Whether reasoning is one of harmony's channels, which a parser of their own reads."""
    return reasoning is not None and reasoning.start == REASONING_MARKS["harmony"][0]


class ReasoningParser:
    """Splits off the reasoning that an answer begins with; marks after that are text like any other.

    White space next to the marks is left out, and so are marks around the text behind reasoning.

    Args:
        reasoning: the marks.
        is_open: the prompt ended inside reasoning.
    """

    def __init__(self, reasoning: Reasoning, *, is_open: bool) -> None:
        self._start, self._end = reasoning.start, reasoning.end
        self._is_open = is_open
        self._around = _Unwrapper(*reasoning.around)
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
            return _as_text(self._around.feed(text))
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
        if self._phase == "text" or (self._phase == "start" and not self._is_open):
            return _as_text(self._around.feed(rest) + self._around.finish())
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
            events += _as_text(self._around.feed(self._buffer))
            self._buffer = ""


def _as_text(text: str) -> list[Event]:
    return [TextPiece(text)] if text else []


class _Unwrapper:
    """A text without the marks that may stand around it, and without white space inside of them or at its end.

    Args:
        start: stands before the text; empty is nothing.
        end: stands behind the text; empty leaves every text as it is.
    """

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end = start, end
        self._phase: Literal["start", "inside", "behind", "outside"] = "start" if end else "outside"
        self._begun = False  # there was text inside
        self._buffer = ""

    def feed(self, text: str) -> str:
        if self._phase == "outside":
            return text
        self._buffer += text
        if self._phase == "start" and not self._enter():
            return ""
        told = self._inside() if self._phase == "inside" else ""
        if self._phase == "behind" and self._buffer.strip():
            self._phase = "outside"
        return told + self._rest() if self._phase == "outside" else told

    def finish(self) -> str:
        return self._rest() if self._phase != "behind" else ""

    def _enter(self) -> bool:
        """Take the start mark; False when more text is needed."""
        begun = self._buffer.lstrip()
        if begun.startswith(self._start):
            self._phase, self._buffer = "inside", begun[len(self._start) :]
            return True
        if self._start.startswith(begun):  # true of no text at all, too
            return False
        self._phase = "outside"
        return True

    def _inside(self) -> str:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        inner, mark, behind = self._buffer.partition(self._end)
        if mark:
            self._phase, self._buffer = "behind", behind
            return inner.rstrip()
        certain = inner[: len(inner) - held_suffix(inner, (self._end,))].rstrip()
        self._buffer = inner[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain

    def _rest(self) -> str:
        rest, self._buffer = self._buffer, ""
        return rest
