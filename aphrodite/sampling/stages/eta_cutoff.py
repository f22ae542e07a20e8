"""Eta sampling (arXiv 2210.15191): mask p < min(η, sqrt(η) * exp(-H)); the most likely token stays."""

from __future__ import annotations

import math

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import entropy
from aphrodite.sampling.stages.epsilon_cutoff import as_probability


class EtaCutoff(Stage):
    name = "eta_cutoff"
    rank = 1000
    sampler_id = 10
    parameters = ("eta_cutoff",)
    native = NativeOp.ETA_CUTOFF
    keeps_argmax = True
    truncation = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        eta = as_probability(params.eta_cutoff)
        return (math.log(eta) if eta > 0 else -math.inf,)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        log_probabilities = logits.log_softmax(-1)
        lowest = torch.minimum(values, values / 2 - entropy(log_probabilities))
        lowest = torch.minimum(lowest, log_probabilities.amax(-1, keepdim=True))
        return logits.masked_fill_(log_probabilities < lowest, -torch.inf)


STAGE = EtaCutoff()
