"""allowed_token_ids: masks every other token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class AllowedTokens(Stage):
    name = "allowed_token_ids"
    rank = 30
    parameters = ("allowed_token_ids",)
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.allowed_token_ids is None

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> torch.Tensor:
        """The token ids [A] int64."""
        return torch.tensor(params.allowed_token_ids, dtype=torch.int64, device=info.device)

    def native_steps(self, values: Sequence[float], prepared: torch.Tensor) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.ALLOW, token_ids=sorted(set(prepared.tolist()))),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, allowed in zip(logits, context.prepared, strict=True):
            kept = row[allowed]
            row.fill_(-torch.inf)
            row[allowed] = kept
        return logits


STAGE = AllowedTokens()
