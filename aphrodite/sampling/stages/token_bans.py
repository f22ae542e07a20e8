"""custom_token_bans and ban_eos_token: tokens that are never chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class TokenBans(Stage):
    name = "token_bans"
    rank = 40
    parameters = ("custom_token_bans", "ban_eos_token")
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return not params.custom_token_bans and not params.ban_eos_token

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> torch.Tensor:
        """The banned token ids [B] int64."""
        banned = (
            info.eos_token_ids.union(params.custom_token_bans) if params.ban_eos_token else params.custom_token_bans
        )
        return torch.tensor(sorted(banned), dtype=torch.int64, device=info.device)

    def native_steps(self, values: Sequence[float], prepared: torch.Tensor) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.MASK, (0, math.inf), prepared.tolist()),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, banned in zip(logits, context.prepared, strict=True):
            row.index_fill_(0, banned, -torch.inf)
        return logits


STAGE = TokenBans()
