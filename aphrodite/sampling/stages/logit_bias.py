"""Logit bias: adds a number to the logits of chosen token ids. -100 is a strong wish, not a ban."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext


class LogitBias(Stage):
    name = "logit_bias"
    rank = 10
    parameters = ("logit_bias",)
    constraint = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return not params.logit_bias

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return ()

    def prepare(self, params: SamplingParams, info: RowInfo) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B] int64 and what to add [B] float32."""
        bias = params.logit_bias or {}
        return (
            torch.tensor(list(bias.keys()), dtype=torch.int64, device=info.device),
            torch.tensor(list(bias.values()), dtype=torch.float32, device=info.device),
        )

    def native_steps(
        self, values: Sequence[float], prepared: tuple[torch.Tensor, torch.Tensor]
    ) -> Sequence[NativeStep]:
        token_ids, bias = prepared
        return (NativeStep(NativeOp.BIAS, token_ids=token_ids.tolist(), amounts=bias.tolist()),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        for row, (token_ids, bias) in zip(logits, context.prepared, strict=True):
            row.index_add_(0, token_ids, bias)
        return logits


STAGE = LogitBias()
