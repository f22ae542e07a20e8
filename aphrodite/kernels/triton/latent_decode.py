"""Absorbed latent attention of sequences with one query row each, split along the context.

Queries that were taken to the latent meet the cached vectors as one key that all heads share; the same tile, but for
its turning part, is the value. So a tile is read once for all heads of a program, which are the rows of its products,
or their columns where tensor cores read both operands from shared memory (Hopper): 16 heads are few rows. Contexts are
divided as by `decode_attention.py`; a second kernel puts the chunks of a context together, for with so many values a
head that is too much for the last program to do alone.

Cost: context * (rank + turning) elements read a sequence and block of heads, 2 * heads * (2 * rank + turning)
operations a position: bound by memory traffic up to some 64 heads, by the matrix units above.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.decode_attention import (
    RECORD,
    DecodeConfig,
    DecodePlan,
)
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

MIN_PRODUCT = 16  # rows and depth of tl.dot
MERGED_CHUNKS = 32  # whose partial results are loaded at once


class LatentDecodeConfig(NamedTuple):
    """Launch parameters.

    Attributes:
        heads: of a program.
        decode: tile of positions, warps and stages.
        positions_first: positions are the rows of the products, heads the columns.
        programs: that a multiprocessor runs at the same time.
    """

    heads: int
    decode: DecodeConfig
    positions_first: bool
    programs: int

    def head_blocks(self, num_heads: int) -> int:
        """Programs that share a chunk's heads."""
        return -(-num_heads // self.heads)

    def target(self, num_heads: int, sequences: int, multiprocessors: int) -> int:
        """Chunks to aim at: as many as run at the same time, or where there are more sequences than that, twice as
        many, so that the last to run are short."""
        at_once = max(1, self.programs * multiprocessors // self.head_blocks(num_heads))
        return at_once if sequences <= at_once else 2 * at_once


def latent_decode_config(num_heads: int, dtype: torch.dtype, card: Card, *, fp8_cache: bool) -> LatentDecodeConfig:
    """Launch parameters for a number of heads, compute dtype and card.

    Where heads are rows, each warp holds the queries of all its program's heads in registers: more would not fit.
    """
    heads = min(num_heads, MIN_PRODUCT)
    if dtype == torch.float32 or card == "hip":
        return LatentDecodeConfig(heads, DecodeConfig(tile=16, num_warps=4, num_stages=1), False, 1)
    if fp8_cache:
        return LatentDecodeConfig(heads, DecodeConfig(tile=16, num_warps=4, num_stages=2), False, 2)
    if card == "hopper":
        return LatentDecodeConfig(heads, DecodeConfig(tile=64, num_warps=8, num_stages=2), True, 1)
    tile = 32 if num_heads % heads == 0 else 16  # masks take registers
    return LatentDecodeConfig(heads, DecodeConfig(tile=tile, num_warps=4, num_stages=2), False, 2)


def latent_decode(
    absorbed: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    *,
    plan: DecodePlan,
    block_tables: torch.Tensor,
    head_dim: int,
    scale: float,
    config: LatentDecodeConfig,
) -> None:
    """Attend with the query row of every planned sequence; rows of padding become zeros, other rows stay as they are.

    Block tables and plan may be read before the kernels ahead of this one have ended, as in `rotary_to_cache`.

    Args:
        absorbed: `[T, heads, rank]` contiguous, queries' parts that do not turn, taken to the latent.
        query: `[T, >= heads * head_dim]`, rows contiguous; of each head the last dimensions have been turned.
        cache: a layer's `[num_blocks, block_size, rank + turning]`, this step's tokens included; of the query's dtype
            or float8_e4m3fn.
        out: `[T, heads, rank]` contiguous, of the query's dtype: attended latents.
        plan: of this step, made for one KV head, `config.decode` and `config.target`.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
        head_dim: of the query.
        scale: factor on scores, positive.
        config: launch parameters.
    """
    _, heads, rank = absorbed.shape
    turning = cache.shape[2] - rank
    slots, blocks = plan.records.shape[0], config.head_blocks(heads)
    rank_pad = max(MIN_PRODUCT, next_power_of_2(rank))
    partials = torch.empty((slots, blocks, config.heads, rank), dtype=torch.float32, device=out.device)
    statistics = torch.empty((slots, blocks, 2, config.heads), dtype=torch.float32, device=out.device)
    pdl = pdl_supported(out.device)
    _latent_decode_kernel[(blocks, slots)](
        absorbed,
        query,
        kernel_view(cache),
        out,
        plan.records,
        block_tables,
        partials,
        statistics,
        query.stride(0),
        block_tables.stride(0),
        scale,
        HEADS=heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCKS=blocks,
        GROUP=config.heads,
        ROWS=max(MIN_PRODUCT, next_power_of_2(config.heads)),
        RANK=rank,
        RANK_PAD=rank_pad,
        TURNING=turning,
        TURNING_PAD=max(MIN_PRODUCT, next_power_of_2(turning)),
        BLOCK_SIZE=cache.shape[1],
        TILE=config.decode.tile,
        POSITIONS_FIRST=config.positions_first,
        FORMAT=int(kv_format(cache)),
        RECORD=RECORD,
        PDL=pdl,
        num_warps=config.decode.num_warps,
        num_stages=config.decode.num_stages,
        **launch_options(pdl),
    )
    _latent_merge_kernel[(slots, heads)](
        out,
        plan.records,
        partials,
        statistics,
        HEADS=heads,
        HEAD_BLOCKS=blocks,
        GROUP=config.heads,
        RANK=rank,
        RANK_PAD=rank_pad,
        CHUNKS=MERGED_CHUNKS,
        RECORD=RECORD,
        PDL=pdl,
        num_warps=8,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit
def _latent_decode_kernel(
    absorbed,
    query,
    cache,
    out,
    records,
    block_tables,
    partials,
    statistics,
    query_stride,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    TURNING: tl.constexpr,
    TURNING_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    POSITIONS_FIRST: tl.constexpr,
    FORMAT: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    head_block = tl.program_id(0)
    slot = tl.program_id(1)
    record = records + slot * RECORD
    chunks = tl.load(record + 6)
    if chunks == 0:
        return  # without waiting: the slots in use wait for the producer
    token = tl.load(record).to(tl.int64)
    table = block_tables + tl.load(record + 1).to(tl.int64) * table_stride
    start = tl.load(record + 2)
    end = tl.load(record + 3)
    blocks = tile_blocks(table, start, end, TILE, BLOCK_SIZE)
    factor = score_factor(scale, 0.0, FORMAT)

    wait_for_producer(PDL)
    member = tl.arange(0, ROWS)
    heads = head_block * GROUP + member
    real = (member < GROUP) & (heads < HEADS)
    dims = tl.arange(0, RANK_PAD)
    turn = tl.arange(0, TURNING_PAD)
    inside = real[:, None] & (dims < RANK)[None, :]
    at = (token * HEADS + heads)[:, None] * RANK + dims[None, :]
    q = tl.load(absorbed + at, mask=inside, other=0.0)
    turned = query + token * query_stride + heads[:, None] * HEAD_DIM + (HEAD_DIM - TURNING) + turn[None, :]
    q_turned = tl.load(turned, mask=real[:, None] & (turn < TURNING)[None, :], other=0.0)
    if FORMAT != 0:
        q = q.to(tl.float16)
        q_turned = q_turned.to(tl.float16)
    if POSITIONS_FIRST:
        acc = tl.zeros([RANK_PAD, ROWS], tl.float32)
        q = tl.trans(q)
        q_turned = tl.trans(q_turned)
    else:
        acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    within = tl.arange(0, TILE)
    for base in range(start, end, TILE):
        seen = base + within < end
        row = tile_rows(blocks, base, 0, TILE, 1, BLOCK_SIZE)
        blocks = tile_blocks(table, base + TILE, end, TILE, BLOCK_SIZE)
        latents = load_part(cache, row, seen, RANK + TURNING, 0, RANK, RANK_PAD, FORMAT)
        # Both by way of the pipeline: with keys loaded ahead into registers (which leaves room for three stages of
        # latents) results were wrong on Hopper, where Triton 3.6 then puts the fence between writing and multiplying
        # them behind the barrier.
        keys = load_part(cache, row, seen, RANK + TURNING, RANK, TURNING, TURNING_PAD, FORMAT)
        if POSITIONS_FIRST:
            scores = tl.dot(keys, q_turned, input_precision="ieee")
            scores = tl.dot(latents, q, scores, input_precision="ieee")
            scores = tl.where(seen[:, None], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 0))
            weights = tl.exp2(scores * factor - (new_peak * factor)[None, :])
            keep = tl.exp2((peak - new_peak) * factor)
            total = total * keep + tl.sum(weights, 0)
            acc = tl.dot(tl.trans(latents), weights.to(latents.dtype), acc * keep[None, :], input_precision="ieee")
            peak = new_peak
        else:
            scores = tl.dot(q_turned, tl.trans(keys), input_precision="ieee")
            scores = tl.dot(q, tl.trans(latents), scores, input_precision="ieee")
            scores = tl.where(seen[None, :], scores, float("-inf"))
            acc, peak, total = accumulate(acc, peak, total, scores, latents, factor, False)
    if POSITIONS_FIRST:
        acc = tl.trans(acc)
    acc *= decoded_scale(FORMAT)

    if chunks == 1:
        result = tl.where(total[:, None] > 0.0, acc / total[:, None], 0.0)  # a padding row has seen nothing
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        index = (slot * HEAD_BLOCKS + head_block).to(tl.int64) * GROUP
        own = (member < GROUP)[:, None] & (dims < RANK)[None, :]
        tl.store(partials + (index + member)[:, None] * RANK + dims[None, :], acc, mask=own)
        tl.store(statistics + 2 * index + member, peak * factor, mask=member < GROUP)
        tl.store(statistics + 2 * index + GROUP + member, total, mask=member < GROUP)


@direct_launch
@triton.jit
def _latent_merge_kernel(
    out,
    records,
    partials,
    statistics,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The program of a context's first slot and a head adds up its chunks; others have nothing to do.

    Weights of the softmax come first, so that no load of partial results waits for another.
    """
    launch_dependents(PDL)
    slot = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, RANK_PAD)
    token = tl.load(records + slot * RECORD).to(tl.int64)
    chunks = tl.load(records + slot * RECORD + 6)
    first_slot = tl.load(records + slot * RECORD + 5)
    wait_for_producer(PDL)
    if (chunks > 1) & (first_slot == slot):
        each = tl.arange(0, CHUNKS)
        of_head = (slot * HEAD_BLOCKS + head // GROUP).to(tl.int64) * GROUP
        member = head % GROUP
        peak = float("-inf")
        for base in range(0, chunks, CHUNKS):
            index = of_head + (base + each) * (HEAD_BLOCKS * GROUP)
            peaks = tl.load(statistics + 2 * index + member, mask=base + each < chunks, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(peaks, 0))
        acc = tl.zeros([RANK_PAD], tl.float32)
        total = 0.0
        for base in range(0, chunks, CHUNKS):
            index = of_head + (base + each) * (HEAD_BLOCKS * GROUP)
            there = base + each < chunks
            peaks = tl.load(statistics + 2 * index + member, mask=there, other=float("-inf"))
            totals = tl.load(statistics + 2 * index + GROUP + member, mask=there, other=0.0)
            weights = tl.exp2(peaks - peak)
            parts = tl.load(
                partials + (index + member)[:, None] * RANK + dims[None, :],
                mask=there[:, None] & (dims < RANK)[None, :],
                other=0.0,
            )
            acc += tl.sum(parts * weights[:, None], 0)
            total += tl.sum(totals * weights, 0)
        target = out + (token * HEADS + head) * RANK + dims
        tl.store(target, (acc / total).to(out.dtype.element_ty), mask=dims < RANK)
