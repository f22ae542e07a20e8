"""Top-a (KoboldAI, from RWKV-LM): keep p >= a * p_max^2, and always the most likely token."""

from __future__ import annotations

import math

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext


class TopA(Stage):
    name = "top_a"
    rank = 700
    sampler_id = 1
    parameters = ("top_a",)
    native = NativeOp.TOP_A
    keeps_argmax = True
    truncation = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return (math.log(params.top_a) if params.top_a > 0 else -math.inf,)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        log_probabilities = logits.log_softmax(-1)
        highest = log_probabilities.amax(-1, keepdim=True)
        return logits.masked_fill_(log_probabilities < torch.minimum(values + 2 * highest, highest), -torch.inf)


STAGE = TopA()
