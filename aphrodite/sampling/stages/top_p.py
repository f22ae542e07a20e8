"""Top-p, nucleus sampling (arXiv 1904.09751)."""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import keep_longest_prefix, row_sums


class TopP(Stage):
    """Keep the shortest prefix of tokens by (logit descending, token id ascending) whose mass reaches p.

    So the token that crosses p stays, and the most likely one always does. A mass that equals p reaches it; masses
    are sums of exp(logit - max) in float64 there, so that those of equal logits are exact.
    """

    name = "top_p"
    rank = 610
    sampler_id = 0
    parameters = ("top_p",)
    native = NativeOp.TOP_P
    keeps_argmax = True
    truncation = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        highest = logits.amax(-1, keepdim=True)
        target = values.to(torch.float64) * row_sums((logits - highest).to(torch.float64).exp_())

        def decide(
            ordered: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            mass = (ordered - highest[rows]).to(torch.float64).exp_().cumsum(-1)
            return (mass < target[rows]).sum(-1) + 1, mass[:, -1] >= target[rows, 0]

        return keep_longest_prefix(logits, logits, decide)


STAGE = TopP()
