"""Low-rank adapters (arXiv 2106.09685), many in one batch: out += s (x A^T) B^T for the rows that have one.

Rows of one adapter are in tiles (`adapter_tiles`), so each of two kernels is a small product a tile: `shrink` makes
x A^T, cut along `in` into splits that leave float32 partial sums, and `expand` adds those up in order, multiplies by B
and adds to the product of the layer. A tile's rows are independent, and rows without an adapter are in none.

Cost: bound by reading A and B once a tile, `rank * (in + out) * itemsize` bytes each; arithmetic is
`2 * rank * (in + out)` operations a row. With few rows both last as long as a launch does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import Activation, gated
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)

SMALL_TILE, LARGE_TILE = 16, 64  # rows
LARGE_ROWS = 512  # from which a step's tiles are large
LEAST_RANK = 16
_CHUNK = 64  # values of `in` at a time
_SPLIT, _LONG_SPLIT = 512, 4096  # values of `in` a partial sum, of few tiles and of many
_FEW_TILES = 16
_COLUMNS = 64  # of the result, a block


class AdapterStack(NamedTuple):
    """The matrices of all slots for one layer, whose weight may be several stacked ones, its parts.

    Attributes:
        a: `[slots, parts * rank, in]`.
        b: `[slots, out, rank]`, parts one behind the other.
        scales: `[slots, parts]` float32.
        blocks: `[n, 4]` int32: of each block of the result its part, first row of b, first row in its part, rows.
        rank: a power of two from 16 on.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    blocks: torch.Tensor
    rank: int


def result_blocks(rows: tuple[int, ...]) -> np.ndarray:
    """`AdapterStack.blocks` for parts of so many rows."""
    blocks = []
    first = 0
    for part, count in enumerate(rows):
        blocks += [(part, first + row, row, min(_COLUMNS, count - row)) for row in range(0, count, _COLUMNS)]
        first += count
    return np.array(blocks, dtype=np.int32)


