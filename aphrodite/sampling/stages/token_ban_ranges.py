"""token_ban_ranges: tokens that may not be chosen for some stretch of the answer (Aphrodite 0.6.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class TokenBanRanges(Stage):
    name = "token_ban_ranges"
    rank = 50
    parameters = ("token_ban_ranges",)
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return not params.token_ban_ranges

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> list[tuple[range, torch.Tensor]]:
        """Positions in the sequence, and the token ids [B] int64 banned there."""
        return [
            (
                range(info.num_prompt + entry.start, info.num_prompt + entry.start + entry.length),
                torch.tensor(entry.tokens, dtype=torch.int64, device=info.device),
            )
            for entry in params.token_ban_ranges
        ]

    def native_steps(self, values: Sequence[float], prepared: list[tuple[range, torch.Tensor]]) -> Sequence[NativeStep]:
        return [
            NativeStep(NativeOp.MASK, (positions.start, positions.stop), banned.tolist())
            for positions, banned in prepared
        ]

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, position, bans in zip(logits, context.positions, context.prepared, strict=True):
            for positions, banned in bans:
                if position in positions:
                    row.index_fill_(0, banned, -torch.inf)
        return logits


STAGE = TokenBanRanges()
