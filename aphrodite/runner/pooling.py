"""Embeddings of prompts: hidden states pooled chunk by chunk, as steps bring them.

A prompt's embedding is the mean of its positions' hidden states, or the last one, or the first ("cls"). Sums are
float64, so that it does not depend on how the prompt was cut into steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.core.plan import Pooling, RowResult, RowStep, StepPlan

NON_FINITE_STATES = (
    "the model produced non-finite hidden states for this text; the weights may be damaged or overflow"
    " in this precision: try --dtype float32"
)


class HiddenLayout(NamedTuple):
    """Which token rows' hidden states a step wants, and which of them make up each prompt's part."""

    entries: np.ndarray  # [H] int32, token rows
    parts: Mapping[int, tuple[int, int]]  # step number -> slice of `entries`


class _Prompt:
    """A prompt on its way to an embedding."""

    __slots__ = ("length", "pooling", "total")

    def __init__(self, pooling: Pooling, length: int) -> None:
        self.pooling = pooling
        self.length = length
        self.total: np.ndarray | None = None  # [hidden_size] float64, of the steps that have come back

    def wanted(self, step: RowStep) -> range:
        """Which of the step's positions, counted from its first, take part."""
        if self.pooling == "mean":
            return range(step.count)
        if self.pooling == "cls":
            return range(1 if step.start == 0 else 0)
        return range(step.count - 1, step.count) if step.start + step.count == self.length else range(0)


class Pooler:
    """The prompts of all rows that are to be pooled."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}

    def apply(self, plan: StepPlan) -> None:
        """Take over which rows end and start."""
        for row in plan.ends:
            self._prompts.pop(row, None)
        for start in plan.starts:
            if start.pooling is not None:
                self._prompts[start.row] = _Prompt(start.pooling, len(start.prompt_token_ids))

    def layout(self, steps: Sequence[RowStep]) -> HiddenLayout | None:
        """What a step has to bring; None if it computes no prompt that is to be pooled."""
        if not self._prompts:
            return None
        entries: list[int] = []
        parts: dict[int, tuple[int, int]] = {}
        first_token = 0
        for number, step in enumerate(steps):
            prompt = self._prompts.get(step.row)
            if prompt is not None:
                wanted = prompt.wanted(step)
                parts[number] = (len(entries), len(entries) + len(wanted))
                entries.extend(first_token + offset for offset in wanted)
            first_token += step.count
        return HiddenLayout(np.array(entries, dtype=np.int32), parts) if parts else None

    def collect(self, steps: Sequence[RowStep], layout: HiddenLayout, sums: np.ndarray) -> dict[int, RowResult]:
        """Results of the steps that `layout` names.

        Args:
            sums: `[parts, hidden_size]` float64 of `part_sums`, on the host.
        """
        results = {}
        for number, part in zip(layout.parts, sums, strict=True):
            step = steps[number]
            prompt = self._prompts[step.row]
            # A prompt that begins anew was preempted.
            prompt.total = part if prompt.total is None or step.start == 0 else prompt.total + part
            results[number] = RowResult(step.row)
            if step.start + step.count == prompt.length:
                results[number] = _result(step.row, prompt.total / (prompt.length if prompt.pooling == "mean" else 1))
        return results


def _result(row: int, embedding: np.ndarray) -> RowResult:
    if not np.isfinite(embedding).all():
        return RowResult(row, error=NON_FINITE_STATES)
    return RowResult(row, embedding=embedding.astype(np.float32).tobytes())


def part_sums(hidden: torch.Tensor, layout: HiddenLayout) -> torch.Tensor:
    """`[H, hidden_size]` of a step -> `[parts, hidden_size]` float64."""
    return torch.stack([hidden[first:end].sum(dim=0, dtype=torch.float64) for first, end in layout.parts.values()])
