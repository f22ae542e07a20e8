"""Dynamic temperature: divides the logits by a temperature that follows the entropy.

It stands where temperature stands and replaces it. T = min + (max - min) * (H / ln N)^exponent, where H is the
entropy of the N tokens that are left (kalomaze's definition, KoboldCpp 1.52); one token left means T = min.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import entropy

_LOWEST = 1e-5  # lower temperatures would overflow float32


def temperature_range(params: SamplingParams) -> tuple[float, float] | None:
    """Lowest and highest temperature of a request, or None if its temperature is not dynamic."""
    if params.dynamic_temperature is False:
        return None
    if params.dynatemp_max > params.dynatemp_min:
        return params.dynatemp_min, params.dynatemp_max
    if params.dynatemp_range > 0:
        return max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
    return None


class DynamicTemperature(Stage):
    name = "dynatemp"
    rank = 410
    sampler_id = 5
    stands_in_for = "temperature"
    parameters = (
        "dynamic_temperature",
        "dynatemp_min",
        "dynatemp_max",
        "dynatemp_range",
        "dynatemp_exponent",
        "temperature",
    )
    native = NativeOp.DYNAMIC_TEMPERATURE
    keeps_argmax = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return temperature_range(params) is None

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        lowest, highest = temperature_range(params) or (1.0, 1.0)
        return lowest, highest - lowest, params.dynatemp_exponent

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        lowest, width, exponent = values[:, :, None].unbind(1)
        largest = (logits > -torch.inf).sum(-1, keepdim=True).clamp_min_(2).log()  # entropy that N tokens can have
        share = (entropy(logits.log_softmax(-1)) / largest).clamp_(0, 1).nan_to_num_()  # NaN: nothing is left
        return logits.div_((lowest + width * share**exponent).clamp_min_(_LOWEST))


STAGE = DynamicTemperature()
