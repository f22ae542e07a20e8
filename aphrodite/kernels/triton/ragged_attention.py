"""Attention of sequences with several query rows each (prefill, extension of a cached prefix), over the paged cache.

Flash attention (arXiv 2205.14135, 2307.08691): a program takes a tile of query rows of one sequence and the query heads
of one KV head, and streams over the keys that they see, or over a part of them: few tiles with much to see, as a short
message after a long chat has, are split along the keys and a second kernel merges the parts. The host makes the table
of tiles from lengths that it knows, so nothing waits for the device.

Cost: 4 * heads * head_dim operations a visible (query, key) pair; bound by the matrix units for long prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
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
from aphrodite.kernels.triton.paged import (
    Card,
    accumulate,
    decoded_scale,
    kernel_view,
    kv_format,
    load_tile,
    score_factor,
    scores_of,
    tile_blocks,
    tile_rows,
    with_sink,
)

TILE_FIELDS = 5  # int32 of a row of `TileTable.tiles`
MERGE_FIELDS = 4  # and of `TileTable.merges`
MERGED_ROWS = 16  # product rows that one program of the merging kernel takes
BEHIND = 1 << 28  # a query row that no sequence has
MIN_SHARE = 8  # tiles of keys below which splitting is not worth the merge


class RaggedConfig(NamedTuple):
    """Launch parameters.

    Attributes:
        rows: of the products: query rows times heads of a group.
        tile: positions at once.
        num_warps, num_stages: of a program.
    """

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
            return RaggedConfig(rows=64, tile=16 if fp8_cache else 32, num_warps=4, num_stages=1)
        return RaggedConfig(rows=128, tile=64 if head_dim <= 64 else 32, num_warps=4, num_stages=2)
    if card == "hopper":
        if head_dim <= 128:
            return RaggedConfig(rows=128, tile=64, num_warps=8, num_stages=4)
        return RaggedConfig(rows=128, tile=16 if fp8_cache else 32, num_warps=8, num_stages=3)
    rows, tile = (64, 32) if head_dim > 128 else (128, 64 if head_dim <= 64 else 32)
    return RaggedConfig(rows=rows, tile=tile, num_warps=8, num_stages=2)


class TileTable(NamedTuple):
    """A step's work, for layers of one window.

    Attributes:
        tiles: `[n, TILE_FIELDS]` int32: sequence, first query row within it, positions [start, stop) of the keys, slot
            of the partial results or -1 where these are all that the rows see. Start is a multiple of the keys' tile.
        merges: `[m, MERGE_FIELDS]` int32: sequence, first query row, first slot and number of the partial results.
    """

    tiles: Any  # np.ndarray on the host, torch.Tensor on the device
    merges: Any


def tile_table(
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    config: RaggedConfig,
    *,
    group: int,
    kv_heads: int,
    programs: int,
    window: int | None = None,
    first_rows: np.ndarray | None = None,
) -> TileTable:
    """Tiles of query rows of the sequences that have more than one; those with one are decoded.

    Where there are few tiles, the keys of those that see much are split, so that the whole card has work: each part's
    share is about what a program would get if the keys of all tiles were dealt out evenly.

    Args:
        query_lens, context_lens: `[R]` query rows of each sequence, its positions in the cache after the step.
        config: of the kernel.
        group, kv_heads: of the model.
        programs: to deal the keys out to.
        window: latest positions that a query sees, itself included; None for all.
        first_rows: `[R]` rows of each sequence, from its first on, that are attended elsewhere; none by default.

    Returns:
        NumPy arrays; the programs that work longest come first.
    """
    query, context = query_lens.astype(np.int64), context_lens.astype(np.int64)
    starts = np.zeros_like(query) if first_rows is None else first_rows
    tile_rows = config.query_rows(group)
    counts = np.where(query > 1, -(-(query - starts) // tile_rows), 0)
    sequence = np.repeat(np.arange(len(query)), counts)
    row = starts[sequence] + (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    first_at = context[sequence] - query[sequence] + row
    stop = np.minimum(first_at + tile_rows, context[sequence])
    start = np.zeros_like(stop)
    if window is not None:
        start = np.maximum(first_at - window + 1, 0) // config.tile * config.tile

    steps = -(-(stop - start) // config.tile)
    share = max(MIN_SHARE, -(-int(steps.sum()) * kv_heads // programs))
    size = -(-steps // np.maximum(steps // share, 1))  # of a part
    parts = -(-steps // np.maximum(size, 1))
    slots = np.where(parts > 1, parts, 0)
    first_slot = np.cumsum(slots) - slots
    tile = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = start[tile] + part * size[tile] * config.tile
    end = np.minimum(begin + size[tile] * config.tile, stop[tile])
    slot = np.where(parts[tile] > 1, first_slot[tile] + part, -1)
    tiles = np.stack((sequence[tile], row[tile], begin, end, slot), axis=1)
    split = parts > 1
    merges = np.stack((sequence[split], row[split], first_slot[split], parts[split]), axis=1)
    order = np.argsort(begin - end, kind="stable")
    return TileTable(tiles[order].astype(np.int32), merges.astype(np.int32))


class TableCapacity(NamedTuple):
    """Rows of a padded `TileTable`, and slots for partial results."""

    tiles: int
    merges: int
    slots: int


def table_capacity(
    tokens: int, sequences: int, config: RaggedConfig, *, group: int, kv_heads: int, programs: int
) -> TableCapacity:
    """What `tile_table` makes at most of `tokens` query rows of `sequences`; other arguments as there.

    Every sequence may end in the midst of a tile, and splitting makes no more parts than shares of the keys were dealt.
    """
    shares = ceil_div(programs, kv_heads)
    whole = ceil_div(tokens, config.query_rows(group)) + min(sequences, tokens // 2)
    return TableCapacity(whole + shares, shares // 2 + 1, shares)


def pad_table(table: TileTable, capacity: TableCapacity) -> TileTable | None:
    """The table with rows that name nothing at its end, so that its size tells nothing; None if there is no room.

    A tile's first row lies behind all queries then, and a merge is one of no parts.
    """
    tiles, merges = table
    if len(tiles) > capacity.tiles or len(merges) > capacity.merges or tiles[:, 4].max(initial=-1) >= capacity.slots:
        return None
    padded = TileTable(
        np.full((capacity.tiles, TILE_FIELDS), (0, BEHIND, 0, 0, -1), dtype=np.int32),
        np.full((capacity.merges, MERGE_FIELDS), (0, BEHIND, 0, 0), dtype=np.int32),
    )
    padded.tiles[: len(tiles)], padded.merges[: len(merges)] = tiles, merges
    return padded


def ragged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    table: TileTable,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    block_tables: torch.Tensor,
    num_heads: int,
    scale: float,
    config: RaggedConfig,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slots: int | None = None,
) -> None:
    """Causal attention of the query rows in `table`; other rows of `out` stay as they are.

    Args:
        query: `[T, >= heads * head_dim]`, transformed queries in front, rows contiguous.
        keys, values: a layer's cache `[num_blocks, kv_heads, block_size, head_dim]`, this step's tokens included; of
            the query's dtype or float8_e4m3fn.
        out: `[T, heads * head_dim]` of the query's dtype.
        table: `tile_table` for the same config and window, on the device.
        query_start: `[R + 1]` int32, prefix sums of query rows.
        context_lens: `[R]` int32; a sequence's queries are its last positions.
        rows: `[R]` int32, each sequence's row in the block tables.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
        num_heads: of the query.
        scale: factor on query-key products, positive.
        config: launch parameters.
        window: latest positions that a query sees, itself included; None for all.
        softcap: bound of the scores, 0 for none.
        sinks: `[heads]` float32, a score of each head that takes part in its softmax and adds no value.
        slots: for partial results; by default as many as there could be for tiles of this number.
    """
    tiles, merges = table
    if tiles.shape[0] == 0:
        return
    _, kv_heads, block_size, head_dim = keys.shape
    group = num_heads // kv_heads
    product_rows = max(config.rows, next_power_of_2(group))
    dim = next_power_of_2(head_dim)
    if slots is None:
        slots = tiles.shape[0] if merges.shape[0] else 0
    partials = torch.empty((slots, kv_heads, product_rows, head_dim), dtype=torch.float32, device=query.device)
    statistics = torch.empty((slots, kv_heads, 2, product_rows), dtype=torch.float32, device=query.device)
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
        query if sinks is None else sinks,
        partials,
        statistics,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        scale,
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERY_ROWS=config.query_rows(group),
        ROWS=product_rows,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        WINDOW=window or 0,
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        FORMAT=int(kv_format(keys)),
        FIELDS=TILE_FIELDS,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )
    if merges.shape[0] == 0:
        return
    _merge_kernel[(kv_heads, merges.shape[0], product_rows // MERGED_ROWS)](
        out,
        merges,
        query_start,
        query if sinks is None else sinks,
        partials,
        statistics,
        out.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERY_ROWS=config.query_rows(group),
        ROWS=product_rows,
        HEAD_DIM=head_dim,
        DIM=dim,
        PART=MERGED_ROWS,
        HAS_SINKS=sinks is not None,
        FIELDS=MERGE_FIELDS,
        PDL=pdl,
        num_warps=4,
        num_stages=3,
        **launch_options(pdl),
    )


@direct_launch
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
    sinks,
    partials,
    statistics,
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
    HAS_SINKS: tl.constexpr,
    FORMAT: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    head = tl.program_id(0)
    record = tiles + tl.program_id(1) * FIELDS
    sequence = tl.load(record)
    first_row = tl.load(record + 1)
    start = tl.load(record + 2)
    stop = tl.load(record + 3)
    slot = tl.load(record + 4)
    first_token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_token
    before = tl.load(context_lens + sequence) - queries  # positions ahead of the sequence's first query
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    blocks = tile_blocks(table, start, stop, TILE, BLOCK_SIZE)

    product_row = tl.arange(0, ROWS)
    local = first_row + product_row // GROUP
    heads = head * GROUP + product_row % GROUP
    dims = tl.arange(0, DIM)
    real = (product_row < QUERY_ROWS * GROUP) & (local < queries)
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    token = (first_token + local).to(tl.int64)
    at = before + local  # each row's position
    factor = score_factor(scale, SOFTCAP, FORMAT)

    wait_for_producer(PDL)
    q = tl.load(
        query + (token * query_stride + heads * HEAD_DIM)[:, None] + dims[None, :],
        mask=inside,
        other=0.0,
    )
    if FORMAT != 0:
        q = q.to(tl.float16)
    first_at = before + first_row  # [from_all, to_all) is seen by all rows
    to_all = first_at + 1
    from_all = first_at + QUERY_ROWS - WINDOW if WINDOW > 0 else 0

    acc = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(start, stop, TILE):
        row = tile_rows(blocks, base, head, TILE, KV_HEADS, BLOCK_SIZE)
        blocks = tile_blocks(table, base + TILE, stop, TILE, BLOCK_SIZE)
        positions = base + tl.arange(0, TILE)
        k = load_tile(keys, row, positions < stop, HEAD_DIM, DIM, True, FORMAT)
        v = load_tile(values, row, positions < stop, HEAD_DIM, DIM, True, FORMAT)
        scores = scores_of(q, k, scale, SOFTCAP, FORMAT)
        if (base + TILE > to_all) | (base < from_all):
            seen = positions[None, :] <= at[:, None]
            if WINDOW > 0:
                seen &= positions[None, :] > at[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        acc, peak, total = accumulate(acc, peak, total, scores, v, factor, True)
    acc *= decoded_scale(FORMAT)

    if slot < 0:
        total = with_sink(total, peak * factor, sinks, heads, real, HAS_SINKS)
        result = acc / total[:, None]
        target = out + (token * out_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    else:
        index = (slot * KV_HEADS + head).to(tl.int64) * ROWS
        tl.store(partials + (index + product_row)[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(statistics + 2 * index + product_row, peak * factor)
        tl.store(statistics + 2 * index + ROWS + product_row, total)


@direct_launch
@triton.jit
def _merge_kernel(
    out,
    merges,
    query_start,
    sinks,
    partials,
    statistics,
    out_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes PART rows of one split tile and head: partial results weighted by their share of the softmax."""
    launch_dependents(PDL)
    head = tl.program_id(0)
    record = merges + tl.program_id(1) * FIELDS
    sequence = tl.load(record)
    first_row = tl.load(record + 1)
    first_slot = tl.load(record + 2)
    chunks = tl.load(record + 3)
    first_token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_token
    product_row = tl.program_id(2) * PART + tl.arange(0, PART)
    local = first_row + product_row // GROUP
    dims = tl.arange(0, DIM)
    real = (product_row < QUERY_ROWS * GROUP) & (local < queries)
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]

    wait_for_producer(PDL)
    acc = tl.zeros([PART, DIM], tl.float32)
    peak = tl.full([PART], float("-inf"), tl.float32)
    total = tl.zeros([PART], tl.float32)
    for slot in range(first_slot, first_slot + chunks):
        index = (slot * KV_HEADS + head).to(tl.int64) * ROWS
        part = tl.load(partials + (index + product_row)[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        part_peak = tl.load(statistics + 2 * index + product_row)
        part_total = tl.load(statistics + 2 * index + ROWS + product_row)
        new_peak = tl.maximum(peak, part_peak)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows may have seen nothing in a chunk
        keep, weight = tl.exp2(peak - shift), tl.exp2(part_peak - shift)
        acc = acc * keep[:, None] + part * weight[:, None]
        total = total * keep + part_total * weight
        peak = new_peak
    token = (first_token + local).to(tl.int64)
    heads = head * GROUP + product_row % GROUP
    total = with_sink(total, peak, sinks, heads, real, HAS_SINKS)
    target = out + (token * out_stride + heads * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
