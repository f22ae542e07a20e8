"""Min-p (arXiv 2407.01082): keep p >= min_p * p_max, which is logit >= max + ln(min_p) and needs no sort."""

from __future__ import annotations

import math

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext


class MinP(Stage):
    name = "min_p"
    rank = 800
    sampler_id = 2
    parameters = ("min_p",)
    native = NativeOp.MIN_P
    keeps_argmax = True
    truncation = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return (math.log(params.min_p) if params.min_p > 0 else -math.inf,)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        return logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + values, -torch.inf)


STAGE = MinP()
