"""Activations in fp8 with a scale for each row, after an RMSNorm or as they are.

Bound by memory: a row is read once and a quarter (float32) or half (16-bit) of its bytes is written; it stays in
registers between its largest magnitude and the scaling.
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


class QuantizedRows(NamedTuple):
    """`values * scales`, up to rounding, is what was quantized."""

    values: torch.Tensor  # [T, in] of an fp8 dtype
    scales: torch.Tensor  # [T, 1] float32


@direct_launch
@triton.jit
def _quantize_rows_kernel(
    x,  # [T, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    values,  # [T, in] fp8, contiguous
    scales,  # [T] float32
    in_features: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= in_features
    LARGEST: tl.constexpr,  # finite value of the fp8 dtype
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < in_features
    row_values = load_row(x + row * x_stride, columns, inside, norm_weight, eps, in_features, HAS_NORM, PDL)
    largest = tl.max(tl.abs(row_values), axis=0)
    # A row of zeros has any scale; a NaN anywhere must reach the result, which the largest magnitude may have lost.
    scale = tl.where(largest > 0.0, largest, LARGEST) / LARGEST
    scaled = tl.clamp(row_values / scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values + row * in_features + columns, scaled.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype, norm: tuple[torch.Tensor, float] | None = None) -> QuantizedRows:
    """`x`, or its RMSNorm, with each row scaled so that its largest magnitude is fp8's largest.

    Args:
        x: `[T, in]`, rows may be strided.
        dtype: of the result, an fp8 type.
        norm: weight `[in]` and epsilon.
    """
    rows, in_features = x.shape
    values = torch.empty((rows, in_features), dtype=dtype, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows == 0:
        return QuantizedRows(values, scales)
    block = next_power_of_2(in_features)
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    pdl = pdl_supported(x.device)
    _quantize_rows_kernel[(rows,)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        values,
        scales,
        in_features=in_features,
        BLOCK=block,
        LARGEST=torch.finfo(dtype).max,
        HAS_NORM=norm is not None,
        PDL=pdl,
        num_warps=norm_warps(block),
        **launch_options(pdl),
    )
    return QuantizedRows(values, scales)
