"""Locally typical sampling (arXiv 2202.00666).

Keep the fewest tokens, by |-ln p - H| ascending and then token id, whose probabilities sum to at least τ: the
token that crosses τ stays, as in the paper's definition. Masses are added up as by top_p.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.cpu.sampler_ops import NativeOp
from aphrodite.sampling.stages.base import Stage, StageContext
from aphrodite.sampling.stages.distribution import entropy, keep_longest_prefix, row_sums


class TypicalP(Stage):
    name = "typical_p"
    rank = 1200
    sampler_id = 4
    parameters = ("typical_p",)
    native = NativeOp.TYPICAL_P
    greedy_skips = True
    truncation = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        log_probabilities = logits.log_softmax(-1)
        typicality = (log_probabilities + entropy(log_probabilities)).abs_().neg_()
        weights = (logits - logits.amax(-1, keepdim=True)).to(torch.float64).exp_()
        target = values.to(torch.float64) * row_sums(weights)

        def decide(
            ordered: torch.Tensor, token_ids: torch.Tensor, rows: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            mass = weights[rows[:, None], token_ids].cumsum(-1)
            return (mass < target[rows]).sum(-1) + 1, mass[:, -1] >= target[rows, 0]

        return keep_longest_prefix(logits, typicality, decide)


STAGE = TypicalP()
