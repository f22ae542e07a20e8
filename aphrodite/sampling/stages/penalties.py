"""Repetition penalty (CTRL, arXiv 1909.05858) and OpenAI's frequency and presence penalties.

Repetition counts prompt and answer; frequency and presence count the answer only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.sampling.stages.base import SamplerInfo, Stage, StageContext

IN_PROMPT = 1 << 30  # flag of a token that occurs in the prompt; the bits below count it in the answer


class TokenCounts:
    """Which tokens a row's history holds, for the rows that have penalties.

    One int32 a token and row: `IN_PROMPT` plus the number of occurrences in the answer. Rows get slots
    of a table that doubles when it is full, so memory follows the rows that need it.
    """

    def __init__(self, info: SamplerInfo) -> None:
        self._info = info
        self.table = torch.zeros(0, info.vocab_size, dtype=torch.int32, device=info.device)
        self._one = torch.ones((), dtype=torch.int32, device=info.device)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        if not self._free:
            self._grow()
        slot = self._slots[row] = self._free.pop()
        counts = self.table[slot].zero_()
        counts[torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64, device=self._info.device)] = IN_PROMPT

    def end(self, row: int) -> None:
        self._free.append(self._slots.pop(row))

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        cells = self.slots(rows) * self._info.vocab_size + token_ids
        self.table.view(-1).index_add_(0, cells, self._one.expand(len(rows)))

    def rewind(self, row: int, position: int) -> None:
        num_prompt = int(self._info.num_prompt[row])
        history = self._info.token_ids[row, :position].long()
        counts = self.table[self._slots[row]].zero_()
        counts[history[:num_prompt]] = IN_PROMPT
        counts.index_add_(0, history[num_prompt:], self._one.expand(position - num_prompt))

    def slots(self, rows: Sequence[int]) -> torch.Tensor:
        """Indices into `table` of rows: [R] int64."""
        return torch.tensor([self._slots[row] for row in rows], dtype=torch.int64, device=self._info.device)

    def slot(self, row: int) -> int:
        return self._slots[row]

    def _grow(self) -> None:
        used = self.table.shape[0]
        size = min(max(4, 2 * used), self._info.num_rows)
        grown = torch.zeros(size, self._info.vocab_size, dtype=torch.int32, device=self._info.device)
        grown[:used] = self.table
        self.table = grown
        self._free.extend(range(used, size))


class Penalties(Stage):
    name = "penalties"
    rank = 200
    sampler_id = 6
    parameters = ("repetition_penalty", "frequency_penalty", "presence_penalty")

    def new_state(self, info: SamplerInfo) -> TokenCounts:
        return TokenCounts(info)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        repetition, frequency, presence = values[:, :, None].unbind(1)
        state: TokenCounts = context.state
        history = state.table[state.slots(context.rows)]
        count = history & (IN_PROMPT - 1)
        penalized = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(history != 0, penalized, logits)
        return logits - frequency * count - presence * (count > 0)


STAGE = Penalties()
