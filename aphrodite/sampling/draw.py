"""The draw as torch operations: Gumbel-max over the surviving tokens, ties to the lowest token id.

Scores are relative to the row's maximum, so that large logits do not swallow the noise's digits.
"""

from __future__ import annotations

import torch

from aphrodite.sampling.random import Use, gumbel, uniforms, uniforms_at

# The noise lies between -2.82 and 16.64: a token further below the maximum cannot win.
_REACH = 19.5


def draw(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The chosen tokens: [R] int64, arbitrary but within the vocabulary where a row is NaN or all -inf.

    Args:
        logits: [R, vocab] float32.
        seeds: [R] int64; positions: [R] int64 (see `random.uniforms`).
    """
    relative = logits - logits.amax(-1, keepdim=True)
    if logits.device.type == "cpu":  # elsewhere counting the candidates would wait for the device
        rows, token_ids = (relative >= -_REACH).nonzero(as_tuple=True)
        if 8 * len(rows) < logits.numel():
            return _draw_candidates(relative, seeds, positions, rows, token_ids)
    return (relative + gumbel(uniforms(seeds, positions, Use.DRAW, logits.shape[-1]))).argmax(-1)


def _draw_candidates(
    relative: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The same draw with noise for the M candidates at `rows`, `token_ids` [M] alone."""
    noise = gumbel(uniforms_at(seeds[rows], positions[rows], Use.DRAW, token_ids))
    scores = relative[rows, token_ids] + noise
    best = scores.new_full((len(relative),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
    winners = scores == best[rows]
    lowest = token_ids.new_full((len(relative),), relative.shape[-1] - 1)
    return lowest.scatter_reduce(0, rows[winners], token_ids[winners], "amin")
