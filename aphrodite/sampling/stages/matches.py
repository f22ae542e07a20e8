"""How far each earlier position of a row's history repeats its end: what DRY and n-gram bans are made of.

For torch operations; on CPUs with the native library `kernels/cpu/native/history.cpp` finds it in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.sampling.stages.base import SamplerInfo, StageContext
from aphrodite.sampling.stages.row_table import RowTable


class MatchLengths:
    """Match lengths of rows' histories, brought up to date by one vector pass for each token.

    With n tokens known, length j is how many tokens up to and including j equal the last tokens up to n - 1. It
    grows by one if token j is the newest token, and is 0 otherwise. So the host need not know that token.
    """

    def __init__(self, info: SamplerInfo) -> None:
        self._info = info
        self._lengths = RowTable(info.num_rows, info.token_ids.shape[1], torch.int32, info.device)
        self._known: dict[int, int] = {}  # tokens that a row's lengths are for; 0: to be found anew
        self._prompts: dict[int, Sequence[int]] = {}

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        self._lengths.take(row)
        self._known[row] = 0
        self._prompts[row] = prompt_token_ids

    def end(self, row: int) -> None:
        self._lengths.release(row)
        del self._known[row], self._prompts[row]

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        """Tokens are read from the history when they are needed."""

    def rewind(self, row: int, position: int) -> None:
        self._known[row] = 0

    def at(self, context: StageContext) -> tuple[torch.Tensor, torch.Tensor]:
        """History and match lengths of the context's rows, both [R, longest history] int32.

        Columns past a row's last token but one have no meaning in the lengths, past the last in the history.
        """
        width = max(context.positions)
        slots = self._lengths.slots(context.rows)
        history = context.token_ids[context.index, :width]
        ends = torch.tensor(context.positions, dtype=torch.int64, device=history.device)
        newest = history.gather(1, ends[:, None] - 1)
        before = self._lengths.table[slots, :width]
        lengths = (history == newest).to(torch.int32)
        lengths[:, 1:] *= 1 + before[:, :-1]
        for entry, (row, position) in enumerate(zip(context.rows, context.positions, strict=True)):
            if self._known[row] != position - 1:
                found = suffix_lengths(self._tokens(row, position))
                lengths[entry, :position] = torch.tensor(found, dtype=torch.int32, device=history.device)
            self._known[row] = position
        self._lengths.table[slots, :width] = lengths
        return history, lengths

    def _tokens(self, row: int, count: int) -> Sequence[int]:
        """The row's first `count` tokens; waits for the device only where they are more than the prompt."""
        prompt = self._prompts[row]
        if count == len(prompt):
            return prompt
        tokens: list[int] = self._info.token_ids[row, :count].tolist()
        return tokens


def suffix_lengths(tokens: Sequence[int]) -> list[int]:
    """[n] For each j: how many tokens up to and including j equal the last ones; n for the last itself.

    The Z-algorithm (Gusfield, 1997) over the reversed tokens; linear time.
    """
    backwards = list(tokens)[::-1]
    count = len(backwards)
    lengths = [count] * count
    left = right = 0  # the match that reaches furthest
    for start in range(1, count):
        length = min(right - start, lengths[start - left]) if start < right else 0
        while start + length < count and backwards[length] == backwards[start + length]:
            length += 1
        lengths[start] = length
        if start + length > right:
            left, right = start, start + length
    return lengths[::-1]
