"""Gated activations of the feed-forward block (arXiv 2002.05202)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]

SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0  # of GPT-OSS
_GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)


def gated_activation(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """act(gate) * up for `gate_up` `[T, 2 * intermediate]`, gate first.

    "swiglu_oai" is GPT-OSS's (arXiv 2508.10925): gate * sigmoid(1.702 * gate) * (up + 1) of values bounded to 7, the
    gate from above only. In float32 all are written as gate / (1 + exp(-u)): torch's own kernels treat the last few
    values of a thread's share with another formula than the rest, so a row's result would depend on the batch.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "swiglu_oai":
        gate = gate.float().clamp(max=SWIGLU_LIMIT)
        up = up.float().clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0
        return (gate / torch.exp(-SWIGLU_SLOPE * gate).add_(1.0) * up).to(gate_up.dtype)
    if gate_up.dtype == torch.float32:
        u = gate if kind == "silu" else _GELU_SLOPE * (gate + 0.044715 * gate * gate * gate)
        return gate / torch.exp(-u).add_(1.0) * up
    if kind == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh") * up
