"""The memory of stages that steer by what was drawn: one number for each position of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aphrodite.sampling.stages.base import SamplerInfo, StageContext
from aphrodite.sampling.stages.row_table import RowTable


class _Expected(NamedTuple):
    """Rows about to be drawn, and what each token would make of their number: [R, vocab]."""

    rows: Sequence[int]
    positions: Sequence[int]
    values: torch.Tensor


class SelectionState:
    """A number for each position, made from the number and the token before it.

    All of them are kept (4 bytes a position), so a row that goes back finds the number of that time.
    """

    def __init__(self, info: SamplerInfo) -> None:
        self._numbers = RowTable(info.num_rows, info.token_ids.shape[1] + 1, torch.float32, info.device)
        self._expected: list[_Expected] = []

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        self._numbers.take(row)

    def end(self, row: int) -> None:
        self._numbers.release(row)
        self._expected.clear()  # rows end between two calls; what is left then is of a call that failed

    def rewind(self, row: int, position: int) -> None:
        """Numbers of later positions are written again before they are read."""

    def read(self, context: StageContext, num_prompts: Sequence[int], first: torch.Tensor) -> torch.Tensor:
        """[R, 1]: the numbers at the context's positions; `first` [R, 1] where a row's answer begins."""
        positions = torch.tensor((context.positions, num_prompts), dtype=torch.int64, device=first.device)
        known = self._numbers.table[self._numbers.slots(context.rows), positions[0]]
        return torch.where((positions[0] == positions[1])[:, None], first, known[:, None])

    def expect(self, context: StageContext, values: torch.Tensor) -> None:
        """The context's rows are about to be drawn; token t makes their next number `values[:, t]`."""
        self._expected.append(_Expected(context.rows, context.positions, values))

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        entries = {row: entry for entry, row in enumerate(rows)}
        for part in self._expected:
            chosen = token_ids[[entries[row] for row in part.rows]].long()
            after = torch.tensor(part.positions, dtype=torch.int64, device=token_ids.device) + 1
            self._numbers.table[self._numbers.slots(part.rows), after] = part.values.gather(1, chosen[:, None])[:, 0]
        self._expected.clear()
