"""What a step's plan changes is taken over whole, for the steps to come build on all of it."""

from __future__ import annotations

from typing import Any

import pytest

from aphrodite.core.plan import RowRewind, RowStart, StepPlan
from aphrodite.runner.results import RowRequests
from aphrodite.sampling.params import SamplingParams


class FailingSampler:
    """Remembers what it is told; fails for some rows."""

    def __init__(self, bad_starts: set[int], bad_rewinds: set[int]) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._bad_starts, self._bad_rewinds = bad_starts, bad_rewinds

    def start(self, row: int, *arguments: Any) -> None:
        if row in self._bad_starts:
            raise MemoryError("no room")
        self.told.append(("start", row))

    def end(self, row: int) -> None:
        self.told.append(("end", row))

    def rewind(self, row: int, position: int) -> None:
        if row in self._bad_rewinds:
            raise MemoryError("no room")
        self.told.append(("rewind", row, position))

    def bar(self, row: int, position: int, tokens: list[int]) -> None:
        self.told.append(("bar", row, position, tuple(tokens)))

    def unbar(self, row: int, position: int) -> None:
        self.told.append(("unbar", row, position))


def test_rows_go_back_though_another_cannot_be_prepared() -> None:
    sampler = FailingSampler(bad_starts={0}, bad_rewinds={2})
    starts = [RowStart(row, f"request-{row}", [1, 2], SamplingParams(), 7) for row in (0, 1)]
    rewinds = [RowRewind(2, 5, [9]), RowRewind(3, 6, [9, 11]), RowRewind(4, 8, [])]
    with pytest.raises(MemoryError):
        RowRequests(sampler).apply(StepPlan(1, [], starts, [], rewinds))  # type: ignore[arg-type]
    assert sampler.told == [
        ("end", 0), ("start", 1), ("rewind", 3, 6), ("bar", 3, 6, (9, 11)), ("rewind", 4, 8), ("unbar", 4, 8),
    ]  # fmt: skip
