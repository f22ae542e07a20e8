"""Products of many activation rows with an expanded weight, both in float16: act(x W^T + b) + residual.

Bound by arithmetic, `2 * rows * out * in` operations. A packed weight that is expanded to bfloat16 is rounded by as
much as the result is; in float16, beside `half_rows`, by an eighth of that. Otherwise as `gated_gemm`: one block a
multiprocessor walks the tiles of the result, those that share rows of x or W next to one another, and the copy engine
(TMA, compute capability 9.0 and later) fetches operands several steps ahead, across the end of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import gated
from aphrodite.kernels.triton.gated_gemm import _multiprocessors
from aphrodite.kernels.triton.half_rows import HalfRows
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, pdl_supported, tiles
from aphrodite.kernels.triton.linear import Epilogue
from aphrodite.kernels.triton.paged import card_of


class HalfGemmConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        rows, columns: of a tile of x W^T, pairs counted as two columns.
        chunk: values of `in` a step.
        group: tiles of rows that share a tile of W while it is in the L2 cache.
        stages: steps in flight.
        warps: of a block.
    """

    rows: int
    columns: int
    chunk: int
    group: int
    stages: int
    warps: int


DEFAULT = HalfGemmConfig(128, 256, 64, 8, 4, 8)
WITH_RESIDUAL = DEFAULT._replace(stages=3)  # which takes shared memory as well


@direct_launch
@triton.jit(do_not_specialize=["rows"])
def _half_gemm_kernel(
    x,  # descriptor of [T, in] float16, blocks [ROWS, CHUNK]
    x_scales,  # [T] float32
    weight,  # descriptor of [out, in] float16, blocks [COLUMNS, CHUNK]; (gate, up) rows interleaved
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # descriptor as of out
    out,  # descriptor of [T, width], blocks [ROWS, COLUMNS / 2]
    raised,  # what the weight was multiplied by
    rows,
    out_features,
    in_features: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HANDED_ON: tl.constexpr,  # what results are divided by, 0 for those that are stored as they are
):
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(out_features, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        grouped = tl.minimum(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        row = (first + within % grouped) * ROWS
        column = within // grouped * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.range(0, tl.cdiv(in_features, CHUNK), num_stages=STAGES):
            left = x.load([row, step * CHUNK])
            right = weight.load([column, step * CHUNK])
            total = tl.dot(left, right.T, total)
        token = row + tl.arange(0, ROWS)
        total *= (tl.load(x_scales + token, mask=token < rows, other=0.0) / raised)[:, None]
        if HAS_BIAS:
            index = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION is not None:
            gate, up = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
            _store(gated(gate, up, ACTIVATION), residual, out, row, column // 2, HAS_RESIDUAL, HANDED_ON)
        else:
            # Half a tile at a time, for less shared memory.
            lower, upper = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            _store(lower, residual, out, row, column, HAS_RESIDUAL, HANDED_ON)
            _store(upper, residual, out, row, column + COLUMNS // 2, HAS_RESIDUAL, HANDED_ON)


@triton.jit
def _store(values, residual, out, row, column, HAS_RESIDUAL: tl.constexpr, HANDED_ON: tl.constexpr):
    if HAS_RESIDUAL:
        values += residual.load([row, column]).to(tl.float32)
    if HANDED_ON > 0:
        values = tl.clamp(values * (1.0 / HANDED_ON), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    out.store([row, column], values.to(out.dtype))


def half_gemm_supports(device: torch.device) -> bool:
    """Whether the copy engine is there, and the shared memory that it takes to keep it busy."""
    return pdl_supported(device) and card_of(device) == "hopper"


def half_gemm(
    x: HalfRows,
    weight: torch.Tensor,
    raised: float,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    config: HalfGemmConfig | None = None,
    handed_on: float = 0.0,
) -> None:
    """Writes act(x W^T / raised + b) + residual.

    Args:
        weight: `[out, in]` float16, contiguous; (gate, up) rows interleaved where there is an activation.
        out: `[T, out]`, or `[T, out / 2]` with an activation; rows may be strided. Holds the residual where there is
            one. It and the weight begin at multiples of 16 bytes, and so do all their rows.
        handed_on: results are divided by this, and stay finite; 0 for results as they are.
    """
    rows, (out_features, in_features) = x.values.shape[0], weight.shape
    bias, activation, residual = epilogue
    config = config or (DEFAULT if residual is None else WITH_RESIDUAL)
    count = ceil_div(rows, config.rows) * ceil_div(out_features, config.columns)
    stored = tiles(out, [config.rows, config.columns // 2])
    _half_gemm_kernel[(min(count, _multiprocessors(weight.device)),)](
        tiles(x.values, [config.rows, config.chunk]),
        x.scales,
        tiles(weight, [config.columns, config.chunk]),
        x.scales if bias is None else bias,
        stored,
        stored,
        raised,
        rows,
        out_features,
        in_features=in_features,
        ROWS=config.rows,
        COLUMNS=config.columns,
        CHUNK=config.chunk,
        GROUP=config.group,
        STAGES=config.stages,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        HANDED_ON=handed_on,
        num_warps=config.warps,
    )
