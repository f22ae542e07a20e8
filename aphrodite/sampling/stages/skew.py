"""Skew (exllamav2, commit 1de4cdd): bends the cumulative distribution over tokens from likely to unlikely.

With C the cumulative probabilities by (logit descending, token id ascending), each becomes C^a, a = e^skew; a
token's new probability is the step that its C makes. It masks nothing.
"""

from __future__ import annotations

import math

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import row_sums

_SMALLEST = 1e-37  # so that no token that is left becomes impossible
_NEGLIGIBLE = 1e-8  # error of the tail's probabilities, relative
_WIDTHS = (128, 2048)


class Skew(Stage):
    name = "skew"
    rank = 1500
    parameters = ("skew",)
    native = NativeOp.SKEW
    greedy_skips = True

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        return (math.exp(params.skew),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        exponents = values.to(torch.float64)
        if logits.device.type != "cpu":  # elsewhere asking how far a sort must reach would wait for the device
            return _skew_sorted(logits, exponents)
        return torch.cat(
            [_skew_row(row[None], exponent[None]) for row, exponent in zip(logits, exponents, strict=True)]
        )


def _skew_row(logits: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """[1, V]. The tail, where C is nearly 1, needs no order: d(C^a) = a * C^(a - 1) * dC, which is a * p there."""
    p = (logits - logits.amax(-1, keepdim=True)).to(torch.float64).exp_()
    p /= row_sums(p)
    a = float(exponent)
    for width in (width for width in _WIDTHS if width < logits.shape[-1]):
        # Equal logits at the edge belong to the tail: which of them are among the first is not told.
        cut = logits[0].topk(width).values[-1]
        first = (logits[0] > cut).nonzero()[:, 0]
        if abs(a - 1) * (1 - float(p[0, first].sum())) <= _NEGLIGIBLE:
            order = first[logits[0, first].sort(descending=True, stable=True).indices]
            skewed = a * p
            skewed[0, order] = _steps(p[:, order], exponent)[0]
            return _as_logits(skewed, logits)
    return _skew_sorted(logits, exponent)


def _skew_sorted(logits: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    steps = _steps(ordered.to(torch.float64).softmax(-1), exponents)
    return _as_logits(torch.empty_like(steps).scatter_(-1, token_ids, steps), logits)


def _steps(p: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """C^a - (C - p)^a of probabilities [R, K] float64 in order, exact even where p is too small to change C."""
    cumulative = p.cumsum(-1).clamp_max_(1.0)
    return cumulative**exponents * -torch.expm1(exponents * torch.log1p(-p / cumulative))


def _as_logits(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return p.clamp_min_(_SMALLEST).log_().to(torch.float32).masked_fill_(logits == -torch.inf, -torch.inf)


STAGE = Skew()
