"""A table on the device with a line for each row that needs one."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RowTable:
    """Rows get slots of a table that doubles when it is full, so memory follows the rows that need it.

    Attributes:
        table: [slots, width]; it may move when a row takes a slot.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.table = torch.zeros(0, width, dtype=dtype, device=device)
        self._num_rows = num_rows
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    def take(self, row: int) -> torch.Tensor:
        """Give `row` a slot; returns its line [width], with whatever it held before."""
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        return self.table[slot]

    def release(self, row: int) -> None:
        self._free.append(self._slots.pop(row))

    def line(self, row: int) -> torch.Tensor:
        """[width], a view."""
        return self.table[self._slots[row]]

    def slot(self, row: int) -> int:
        return self._slots[row]

    def slots(self, rows: Sequence[int]) -> torch.Tensor:
        """Indices into `table` of rows: [R] int64."""
        return torch.tensor([self._slots[row] for row in rows], dtype=torch.int64, device=self.table.device)

    def _grow(self) -> None:
        used, width = self.table.shape
        size = min(max(4, 2 * used), self._num_rows)
        grown = torch.zeros(size, width, dtype=self.table.dtype, device=self.table.device)
        grown[:used] = self.table
        self.table = grown
        self._free.extend(range(used, size))
