"""Repetition, frequency and presence penalties that fade with the distance of a token's last occurrence.

    weight(d), for a token last seen d tokens before the newest one (d = 0), in a range of n tokens:
        1                               in the newer half, d < n - n // 2
        slope                           in the older half (KoboldCpp)
        slope * (1 - (d - n) / decay)   behind the range, n <= d < n + decay (ExLlamaV2)

n is `repetition_penalty_range`, or the history's length where that is shorter or the range is all of it. The
repetition penalty becomes 1 + (penalty - 1) * weight. Each occurrence in the answer adds frequency_penalty times its
own weight; the presence penalty has the weight of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext
from aphrodite.sampling.stages.penalties import STAGE as PENALTIES
from aphrodite.sampling.stages.penalties import is_ranged

_UNIT = 2.0**32
_LEAST_FACTOR = 0.01  # a slope above 1 could turn a repetition penalty below 1 negative


class Ranges(NamedTuple):
    num_prompt: int
    size: int  # tokens; 0: all
    decay: int  # tokens


class RangedPenalties(Stage):
    """What `penalties` does, for requests that limit its range; plans have one of the two."""

    name = "ranged_penalties"
    rank = 210
    sampler_id = 6
    stands_in_for = "penalties"
    parameters = (*PENALTIES.parameters, "repetition_penalty_range", "repetition_penalty_slope", "repetition_decay")

    def is_neutral(self, params: SamplingParams) -> bool:
        return not is_ranged(params) or PENALTIES.changes_nothing(params)

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return (
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            params.repetition_penalty_slope,
        )

    def prepare(self, params: SamplingParams, info: RowInfo) -> Ranges:
        return Ranges(info.num_prompt, max(params.repetition_penalty_range, 0), params.repetition_decay)

    def native_steps(self, values: Sequence[float], prepared: Ranges) -> Sequence[NativeStep]:
        return (NativeStep(NativeOp.RANGED_PENALTIES, (*values, prepared.size, prepared.decay)),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        repetition, frequency, presence, slope = values[:, :, None].unbind(1)
        bounds = [
            _bounds(ranges, position) for ranges, position in zip(context.prepared, context.positions, strict=True)
        ]
        ends, spans, sizes, decays, answers = torch.tensor(bounds, device=logits.device)[:, :, None].unbind(1)

        def weight(distance: torch.Tensor) -> torch.Tensor:
            near = torch.where(distance < sizes - sizes // 2, 1.0, slope)
            fading = slope * (1 - (distance - sizes) / decays.clamp(min=1))
            return torch.where(distance < sizes, near, fading)

        distance = torch.arange(max(span for _, span, *_ in bounds), device=logits.device)
        counted = distance < spans
        history = context.token_ids[context.index[:, None], (ends - 1 - distance).clamp(min=0)].long()
        nearest = torch.full_like(logits, 2**31, dtype=torch.int64)
        nearest.scatter_reduce_(1, history, torch.where(counted, distance, 2**31), "amin")
        in_answer = counted & (distance < answers)
        # In whole numbers, whose sum does not depend on the order in which a GPU adds.
        parts = (torch.where(in_answer, weight(distance), 0.0) * _UNIT).round().to(torch.int64)
        amount = torch.zeros_like(nearest).scatter_add_(1, history, parts).to(logits.dtype) / _UNIT
        last = weight(nearest)
        factor = (1 + (repetition - 1) * last).clamp(min=_LEAST_FACTOR)
        penalized = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(nearest < spans, penalized, logits)
        return logits - frequency * amount - torch.where(nearest < torch.minimum(answers, spans), presence * last, 0.0)


def _bounds(ranges: Ranges, position: int) -> tuple[int, int, int, int, int]:
    """Length of the history, of what counts of it, of the range, of the fading, and of the answer."""
    size = min(ranges.size or position, position)
    decay = ranges.decay if ranges.size else 0
    return position, min(size + decay, position), size, decay, position - ranges.num_prompt


STAGE = RangedPenalties()
