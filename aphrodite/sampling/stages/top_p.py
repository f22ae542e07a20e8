"""Top-p, nucleus sampling (arXiv 1904.09751)."""

from __future__ import annotations

import torch

from aphrodite.sampling.stages.base import Stage, StageContext


class TopP(Stage):
    """Keep the shortest prefix of tokens by (logit descending, token id ascending) whose mass reaches p.

    So the token that crosses p stays, and the most likely one always does.
    """

    name = "top_p"
    rank = 610
    sampler_id = 0
    parameters = ("top_p",)
    keeps_argmax = True
    truncation = True

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.to(torch.float64).softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        dropped = mass_before >= values
        dropped[:, 0] = False
        return logits.masked_fill_(torch.empty_like(dropped).scatter_(-1, token_ids, dropped), -torch.inf)


STAGE = TopP()
