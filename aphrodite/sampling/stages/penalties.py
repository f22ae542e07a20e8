"""Repetition penalty (CTRL, arXiv 1909.05858) and OpenAI's frequency and presence penalties.

Repetition counts prompt and answer; frequency and presence count the answer only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.row_table import RowTable

IN_PROMPT = 1 << 30  # flag of a token that occurs in the prompt; the bits below count it in the answer


class TokenCounts:
    """Which tokens a row's history holds, for the rows that have penalties.

    One int32 a token and row: `IN_PROMPT` plus the number of occurrences in the answer.
    """

    def __init__(self, info: SamplerInfo) -> None:
        self._info = info
        self._rows = RowTable(info.num_rows, info.vocab_size, torch.int32, info.device)
        self._one = torch.ones((), dtype=torch.int32, device=info.device)

    @property
    def table(self) -> torch.Tensor:
        """[slots, vocab]"""
        return self._rows.table

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        counts = self._rows.take(row).zero_()
        counts[torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64, device=self._info.device)] = IN_PROMPT

    def end(self, row: int) -> None:
        self._rows.release(row)

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        cells = self.slots(rows) * self._info.vocab_size + token_ids
        self.table.view(-1).index_add_(0, cells, self._one.expand(len(rows)))

    def rewind(self, row: int, position: int) -> None:
        num_prompt = int(self._info.num_prompt[row])
        history = self._info.token_ids[row, :position].long()
        counts = self._rows.line(row).zero_()
        counts[history[:num_prompt]] = IN_PROMPT
        counts.index_add_(0, history[num_prompt:], self._one.expand(position - num_prompt))

    def slots(self, rows: Sequence[int]) -> torch.Tensor:
        """Indices into `table` of rows: [R] int64."""
        return self._rows.slots(rows)

    def slot(self, row: int) -> int:
        return self._rows.slot(row)


def is_ranged(params: SamplingParams) -> bool:
    """Whether penalties depend on where in the history a token is; `ranged_penalties` then takes this stage's place."""
    return params.repetition_penalty_range > 0 or params.repetition_penalty_slope != 1


class Penalties(Stage):
    name = "penalties"
    rank = 200
    sampler_id = 6
    parameters = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    native = NativeOp.PENALTIES

    def is_neutral(self, params: SamplingParams) -> bool:
        return is_ranged(params) or self.changes_nothing(params)

    def changes_nothing(self, params: SamplingParams) -> bool:
        """Whether all three penalties have their neutral values."""
        return super().is_neutral(params)

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return params.repetition_penalty, params.frequency_penalty, params.presence_penalty

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
