"""A product for each head with a matrix of its own, for few rows: latent attention's way to the latent and back.

The vendor's batched product takes several times as long as reading the matrices does, and cannot start to read them
before its predecessor has ended.

Cost: heads * out * in elements read for every ROWS rows; bound by memory traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)

ROWS = 16  # of a program, the fewest of tl.dot
MOST_ROWS = 64  # beyond which the vendor's product is faster
PROGRAM_VALUES = 8192  # of its matrix that a program reads, so that a decode step's layer is shared by the whole card


def heads_product(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """`out` = each head of `x` times the transpose of its own of `weights`.

    Args:
        x: `[T, heads, in]`, the last dimension contiguous, T at most MOST_ROWS.
        weights: `[heads, out, in]` contiguous; they are read before the kernels ahead of this one have ended.
        out: `[T, heads, out]`, the last dimension contiguous.
    """
    rows = x.shape[0]
    heads, out_features, in_features = weights.shape
    if rows == 0:
        return
    depth = max(16, next_power_of_2(in_features))
    columns = max(16, min(next_power_of_2(out_features), PROGRAM_VALUES // depth))
    pdl = pdl_supported(x.device)
    _heads_product_kernel[(ceil_div(out_features, columns), heads, ceil_div(rows, ROWS))](
        x,
        weights,
        out,
        rows,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        IN=in_features,
        DEPTH=depth,
        OUT=out_features,
        COLUMNS=columns,
        ROWS=ROWS,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit(do_not_specialize=["rows"])
def _heads_product_kernel(
    x,
    weights,
    out,
    rows,
    x_stride,
    x_head_stride,
    out_stride,
    out_head_stride,
    IN: tl.constexpr,
    DEPTH: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    inside = (column < OUT)[:, None] & (depth < IN)[None, :]
    matrix = tl.load(weights + (head * OUT + column)[:, None] * IN + depth[None, :], mask=inside, other=0.0)
    wait_for_producer(PDL)
    source = x + (row.to(tl.int64) * x_stride + head * x_head_stride)[:, None] + depth[None, :]
    tile = tl.load(source, mask=(row < rows)[:, None] & (depth < IN)[None, :], other=0.0)
    product = tl.dot(tile, tl.trans(matrix), input_precision="ieee")
    target = out + (row.to(tl.int64) * out_stride + head * out_head_stride)[:, None] + column[None, :]
    tl.store(target, product.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < OUT)[None, :])
