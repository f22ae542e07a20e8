"""Gated activations over interleaved (gate, up) pairs: silu(gate) * up and gelu_tanh(gate) * up (arXiv 2002.05202), and
GPT-OSS's (`layers/activation.py`).

Bound by memory: each pair is read and its product written once, 6 bytes a value in a 16-bit dtype. Pairs are neighbours
(`layers/triton_linear.interleave_gate_up`), so one contiguous load brings both. Arithmetic is float32 for every dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    pdl_supported,
    wait_for_producer,
)

Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]

BLOCK = 1024
WARPS = 4


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up in float32."""
    if ACTIVATION == "silu":
        slope = gate
    elif ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        slope = 1.702 * gate
    else:
        # gelu's 0.5 (1 + tanh(z)) is the logistic function of 2 z.
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-slope)) * up


@direct_launch
@triton.jit
def _gated_pairs_kernel(
    pairs,  # [values, 2]
    out,  # [values]
    values,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, 2 * BLOCK)
    inside = first * 2 + within < values * 2
    wait_for_producer(PDL)
    both = tl.load(pairs + first * 2 + within, mask=inside, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    index = first + tl.arange(0, BLOCK)
    tl.store(out + index, gated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=index < values)


def gated_pairs(pairs: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(gate) * up.

    Args:
        pairs: `[T, 2 * intermediate]` contiguous, (gate, up) neighbours.

    Returns:
        `[T, intermediate]` of the same dtype.
    """
    rows, width = pairs.shape
    out = torch.empty((rows, width // 2), dtype=pairs.dtype, device=pairs.device)
    if rows == 0:
        return out
    values = out.numel()
    pdl = pdl_supported(pairs.device)
    grid = (ceil_div(values, BLOCK),)
    _gated_pairs_kernel[grid](
        pairs, out, values, ACTIVATION=activation, BLOCK=BLOCK, PDL=pdl, num_warps=WARPS, **launch_options(pdl)
    )
    return out
