"""The smooth bound that Gemma 2 puts on attention scores and logits (arXiv 2408.00118)."""

from __future__ import annotations

import torch


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap), overwriting float32 `x`.

    In float32 through exp: torch's own tanh treats the last few values of a thread's share with another formula than
    the rest, so a row's result would depend on the batch.
    """
    if x.dtype == torch.float32:
        return x.mul_(2.0 / cap).exp_().add_(1.0).reciprocal_().mul_(-2.0 * cap).add_(cap)
    return (x.float() / cap).tanh_().mul_(cap).to(x.dtype)
