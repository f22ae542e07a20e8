"""Which parser reads an answer: by the template's traits, or as the server was told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aphrodite.chat.events import AnswerParser
from aphrodite.chat.harmony import MARKS, HarmonyParser
from aphrodite.chat.reasoning import ReasoningParser, is_harmony
from aphrodite.chat.traits import Reasoning


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one prompt are marked.

    Attributes:
        reasoning: marks around reasoning; None: it is text.
        is_open: the prompt ends inside reasoning.
        is_text: the prompt ends inside the answer's text, so that no reasoning begins it.
    """

    reasoning: Reasoning | None = None
    is_open: bool = False
    is_text: bool = False

    @property
    def plain(self) -> bool:
        """Whether an answer is its text and nothing else."""
        return self.reasoning is None or (self.is_text and not is_harmony(self.reasoning))

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that the parser has to see, be they special tokens or not."""
        if is_harmony(self.reasoning):
            return MARKS
        return () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)

    def parser(self) -> AnswerParser:
        """A parser of one answer."""
        if is_harmony(self.reasoning):
            inside: Literal["text", "reasoning"] | None = "text" if self.is_text else None
            if self.is_open:
                inside = "reasoning"
            return HarmonyParser(calls=False, inside=inside)
        stages: list[AnswerParser] = []
        if self.reasoning is not None and not self.is_text:
            stages.append(ReasoningParser(self.reasoning, is_open=self.is_open))
        return stages[0]
