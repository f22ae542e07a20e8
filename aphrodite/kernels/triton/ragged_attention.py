"""Attention of sequences with several query rows each (prefill, extension of a cached prefix), over the paged cache.

Flash attention (arXiv 2205.14135, 2307.08691): a program takes a tile of query rows of one sequence and the query heads
of one KV head, and streams over the keys that they see. The host makes the table of tiles from lengths that it knows,
so nothing waits for the device.

Cost: 4 * heads * head_dim operations a visible (query, key) pair; bound by the matrix units for long prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import launch_dependents, launch_options, pdl_supported, wait_for_producer
from aphrodite.kernels.triton.paged import (
    Card,
    accumulate,
    cache_rows,
    decoded_scale,
    kernel_view,
    kv_format,
    load_tile,
    scores_log2,
)


class RaggedConfig(NamedTuple):
    """Launch parameters: rows of the products (query rows times heads of a group), positions at once."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    def query_rows(self, group: int) -> int:
        """Query rows of a tile where `group` heads share a KV head."""
        return max(1, self.rows // group)


def ragged_config(head_dim: int, dtype: torch.dtype, card: Card, *, fp8_cache: bool = False) -> RaggedConfig:
    """Launch parameters for a head size, compute dtype and card; tiles are as large as registers allow."""
    if dtype == torch.float32:
        return RaggedConfig(rows=32, tile=16, num_warps=8, num_stages=1)
    if card == "hip":
        if head_dim > 128:
            return RaggedConfig(rows=64, tile=32, num_warps=4, num_stages=1)
        return RaggedConfig(rows=128, tile=64 if head_dim <= 64 else 32, num_warps=4, num_stages=2)
    if card == "hopper":
        if head_dim <= 128:
            return RaggedConfig(rows=128, tile=64, num_warps=8, num_stages=3)
        return RaggedConfig(rows=128, tile=16 if fp8_cache else 32, num_warps=8, num_stages=2)
    rows, tile = (64, 32) if head_dim > 128 else (128, 64 if head_dim <= 64 else 32)
    return RaggedConfig(rows=rows, tile=tile, num_warps=8, num_stages=2)


def tile_table(query_lens: np.ndarray, tile_rows: int, first_rows: np.ndarray | None = None) -> np.ndarray:
    """Tiles of query rows of the sequences that have more than one; those with one are decoded.

    Args:
        query_lens: `[R]` query rows of each sequence.
        tile_rows: query rows of a tile, `RaggedConfig.query_rows`.
        first_rows: `[R]` rows of each sequence, from its first on, that are attended elsewhere; none by default.

    Returns:
        `[tiles, 2]` int32: sequence, first query row within it. Late rows, which see most, come first.
    """
    starts = np.zeros_like(query_lens) if first_rows is None else first_rows
    counts = np.where(query_lens > 1, -(-(query_lens - starts) // tile_rows), 0)
    sequences = np.repeat(np.arange(len(query_lens)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = starts[sequences] + within * tile_rows
    order = np.argsort(-rows, kind="stable")
    return np.stack((sequences[order], rows[order]), axis=1).astype(np.int32)


def ragged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    tiles: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    block_tables: torch.Tensor,
    num_heads: int,
    scale: float,
    config: RaggedConfig,
    window: int | None = None,
    softcap: float = 0.0,
) -> None:
    """Causal attention of the query rows in `tiles`; other rows of `out` stay as they are.

    Args:
        query: `[T, >= heads * head_dim]`, transformed queries in front, rows contiguous.
        keys, values: a layer's cache `[num_blocks, kv_heads, block_size, head_dim]`, this step's tokens included; of
            the query's dtype or float8_e4m3fn.
        out: `[T, heads * head_dim]` of the query's dtype.
        tiles: `tile_table` for `config.query_rows(group)`.
        query_start: `[R + 1]` int32, prefix sums of query rows.
        context_lens: `[R]` int32; a sequence's queries are its last positions.
        rows: `[R]` int32, each sequence's row in the block tables.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
        num_heads: of the query.
        scale: factor on query-key products.
        config: launch parameters.
        window: latest positions that a query sees, itself included; None for all.
        softcap: bound of the scores, 0 for none.
    """
    if tiles.shape[0] == 0:
        return
    _, kv_heads, block_size, head_dim = keys.shape
    group = num_heads // kv_heads
    pdl = pdl_supported(query.device)
    _ragged_kernel[(kv_heads, tiles.shape[0])](
        query,
        kernel_view(keys),
        kernel_view(values),
        out,
        tiles,
        query_start,
        context_lens,
        rows,
        block_tables,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        scale,
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERY_ROWS=config.query_rows(group),
        ROWS=max(config.rows, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        WINDOW=window or 0,
        SOFTCAP=softcap,
        FORMAT=int(kv_format(keys)),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )


@triton.jit
def _ragged_kernel(
    query,
    keys,
    values,
    out,
    tiles,
    query_start,
    context_lens,
    rows,
    block_tables,
    query_stride,
    out_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    first_token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_token
    context = tl.load(context_lens + sequence)
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    before = context - queries  # positions ahead of the sequence's first query

    product_row = tl.arange(0, ROWS)
    local = first_row + product_row // GROUP
    heads = head * GROUP + product_row % GROUP
    dims = tl.arange(0, DIM)
    real = (product_row < QUERY_ROWS * GROUP) & (local < queries)
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    token = (first_token + local).to(tl.int64)
    at = before + local  # each row's position

    wait_for_producer(PDL)
    q = tl.load(
        query + (token * query_stride + heads * HEAD_DIM)[:, None] + dims[None, :],
        mask=inside,
        other=0.0,
    )
    if FORMAT != 0:
        q = q.to(tl.float16)
    # [begin, from_all) and [to_all, end) are seen by some rows, what lies between by all.
    first_at = before + first_row
    end = tl.minimum(first_at + QUERY_ROWS, context)
    begin = 0
    from_all = 0
    if WINDOW > 0:
        begin = tl.maximum(first_at - WINDOW + 1, 0) // TILE * TILE
        from_all = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE, tl.cdiv(end, TILE) * TILE)
        from_all = tl.maximum(from_all, begin)
    to_all = tl.maximum((first_at + 1) // TILE * TILE, from_all)

    acc = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if WINDOW > 0:
        acc, peak, total = _stream(
            acc, peak, total, q, keys, values, table, begin, from_all, end, at, head, scale,
            KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, True,
        )  # fmt: skip
    acc, peak, total = _stream(
        acc, peak, total, q, keys, values, table, from_all, to_all, end, at, head, scale,
        KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, False,
    )  # fmt: skip
    acc, peak, total = _stream(
        acc, peak, total, q, keys, values, table, to_all, end, end, at, head, scale,
        KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, True,
    )  # fmt: skip
    result = acc * (decoded_scale(FORMAT) / total)[:, None]
    target = out + (token * out_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _stream(
    acc,
    peak,
    total,
    q,
    keys,
    values,
    table,
    start,
    stop,
    end,
    at,
    head,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Attend to positions [start, stop), by whole tiles; MASKED where not all rows see all of them."""
    for base in range(start, stop, TILE):
        positions = base + tl.arange(0, TILE)
        row = cache_rows(table, positions, end, head, KV_HEADS, BLOCK_SIZE)
        k = load_tile(keys, row, positions < end, HEAD_DIM, DIM, MASKED, FORMAT)
        v = load_tile(values, row, positions < end, HEAD_DIM, DIM, MASKED, FORMAT)
        scores = scores_log2(q, k, scale, SOFTCAP, FORMAT)
        if MASKED:
            seen = positions[None, :] <= at[:, None]
            if WINDOW > 0:
                seen &= positions[None, :] > at[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        acc, peak, total = accumulate(acc, peak, total, scores, v, MASKED)
    return acc, peak, total
