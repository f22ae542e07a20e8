"""Top-nσ (arXiv 2411.07641): keep logits of at least max - n * σ.

σ is the population standard deviation of the logits that are left, as in llama.cpp and KoboldCpp; in the
paper nothing is masked before it.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import row_sums


class TopNSigma(Stage):
    name = "top_nsigma"
    rank = 500
    sampler_id = 9
    parameters = ("top_nsigma",)
    native = NativeOp.TOP_NSIGMA
    keeps_argmax = True
    truncation = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        left = logits > -torch.inf
        count = left.sum(-1, keepdim=True)
        highest = logits.amax(-1, keepdim=True)
        below = (logits - highest).to(torch.float64).masked_fill_(~left, 0.0)
        mean = row_sums(below) / count
        variance = row_sums((below - mean).square_().masked_fill_(~left, 0.0)) / count
        lowest = highest - (values * variance.sqrt()).to(torch.float32)
        return logits.masked_fill_(logits < lowest, -torch.inf)


STAGE = TopNSigma()
