"""Activations in float16 with a scale for each row, after an RMSNorm or as they are.

For products whose weights are float16 in registers: a weight that is decoded to bfloat16 is rounded by 1.6e-3 of it, to
float16 by an eighth of that. Scales are powers of two, so what bfloat16 can hold stays as it is. Bound by memory: a row
is read and written once, `4 * in` bytes in a 16-bit dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
)
from aphrodite.kernels.triton.norm import load_row, norm_warps


class HalfRows(NamedTuple):
    """`values * scales[:, None]` is what they were made of."""

    values: torch.Tensor  # [T, in] float16, contiguous
    scales: torch.Tensor  # [T] float32


@direct_launch
@triton.jit
def _half_rows_kernel(
    x,  # [T, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    values,  # [T, in] float16
    scales,  # [T] float32
    in_features: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= in_features
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < in_features
    row_values = load_row(x + row * x_stride, column, inside, norm_weight, eps, in_features, HAS_NORM, PDL)
    # The largest becomes 2^14 to 2^15. A row with a value that is not finite keeps it.
    largest = tl.max(tl.abs(row_values), axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(largest - 14, 1), 240)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(values + row * in_features + column, (row_values * inverse).to(tl.float16), mask=inside)
    tl.store(scales + row, scale)


def half_rows(x: torch.Tensor, norm: tuple[torch.Tensor, float] | None = None) -> HalfRows:
    """`x`, or its RMSNorm, in float16.

    Args:
        x: `[T, in]`, rows may be strided.
        norm: weight `[in]` and epsilon.
    """
    rows, in_features = x.shape
    values = torch.empty((rows, in_features), dtype=torch.float16, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return HalfRows(values, scales)
    block = next_power_of_2(in_features)
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    pdl = pdl_supported(x.device)
    _half_rows_kernel[(rows,)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        values,
        scales,
        in_features=in_features,
        BLOCK=block,
        HAS_NORM=norm is not None,
        PDL=pdl,
        num_warps=norm_warps(block),
        **launch_options(pdl),
    )
    return HalfRows(values, scales)