def tile_count(rows: int, slots: int) -> tuple[int, int]:
    """Rows of a tile, and tiles that any step of so many rows and adapters gets by with."""
    tile = SMALL_TILE if rows <= LARGE_ROWS else LARGE_TILE
    return tile, min(rows, slots + rows // tile)


def adapter_tiles(token_slots: np.ndarray, rows: int, slots: int) -> np.ndarray:
    """The rows of each adapter, in tiles.

    Args:
        token_slots: `[T]` int32, each row's slot, -1 for none.
        rows: T, or more where the step is padded.

    Returns:
        `[tiles, 1 + tile]` int32, as many as `tile_count` says: a slot (-1: the tile is empty), then rows, -1 for none.
    """
    tile, count = tile_count(rows, slots)
    tiles = np.full((count, 1 + tile), -1, dtype=np.int32)
    used = 0
    for slot in np.unique(token_slots):
        if slot < 0:
            continue
        own = np.flatnonzero(token_slots == slot)
        for first in range(0, len(own), tile):
            part = own[first : first + tile]
            tiles[used, 0] = slot
            tiles[used, 1 : 1 + len(part)] = part
            used += 1
    return tiles


@direct_launch
@triton.jit
def _shrink_kernel(
    x,  # [T, IN], rows may be strided
    x_stride,
    tiles,  # [tiles, 1 + TILE]
    a,  # [slots, LOW, IN]
    low,  # [splits, tiles, TILE, LOW] float32
    num_tiles,
    IN: tl.constexpr,
    LOW: tl.constexpr,  # parts * rank
    BLOCK_LOW: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    tile, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_producer(PDL)
    slot = tl.load(tiles + tile * (1 + TILE))
    if slot < 0:
        return
    rows = tl.load(tiles + tile * (1 + TILE) + 1 + tl.arange(0, TILE))
    there = rows >= 0
    columns = tl.arange(0, CHUNK)
    ranks = block * BLOCK_LOW + tl.arange(0, BLOCK_LOW)
    values = x + tl.where(there, rows, 0).to(tl.int64)[:, None] * x_stride + columns[None, :]
    matrix = a + (slot.to(tl.int64) * LOW + ranks[:, None]) * IN + columns[None, :]
    total = tl.zeros((TILE, BLOCK_LOW), dtype=tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, IN), CHUNK):
        inside = start + columns < IN
        own = tl.load(values + start, mask=there[:, None] & inside[None, :], other=0.0)
        weights = tl.load(matrix + start, mask=(ranks < LOW)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(own, tl.trans(weights), total, input_precision="ieee")
    out = low + ((split.to(tl.int64) * num_tiles + tile) * TILE + tl.arange(0, TILE)[:, None]) * LOW + ranks[None, :]
    tl.store(out, total, mask=(ranks < LOW)[None, :])


@direct_launch
@triton.jit
def _expand_kernel(
    low,  # [splits, tiles, TILE, PARTS * RANK] float32
    tiles,  # [tiles, 1 + TILE]
    b,  # [slots, b_rows, RANK]
    scales,  # [slots, PARTS] float32
    blocks,  # [n, 4]
    out,  # [T, columns], added to
    out_stride,
    num_tiles,
    b_rows,
    GROUP: tl.constexpr,  # columns of a part that lie together; 0: each part is one run
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    tile, block = tl.program_id(0), tl.program_id(1)
    wait_for_producer(PDL)
    slot = tl.load(tiles + tile * (1 + TILE)).to(tl.int64)
    if slot < 0:
        return
    rows = tl.load(tiles + tile * (1 + TILE) + 1 + tl.arange(0, TILE))
    part = tl.load(blocks + block * 4)
    first = tl.load(blocks + block * 4 + 1)
    within = tl.load(blocks + block * 4 + 2)
    count = tl.load(blocks + block * 4 + 3)
    columns, ranks = tl.arange(0, COLUMNS), tl.arange(0, RANK)
    inside = columns < count
    weights = tl.load(
        b + (slot * b_rows + first + columns[:, None]) * RANK + ranks[None, :], mask=inside[:, None], other=0.0
    )
    place = (tile * TILE + tl.arange(0, TILE)[:, None]) * (PARTS * RANK) + part * RANK + ranks[None, :]
    total = tl.zeros((TILE, RANK), dtype=tl.float32)
    for _ in range(SPLITS):
        total += tl.load(low + place)
        low += num_tiles * (TILE * PARTS * RANK)
    total = total * tl.load(scales + slot * PARTS + part)
    added = tl.dot(total.to(weights.dtype), tl.trans(weights), input_precision="ieee")
    if GROUP:
        at = within + columns
        at = at // GROUP * (PARTS * GROUP) + part * GROUP + at % GROUP
    else:
        at = first + columns
    target = out + tl.where(rows >= 0, rows, 0).to(tl.int64)[:, None] * out_stride + at[None, :]
    mask = (rows >= 0)[:, None] & inside[None, :]
    summed = tl.load(target, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(target, summed.to(out.dtype.element_ty), mask=mask)


def add_adapters(x: torch.Tensor, out: torch.Tensor, tiles: torch.Tensor, stack: AdapterStack, group: int = 0) -> None:
    """Add to `out` what the adapters of its rows make of `x`.

    Args:
        x: `[T, in]` of the stack's dtype, rows may be strided.
        out: `[T, columns]` of the same.
        tiles: `adapter_tiles` on the device.
        group: how many columns of a part lie together in `out`; 0: all of them, parts one behind the other.
    """
    num_tiles, tile = tiles.shape[0], tiles.shape[1] - 1
    if num_tiles == 0:
        return
    in_features, parts = x.shape[1], stack.scales.shape[1]
    wide = parts * stack.rank
    split = _SPLIT if num_tiles <= _FEW_TILES else _LONG_SPLIT
    splits = ceil_div(in_features, split)
    low = torch.empty((splits, num_tiles, tile, wide), dtype=torch.float32, device=x.device)
    block = min(64, stack.rank)
    pdl = pdl_supported(x.device)
    _shrink_kernel[(num_tiles, ceil_div(wide, block), splits)](
        x,
        x.stride(0),
        tiles,
        stack.a,
        low,
        num_tiles,
        IN=in_features,
        LOW=wide,
        BLOCK_LOW=block,
        SPLIT=split,
        CHUNK=_CHUNK,
        TILE=tile,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    _expand_kernel[(num_tiles, stack.blocks.shape[0])](
        low,
        tiles,
        stack.b,
        stack.scales,
        stack.blocks,
        out,
        out.stride(0),
        num_tiles,
        stack.b.shape[1],
        GROUP=group,
        PARTS=parts,
        RANK=stack.rank,
        SPLITS=splits,
        COLUMNS=_COLUMNS,
        TILE=tile,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit
def _gated_groups_kernel(
    product,  # [T, 2 * inner]
    out,  # [T, inner]
    inner,
    GROUP: tl.constexpr,  # 0: all gates, then all ups
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    wait_for_producer(PDL)
    if GROUP:
        gates, apart = at // GROUP * (2 * GROUP) + at % GROUP, GROUP
    else:
        gates, apart = at, inner
    gate = tl.load(product + row * 2 * inner + gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(product + row * 2 * inner + gates + apart, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + at, gated(gate, up, ACTIVATION).to(out.dtype.element_ty), mask=inside)


def gated_groups(product: torch.Tensor, activation: Activation, group: int) -> torch.Tensor:
    """act(gate) * up, whatever the order of columns.

    Args:
        product: `[T, 2 * inner]` contiguous; `group` columns of gate, as many of up, and so on; 0: all of each.

    Returns:
        `[T, inner]` of the same dtype.
    """
    rows, inner = product.shape[0], product.shape[1] // 2
    out = torch.empty((rows, inner), dtype=product.dtype, device=product.device)
    if rows == 0:
        return out
    block = min(1024, next_power_of_2(inner))
    pdl = pdl_supported(product.device)
    _gated_groups_kernel[(rows, ceil_div(inner, block))](
        product,
        out,
        inner,
        GROUP=group,
        ACTIVATION=activation,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
