"""Quadratic sampling, "smoothing" (kalomaze, oobabooga/text-generation-webui#5403; the curve came later).

With d = logit - max: the logit becomes max - k * d^2 + s * d^3, k = factor * (3 - curve) / 2 and
s = factor * (curve - 1) / 2.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext

_FARTHEST = -1e6  # the cube of a larger distance could overflow, and its token has no chance anyway


class Quadratic(Stage):
    name = "quadratic"
    rank = 1300
    sampler_id = 12
    parameters = ("smoothing_factor", "smoothing_curve")
    native = NativeOp.QUADRATIC
    greedy_skips = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.smoothing_factor == 0

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        factor, curve = params.smoothing_factor, params.smoothing_curve
        return factor * (3 - curve) / 2, factor * (curve - 1) / 2

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        k, s = values[:, :, None].unbind(1)
        highest = logits.amax(-1, keepdim=True)
        distance = (logits - highest).clamp_min_(_FARTHEST)
        smoothed = highest + distance.square() * (s * distance - k)
        return smoothed.masked_fill_(logits == -torch.inf, -torch.inf)


STAGE = Quadratic()
