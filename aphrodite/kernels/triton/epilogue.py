"""Where products of few rows end: bias, activation and residual, whichever kernel made the sums, and sums in parts.

A product is act(x W^T + b) + residual. The rows of a gated weight are interleaved (gate, up) pairs, so a block has both
halves of a result. Blocks that share a tile along the inputs leave float32 partial sums in one workspace, and the last
to arrive adds them up in a fixed order, so equal inputs give equal results.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import Activation, gated

# Partial sums of products whose inputs are split, float32 values (16 MiB), and counters of their tiles.
WORKSPACE_VALUES = 1 << 22
WORKSPACE_TILES = 1 << 12


class Epilogue(NamedTuple):
    """What is applied to the product, in this order.

    Attributes:
        bias: `[out]`.
        activation: of interleaved (gate, up) pairs, which halves the width.
        residual: `[T, width of the result]` of x's dtype; the result replaces it.
    """

    bias: torch.Tensor | None = None
    activation: Activation | None = None
    residual: torch.Tensor | None = None


def output_of(x: torch.Tensor, out_features: int, epilogue: Epilogue) -> torch.Tensor:
    """Where the result goes: over the residual, which each element's one writer has read before."""
    if epilogue.residual is not None:
        return epilogue.residual
    width = out_features if epilogue.activation is None else out_features // 2
    return torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)


@functools.cache
def split_workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and counters of `device`, allocated once: every launch leaves the counters at zero.

    One set serves all launches because kernels on the compute stream follow one another: each waits for its
    predecessor's end before it writes. Concurrent streams would need their own.
    """
    return (
        torch.empty(WORKSPACE_VALUES, dtype=torch.float32, device=device),
        torch.zeros(WORKSPACE_TILES, dtype=torch.int32, device=device),
    )


@triton.jit
def finish_gemv(
    total,
    bias,
    residual,
    out,
    row,
    out_stride,
    out_features,
    first,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of one activation row's `total` `[ROWS]`, and the store."""
    index = first + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)
    if ACTIVATION is None:
        width = out_features
        result = total
    else:
        width = out_features // 2
        index = first // 2 + tl.arange(0, ROWS // 2)
        gate, up = tl.split(tl.reshape(total, (ROWS // 2, 2)))
        result = gated(gate, up, ACTIVATION)
    inside = index < width
    at = row * out_stride + index
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish_tile(
    total,
    bias,
    residual,
    out,
    out_stride,
    M,
    out_features,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of `total` `[ROWS, COLUMNS]` (weight rows x activation rows), and the store."""
    index = first + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is None:
        width = out_features
        result = total
    else:
        width = out_features // 2
        index = first // 2 + tl.arange(0, ROWS // 2)
        pairs = tl.permute(tl.reshape(total, (ROWS // 2, 2, COLUMNS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        result = gated(gate, up, ACTIVATION)
    row = tl.arange(0, COLUMNS)
    inside = (index < width)[:, None] & (row < M)[None, :]
    at = row[None, :] * out_stride + index[:, None]
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_splits(partial, workspace, counters, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """Leave `partial`; the last block of a tile gets (True, the sum of all in the order of the splits)."""
    tile = tl.program_id(0)
    size: tl.constexpr = ROWS * COLUMNS
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    base = workspace + tile * SPLITS * size
    tl.store(base + tl.program_id(1) * size + within, partial)
    # Every thread's stores come before the one atomic that announces them.
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if last:
        for split in tl.static_range(SPLITS):
            total += tl.load(base + split * size + within, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return last, total


@triton.jit
def finish_skinny(
    total,
    bias,
    residual,
    out,
    out_stride,
    workspace,
    counters,
    M,
    out_features,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of a tile's sum, of which `total` is all or one of `SPLITS` parts, and the store.

    Blocks are numbered by (tile, split).
    """
    if SPLITS == 1:
        _finish_tile(
            total, bias, residual, out, out_stride, M, out_features, first, ROWS, COLUMNS, ACTIVATION, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip
    else:
        last, total = _sum_of_splits(total, workspace, counters, ROWS, COLUMNS, SPLITS)
        if last:
            _finish_tile(
                total, bias, residual, out, out_stride, M, out_features, first, ROWS, COLUMNS, ACTIVATION, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip
