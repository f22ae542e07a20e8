"""Gated products of many activation rows: act(gate) * up where (gate, up) = x W^T, without leaving the pairs in memory.

Bound by arithmetic, `2 * rows * out * in` operations. The library's product writes `rows * out` values, which another
kernel reads to write half as many; here the pairs never leave the registers, which saves `4 * rows * out` bytes of
traffic in a 16-bit dtype. One block a multiprocessor walks the tiles of the result (persistent), those that share rows
of x or W next to one another so that these stay in the L2 cache. The copy engine (TMA, compute capability 9.0 and
later) fetches operands several steps ahead, across the end of a tile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import Activation, gated
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, pdl_supported, tiles
from aphrodite.kernels.triton.paged import card_of


class GatedConfig(NamedTuple):
    """How a gated product is cut.

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


# Takes 196 KiB of shared memory.
DEFAULT = GatedConfig(128, 256, 64, 8, 4, 8)


def gated_gemm_supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the copy engine is there and can address the operands and the result: rows are multiples of 16 bytes.

    Consumer cards have the engine, and too little shared memory to keep it busy.
    """
    out_features, in_features = weight.shape
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and in_features % 8 == 0 and out_features % 16 == 0
    return aligned and weight.itemsize == 2 and pdl_supported(x.device) and card_of(x.device) == "hopper"


def gated_gemm_pays(rows: int, out_features: int, in_features: int) -> bool:
    """Whether it is faster than the library's product and an activation after it, as measured on an H100.

    That is so for thousands of rows, and where a large weight meets a batch that fills two tiles of rows.
    """
    return rows >= 1024 or (192 < rows <= 256 and out_features * in_features >= 1 << 26)


@direct_launch
@triton.jit(do_not_specialize=["rows"])
def _gated_gemm_kernel(
    x,  # descriptor of [T, in], blocks [ROWS, CHUNK]
    weight,  # descriptor of [out, in], blocks [COLUMNS, CHUNK], (gate, up) rows interleaved
    out,  # descriptor of [T, out / 2], blocks [ROWS, COLUMNS / 2]
    rows,
    out_features,
    in_features: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
        gate, up = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
        out.store([row, column // 2], gated(gate, up, ACTIVATION).to(out.dtype))


def gated_gemm(
    x: torch.Tensor, weight: torch.Tensor, activation: Activation, config: GatedConfig = DEFAULT
) -> torch.Tensor:
    """act(gate) * up.

    Args:
        x: `[T, in]`, T > 0.
        weight: `[out, in]` contiguous, (gate, up) rows interleaved; `gated_gemm_supports` both.

    Returns:
        `[T, out / 2]` of x's dtype.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty((rows, out_features // 2), dtype=x.dtype, device=x.device)
    count = ceil_div(rows, config.rows) * ceil_div(out_features, config.columns)
    _gated_gemm_kernel[(min(count, _multiprocessors(x.device)),)](
        tiles(x, [config.rows, config.chunk]),
        tiles(weight, [config.columns, config.chunk]),
        tiles(out, [config.rows, config.columns // 2]),
        rows,
        out_features,
        in_features=in_features,
        ROWS=config.rows,
        COLUMNS=config.columns,
        CHUNK=config.chunk,
        GROUP=config.group,
        STAGES=config.stages,
        ACTIVATION=activation,
        num_warps=config.warps,
    )
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Blocks that walk the tiles; on other devices (compiling, interpreting) any number does."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
