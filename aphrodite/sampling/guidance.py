"""Classifier-free guidance (Sanchez et al., 2023, arXiv:2306.17806; in transformers' words,
`UnbatchedClassifierFreeGuidanceLogitsProcessor`).

With c and u the log-probabilities behind a prompt and behind its negative prompt, scale s replaces the logits by
u + s * (c - u), before all stages. s = 1 would be c: such requests have no second sequence.
"""

from __future__ import annotations

import torch


@torch.inference_mode()
def guide(logits: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor, scales: torch.Tensor) -> None:
    """Replace the logits of guided rows, each by its own scale.

    Args:
        logits: [L, vocab] float32, changed in place.
        conditional: [G] int64, rows of `logits` to be replaced.
        unconditional: [G] int64, the row behind the negative prompt of each of them.
        scales: [G] float32, one for each of them.

    A token that the prompt rules out (-inf) stays out. What a pair becomes depends on its two rows alone.
    """
    own = logits[conditional]
    c, u = own.log_softmax(-1), logits[unconditional].log_softmax(-1)
    logits[conditional] = torch.where(own == -torch.inf, own, u + scales[:, None] * (c - u))
