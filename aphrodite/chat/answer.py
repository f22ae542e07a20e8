"""Which parser reads an answer: by the template's traits, or as the server was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aphrodite.chat.events import AnswerParser, Event, TextPiece
from aphrodite.chat.formats import ToolFormat
from aphrodite.chat.harmony import FINAL_OPENING, MARKS, HarmonyParser
from aphrodite.chat.reasoning import ReasoningParser, is_harmony
from aphrodite.chat.tools.parser import ToolParser, marks_of
from aphrodite.chat.traits import Reasoning
from aphrodite.sampling.table import ReasoningMarks


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one prompt are marked.

    Attributes:
        reasoning: marks around reasoning; None: it is text.
        is_open: the prompt ends inside reasoning.
        is_text: the prompt ends inside the answer's text, so that no reasoning begins it.
        tool_format: how calls of tools are written; None: there are none.
        schemas: the tools there are: JSON schemas of their parameters by name.
    """

    reasoning: Reasoning | None = None
    is_open: bool = False
    is_text: bool = False
    tool_format: ToolFormat | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether an answer is its text and nothing else."""
        reasoned = self.reasoning is not None and (self.is_harmony or not self.is_text)
        return not reasoned and self.tool_format is None

    @property
    def is_harmony(self) -> bool:
        """Whether an answer is made of harmony's messages."""
        return is_harmony(self.reasoning) or self.tool_format == "gpt_oss"

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that the parser has to see, be they special tokens or not."""
        if self.is_harmony:
            return MARKS
        around = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        return (*around, *(marks_of(self.tool_format) if self.tool_format is not None else ()))

    @property
    def marks_of_reasoning(self) -> ReasoningMarks | None:
        """What a sampler needs to know of reasoning in order to end it; None: there can be none."""
        if self.reasoning is None or (self.is_text and not self.is_harmony):
            return None
        last_end = FINAL_OPENING if self.is_harmony else ""
        return ReasoningMarks(self.reasoning.start, self.reasoning.end, self.is_open, last_end)

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        if self.is_harmony:
            inside: Literal["text", "reasoning"] | None = "text" if self.is_text else None
            if self.is_open:
                inside = "reasoning"
            return HarmonyParser(calls=self.tool_format == "gpt_oss", inside=inside)
        tools = ToolParser(self.tool_format, self.schemas) if self.tool_format is not None else None
        if self.reasoning is None or self.is_text:
            return tools or _Text()
        reasoning = ReasoningParser(self.reasoning, is_open=self.is_open)
        return reasoning if tools is None else _Chain(reasoning, tools)


def reasoning_format(reasoning: Reasoning | None, prompt: str, *, begun: str | None = None) -> AnswerFormat:
    """How the answers to a rendered prompt mark reasoning.

    Args:
        prompt: the text of the prompt, or of its last tokens.
        begun: the text that the answer goes on with; None: it begins behind the prompt.
    """
    if reasoning is None:
        return AnswerFormat()
    if begun is None:
        return AnswerFormat(reasoning, is_open=reasoning.is_open(prompt))
    is_open = begun.rfind(reasoning.start) > begun.rfind(reasoning.end)
    return AnswerFormat(reasoning, is_open=is_open, is_text=bool(begun) and not is_open)


def raw_marks(reasoning: Reasoning | None, prompt: str) -> ReasoningMarks | None:
    """`marks_of_reasoning` of the answers to a text that no template made; None: the model marks none."""
    if reasoning is None:
        return None
    is_open = prompt.rfind(reasoning.start) > prompt.rfind(reasoning.end)
    return AnswerFormat(reasoning, is_open=is_open).marks_of_reasoning


class _Text:
    """Nothing but text."""

    reasoning_chars = 0

    def feed(self, text: str) -> list[Event]:
        return [TextPiece(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class _Chain:
    """Reasoning first; calls in the text behind it."""

    def __init__(self, reasoning: ReasoningParser, tools: ToolParser) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def reasoning_chars(self) -> int:
        return self._reasoning.reasoning_chars

    def feed(self, text: str) -> list[Event]:
        return self._passed_on(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        return [*self._passed_on(self._reasoning.finish()), *self._tools.finish()]

    def _passed_on(self, events: list[Event]) -> list[Event]:
        passed: list[Event] = []
        for event in events:
            passed += self._tools.feed(event.text) if isinstance(event, TextPiece) else [event]
        return passed
