"""Epsilon sampling (arXiv 2210.15191): mask p < ε; the most likely token stays."""

from __future__ import annotations

import math

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext


def as_probability(cutoff: float) -> float:
    """Cutoffs above 1 cannot be probabilities: they are in text-generation-webui's units of 0.0001."""
    return cutoff * 1e-4 if cutoff > 1 else cutoff


class EpsilonCutoff(Stage):
    name = "epsilon_cutoff"
    rank = 1100
    sampler_id = 11
    parameters = ("epsilon_cutoff",)
    native = NativeOp.EPSILON_CUTOFF
    keeps_argmax = True
    truncation = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        epsilon = as_probability(params.epsilon_cutoff)
        return (math.log(epsilon) if epsilon > 0 else -math.inf,)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        log_probabilities = logits.log_softmax(-1)
        lowest = torch.minimum(values, log_probabilities.amax(-1, keepdim=True))
        return logits.masked_fill_(log_probabilities < lowest, -torch.inf)


STAGE = EpsilonCutoff()
