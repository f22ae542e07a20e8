"""Temperature: divides the logits.

Greedy requests have no temperature stage: their plans end in an argmax.
"""

from __future__ import annotations

import torch

from aphrodite.sampling.stages.base import Stage, StageContext


class Temperature(Stage):
    name = "temperature"
    rank = 400
    sampler_id = 5
    parameters = ("temperature",)
    keeps_argmax = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        return logits.div_(values)


STAGE = Temperature()
