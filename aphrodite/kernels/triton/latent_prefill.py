"""Latent attention of sequences with several query rows each, over the paged cache (absorbed) or over keys and values
that were expanded from it.

Both are flash attention as in `ragged_attention.py`, whose tables say which rows and positions a program takes.
Absorbed, the rows of a product are query rows times heads, all of which see the same vectors: nothing has to be
prepared, but a head and visible pair costs 2 * (2 * rank + turning) operations. Expanded, it costs
2 * (head_dim + value_dim), after products that expand each position of the context once. So few rows after a long
context are absorbed, and long prompts expanded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
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
    load_part,
    score_factor,
    tile_blocks,
    tile_rows,
)
from aphrodite.kernels.triton.ragged_attention import (
    MERGE_FIELDS,
    MERGED_ROWS,
    TILE_FIELDS,
    RaggedConfig,
    TileTable,
    _merge_kernel,
)

MIN_PRODUCT = 16  # rows and depth of tl.dot


def absorbed_config(dtype: torch.dtype, card: Card, *, fp8_cache: bool) -> RaggedConfig:
    """Launch parameters for latents of some 512 dimensions: registers hold ROWS of them in float32."""
    if dtype == torch.float32:
        return RaggedConfig(rows=16, tile=16, num_warps=8, num_stages=1)
    if card == "hip":
        return RaggedConfig(rows=16 if fp8_cache else 32, tile=16, num_warps=4, num_stages=1)
    if card == "hopper" and not fp8_cache:
        return RaggedConfig(rows=64, tile=32, num_warps=8, num_stages=3)
    return RaggedConfig(rows=32, tile=16, num_warps=8, num_stages=3)


def expanded_config(dtype: torch.dtype, card: Card, widest: int) -> RaggedConfig:
    """Launch parameters; the rows of a tile are those of one head.

    Args:
        widest: dimensions of a head's value, or of its key but for those that turn.
    """
    if dtype == torch.float32:
        return RaggedConfig(rows=32 if widest <= 128 else 16, tile=16, num_warps=8, num_stages=1)
    if widest > 128:
        if card == "hip":
            return RaggedConfig(rows=64, tile=32, num_warps=4, num_stages=2)
        if card == "hopper":
            return RaggedConfig(rows=128, tile=32, num_warps=8, num_stages=3)
        return RaggedConfig(rows=64, tile=32, num_warps=8, num_stages=2)
    if card == "hip":
        return RaggedConfig(rows=128, tile=32, num_warps=4, num_stages=1)
    if card == "hopper":
        return RaggedConfig(rows=128, tile=64, num_warps=8, num_stages=3)
    return RaggedConfig(rows=64, tile=32, num_warps=4, num_stages=3)


def absorbed_attention(
    absorbed: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    *,
    table: TileTable,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    block_tables: torch.Tensor,
    head_dim: int,
    scale: float,
    config: RaggedConfig,
    heads: int,
) -> None:
    """Causal attention of the query rows in `table` over cached latents; other rows of `out` stay as they are.

    Args:
        absorbed, query, cache, out, head_dim, scale: as `latent_decode`.
        table: `tile_table` for the same config and `heads` as the group, on the device.
        query_start: `[R + 1]` int32, prefix sums of query rows.
        context_lens: `[R]` int32; a sequence's queries are its last positions.
        rows: `[R]` int32, each sequence's row in the block tables.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
        config: launch parameters.
        heads: of a program, a divisor of all.
    """
    tiles, merges = table
    if tiles.shape[0] == 0:
        return
    _, all_heads, rank = absorbed.shape
    turning = cache.shape[2] - rank
    product_rows = max(config.rows, next_power_of_2(heads))
    slots = tiles.shape[0] if merges.shape[0] else 0
    blocks = all_heads // heads
    partials = torch.empty((slots, blocks, product_rows, rank), dtype=torch.float32, device=out.device)
    statistics = torch.empty((slots, blocks, 2, product_rows), dtype=torch.float32, device=out.device)
    pdl = pdl_supported(out.device)
    rank_pad = max(MIN_PRODUCT, next_power_of_2(rank))
    _absorbed_kernel[(blocks, tiles.shape[0])](
        absorbed,
        query,
        kernel_view(cache),
        out,
        tiles,
        query_start,
        context_lens,
        rows,
        block_tables,
        partials,
        statistics,
        query.stride(0),
        block_tables.stride(0),
        scale,
        HEADS=all_heads,
        HEAD_DIM=head_dim,
        GROUP=heads,
        QUERY_ROWS=config.query_rows(heads),
        ROWS=product_rows,
        RANK=rank,
        RANK_PAD=rank_pad,
        TURNING=turning,
        TURNING_PAD=max(MIN_PRODUCT, next_power_of_2(turning)),
        BLOCK_SIZE=cache.shape[1],
        TILE=config.tile,
        FORMAT=int(kv_format(cache)),
        FIELDS=TILE_FIELDS,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )
    if merges.shape[0] == 0:
        return
    _merge_kernel[(blocks, merges.shape[0], product_rows // MERGED_ROWS)](
        out,
        merges,
        query_start,
        statistics,  # no sinks
        partials,
        statistics,
        out.stride(0),
        KV_HEADS=blocks,
        GROUP=heads,
        QUERY_ROWS=config.query_rows(heads),
        ROWS=product_rows,
        HEAD_DIM=rank,
        DIM=rank_pad,
        PART=MERGED_ROWS,
        HAS_SINKS=False,
        FIELDS=MERGE_FIELDS,
        PDL=pdl,
        num_warps=4,
        num_stages=3,
        **launch_options(pdl),
    )


def expanded_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    shared: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    first_head: int,
    tiles: torch.Tensor,
    key_start: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    head_dim: int,
    scale: float,
    config: RaggedConfig,
) -> None:
    """Causal attention of some heads of the query rows in `tiles`; what else is in `out` stays as it is.

    Args:
        query: `[T, >= heads * head_dim]`, rows contiguous; of each head the last dimensions have been turned.
        keys: `[n, N, head_dim - turning]` contiguous, of heads `first_head` to `first_head + n - 1`.
        shared: `[N, turning]`, rows of any stride: the keys' turned dimensions, the same for all heads.
        values: `[n, N, value_dim]` contiguous.
        out: `[T, heads, value_dim]` contiguous, of the query's dtype.
        tiles: of `tile_table` for the same config and a group of one, unsplit, on the device.
        key_start: `[R]` int32, row of `keys` where each sequence's context begins.
        query_start: `[R + 1]` int32, prefix sums of query rows.
        context_lens: `[R]` int32; a sequence's queries are its last positions.
        scale: factor on scores, positive.
        config: launch parameters.
    """
    count, positions, nope = keys.shape
    turning, value_dim = head_dim - nope, values.shape[2]
    pdl = pdl_supported(out.device)
    _expanded_kernel[(count, tiles.shape[0])](
        query,
        keys,
        shared,
        values,
        out,
        tiles,
        key_start,
        query_start,
        context_lens,
        query.stride(0),
        positions,
        first_head,
        scale,
        HEADS=out.shape[1],
        NOPE=nope,
        NOPE_PAD=max(MIN_PRODUCT, next_power_of_2(nope)),
        TURNING=turning,
        TURNING_PAD=max(MIN_PRODUCT, next_power_of_2(turning)),
        SHARED_STRIDE=shared.stride(0),
        VALUE_DIM=value_dim,
        VALUE_PAD=max(MIN_PRODUCT, next_power_of_2(value_dim)),
        ROWS=config.rows,
        TILE=config.tile,
        FIELDS=TILE_FIELDS,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit
def _absorbed_kernel(
    absorbed,
    query,
    cache,
    out,
    tiles,
    query_start,
    context_lens,
    rows,
    block_tables,
    partials,
    statistics,
    query_stride,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    TURNING: tl.constexpr,
    TURNING_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    head_block = tl.program_id(0)
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
    second = tile_blocks(table, start + TILE, stop, TILE, BLOCK_SIZE)  # as in latent_decode.py

    product_row = tl.arange(0, ROWS)
    local = first_row + product_row // GROUP
    heads = head_block * GROUP + product_row % GROUP
    dims = tl.arange(0, RANK_PAD)
    turn = tl.arange(0, TURNING_PAD)
    real = (product_row < QUERY_ROWS * GROUP) & (local < queries)
    inside = real[:, None] & (dims < RANK)[None, :]
    token = (first_token + local).to(tl.int64)
    at = before + local  # each row's position
    factor = score_factor(scale, 0.0, FORMAT)

    wait_for_producer(PDL)
    where = (token * HEADS + heads)[:, None] * RANK + dims[None, :]
    q = tl.load(absorbed + where, mask=inside, other=0.0)
    turned = query + (token * query_stride + heads * HEAD_DIM + (HEAD_DIM - TURNING))[:, None] + turn[None, :]
    q_turned = tl.load(turned, mask=real[:, None] & (turn < TURNING)[None, :], other=0.0)
    if FORMAT != 0:
        q = q.to(tl.float16)
        q_turned = q_turned.to(tl.float16)
    to_all = before + first_row + 1  # positions seen by all rows

    acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(start, stop, TILE):
        row = tile_rows(blocks, base, 0, TILE, 1, BLOCK_SIZE)
        blocks = tl.where(base < stop, second, 0)
        second = tile_blocks(table, base + 2 * TILE, stop, TILE, BLOCK_SIZE)
        positions = base + tl.arange(0, TILE)
        latents = load_part(cache, row, positions < stop, RANK + TURNING, 0, RANK, RANK_PAD, FORMAT)
        keys = load_part(cache, row, positions < stop, RANK + TURNING, RANK, TURNING, TURNING_PAD, FORMAT)
        scores = tl.dot(q_turned, tl.trans(keys), input_precision="ieee")
        scores = tl.dot(q, tl.trans(latents), scores, input_precision="ieee")
        if base + TILE > to_all:
            scores = tl.where(positions[None, :] <= at[:, None], scores, float("-inf"))
        acc, peak, total = accumulate(acc, peak, total, scores, latents, factor, True)
    acc *= decoded_scale(FORMAT)

    if slot < 0:
        tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        index = (slot * (HEADS // GROUP) + head_block).to(tl.int64) * ROWS
        tl.store(partials + (index + product_row)[:, None] * RANK + dims[None, :], acc, mask=inside)
        tl.store(statistics + 2 * index + product_row, peak * factor)
        tl.store(statistics + 2 * index + ROWS + product_row, total)


@direct_launch
@triton.jit(do_not_specialize=["positions", "first_head"])
def _expanded_kernel(
    query,
    keys,
    shared,
    values,
    out,
    tiles,
    key_start,
    query_start,
    context_lens,
    query_stride,
    positions,
    first_head,
    scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_PAD: tl.constexpr,
    TURNING: tl.constexpr,
    TURNING_PAD: tl.constexpr,
    SHARED_STRIDE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    part = tl.program_id(0)
    head = first_head + part
    record = tiles + tl.program_id(1) * FIELDS
    sequence = tl.load(record)
    first_row = tl.load(record + 1)
    stop = tl.load(record + 3)
    first_token = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first_token
    before = tl.load(context_lens + sequence) - queries
    first_key = tl.load(key_start + sequence).to(tl.int64)

    local = first_row + tl.arange(0, ROWS)
    real = (local < queries)[:, None]
    dims, turn, value_dims = tl.arange(0, NOPE_PAD), tl.arange(0, TURNING_PAD), tl.arange(0, VALUE_PAD)
    token = (first_token + local).to(tl.int64)
    source = query + (token * query_stride + head * (NOPE + TURNING))[:, None]
    factor = score_factor(scale, 0.0, 0)
    to_all = before + first_row + 1
    within = tl.arange(0, TILE)
    key_rows = part.to(tl.int64) * positions + first_key + within

    wait_for_producer(PDL)
    q = tl.load(source + dims[None, :], mask=real & (dims < NOPE)[None, :], other=0.0)
    q_turned = tl.load(source + NOPE + turn[None, :], mask=real & (turn < TURNING)[None, :], other=0.0)
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(0, stop, TILE):
        there = base + within < stop
        k = load_part(keys, key_rows + base, there, NOPE, 0, NOPE, NOPE_PAD, 0)
        k_turned = load_part(shared, first_key + base + within, there, SHARED_STRIDE, 0, TURNING, TURNING_PAD, 0)
        v = load_part(values, key_rows + base, there, VALUE_DIM, 0, VALUE_DIM, VALUE_PAD, 0)
        scores = tl.dot(q_turned, tl.trans(k_turned), input_precision="ieee")
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        if base + TILE > to_all:
            scores = tl.where((base + within)[None, :] <= (before + local)[:, None], scores, float("-inf"))
        acc, peak, total = accumulate(acc, peak, total, scores, v, factor, True)
    target = out + (token * HEADS + head)[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real & (value_dims < VALUE_DIM)[None, :])
