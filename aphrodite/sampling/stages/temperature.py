"""Temperature: divides the logits.

Greedy requests have no temperature stage: their plans end in an argmax. Nor have those whose temperature
is dynamic (`dynatemp.py`).
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.dynatemp import temperature_range


class Temperature(Stage):
    name = "temperature"
    rank = 400
    sampler_id = 5
    parameters = ("temperature",)
    native = NativeOp.TEMPERATURE
    keeps_argmax = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.temperature == 1.0 or temperature_range(params) is not None

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        return logits.div_(values)


STAGE = Temperature()
