"""Rows of the runner's tensors: a sequence owns one from its first step until nothing of it is in flight."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush


class RowPool:
    """Hands out rows, low ones first, which keeps a batch dense."""

    __slots__ = ("_ended", "_free", "num_rows")

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))  # a heap
        self._ended: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return heappop(self._free)

    def release(self, row: int) -> None:
        heappush(self._free, row)
        self._ended.append(row)

    def take_ended(self) -> list[int]:
        """Rows released since the last call, of which the next plan tells the runner."""
        ended, self._ended = self._ended, []
        return ended

    def check(self, owned: Iterable[int]) -> None:
        """Verify that every row is free or owned.

        Raises:
            RuntimeError: one is lost, or owned twice.
        """
        rows = [*owned, *self._free]
        if sorted(rows) != list(range(self.num_rows)):
            raise RuntimeError(f"rows are lost or owned twice: {rows}")
