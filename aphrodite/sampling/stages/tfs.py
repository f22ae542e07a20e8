"""Tail-free sampling (Trenton Bricken, "Tail Free Sampling", 2019).

With p in falling order over the whole vocabulary, masked tokens as 0, and c the absolute second differences
divided by their sum: the token at place i + 1 stays while c[0] + .. + c[i] <= z. The first always stays and the
last never does, as in the original; fewer than three tokens, or equal ones, have no tail.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import keep_longest_prefix

_FLAT = 1e-9  # second differences that sum to less than this share of p_max are rounding


class TailFree(Stage):
    name = "tfs"
    rank = 900
    sampler_id = 3
    parameters = ("tfs",)
    native = NativeOp.TAIL_FREE
    keeps_argmax = True
    truncation = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        vocab = logits.shape[-1]
        if vocab < 3:
            return logits

        def decide(
            ordered: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # Relative to the most likely token's probability: the normalization cancels.
            p = (ordered - ordered[:, :1]).to(torch.float64).exp_()
            reached = p.diff(dim=-1).diff(dim=-1).abs_().cumsum(-1)
            total = reached[:, -1:]
            # What comes after the last two of these can add up to at most twice the last but one.
            unknown = 2 * p[:, -2:-1] if ordered.shape[-1] < vocab else torch.zeros_like(total)
            z = values[rows].to(torch.float64)
            fewest = (reached <= z * total).sum(-1) + 1
            most = (reached <= z * (total + unknown)).sum(-1) + 1
            flat = (total <= _FLAT)[:, 0]
            certain = (fewest == most) & (most <= reached.shape[-1]) & ~flat
            return torch.where(flat, vocab, fewest), certain

        return keep_longest_prefix(logits, logits, decide)


STAGE = TailFree()
