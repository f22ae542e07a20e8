"""Adaptive-p (MrJackSpade, ggml-org/llama.cpp#17927): prefers tokens whose probability is near a target that adapts.

With p the distribution that the stages before it leave, and a the average of the chosen tokens' probabilities, which
starts at `adaptive_target` t:

    target  clamp(2 t - a, 0, 1)
    logits  5 - 10 x^2 / (1 + x), x = |p - target| / 0.3, for every token that is left
    then    a <- decay a + (1 - decay) p(drawn token)

The source keeps a weighted sum and the sum of weights apart; started at t / (1 - decay) and 1 / (1 - decay) the
latter never changes, which leaves this average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.selection import SelectionState

_PEAK, _SHARPNESS, _WIDTH = 5.0, 10.0, 0.3
_MAX_DECAY = 0.99


class AdaptiveP(Stage):
    name = "adaptive_p"
    rank = 2100
    parameters = ("adaptive_target", "adaptive_decay")
    greedy_skips = True
    selector = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return not 0 < params.adaptive_target < 1

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return params.adaptive_target, min(params.adaptive_decay, _MAX_DECAY)

    def prepare(self, params: SamplingParams, info: RowInfo) -> int:
        return info.num_prompt

    def new_state(self, info: SamplerInfo) -> SelectionState:
        return SelectionState(info)

    def native_steps(self, values: Sequence[float], prepared: int) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.ADAPTIVE_P, values, numbers=True),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        target, decay = values[:, :, None].unbind(1)
        state: SelectionState = context.state
        average = state.read(context, context.prepared, target)
        probabilities = logits.softmax(-1)
        state.expect(context, decay * average + (1 - decay) * probabilities)
        distance = (probabilities - (2 * target - average).clamp(0, 1)).abs_() / _WIDTH
        shaped = _PEAK - _SHARPNESS * distance * distance / (1 + distance)
        return torch.where(logits == -torch.inf, -torch.inf, shaped)


STAGE = AdaptiveP()
