"""Attention of sequences with one query row each, over the paged KV cache, split along the context.

A planning kernel, launched once a step, deals the contexts out to a constant number of slots: chunks of about equal
size, so that one long context among short ones still spreads over the card, and the launch shape depends on the batch
only (CUDA graphs). The longest chunks come first, so that short ones fill the card when the others end. The attention
kernel runs a program for each slot and KV head; query heads that share it are the rows of its products. The last chunk
of a sequence to finish combines all of them (flash-decoding; partial results in float32), and a sequence of one chunk
is written straight away.

Cost: 2 * context * kv_heads * head_dim elements read a sequence; bound by memory traffic.
"""

from __future__ import annotations

import functools
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

RECORD = 8  # int32 fields of a slot in the plan, see _plan_kernel
PROGRAMS = 256  # that a batch is divided into, at least, where its contexts are long enough
PROGRAMS_OF_ONE = 128  # the same for a single sequence, whose combination is on the critical path
MIN_PRODUCT_ROWS = 16  # of tl.dot


class DecodeConfig(NamedTuple):
    """Launch parameters of the attention kernel."""

    tile: int  # positions multiplied at once, a power of two
    num_warps: int
    num_stages: int


class DecodePlan(NamedTuple):
    """How one step's contexts are divided, for layers of one window.

    Attributes:
        records: `[slots, RECORD]` int32.
        counters: `[slots * kv_heads]` int32: chunks that have finished, of the sequence whose first slot this is.
        config: whose tile the plan was made for.
    """

    records: torch.Tensor
    counters: torch.Tensor
    config: DecodeConfig


def decode_config(head_dim: int, dtype: torch.dtype, card: Card, sequences: int) -> DecodeConfig:
    """Launch parameters for a head size, compute dtype and batch.

    Measured on an H100 for heads of 128; many programs want small tiles, a single sequence wants few warps to agree.
    """
    stages = 2 if card == "hip" else 3
    if dtype == torch.float32:
        return DecodeConfig(tile=16, num_warps=8 if head_dim > 128 else 4, num_stages=2)
    if head_dim > 128:
        return DecodeConfig(tile=32, num_warps=4, num_stages=stages)
    if head_dim & (head_dim - 1):  # masks take registers
        return DecodeConfig(tile=64, num_warps=4, num_stages=2)
    if sequences == 1:
        return DecodeConfig(tile=64, num_warps=2, num_stages=stages)
    if sequences < 128:
        return DecodeConfig(tile=64, num_warps=4, num_stages=stages)
    # A batch that fills the card little more than once wants more loads on their way.
    return DecodeConfig(tile=32, num_warps=2, num_stages=4 if sequences < 176 and card == "hopper" else stages)


class PlanCut(NamedTuple):
    """How the planning kernel compares sequences with one another, some 64 pairs a thread: `padded` x `others`."""

    padded: int
    others: int
    num_warps: int


def plan_cut(sequences: int) -> PlanCut:
    padded = max(64, next_power_of_2(sequences))  # few variants to compile
    return PlanCut(padded, max(1, min(32, 32768 // padded)), min(16, max(4, padded // 64)))


def plan_decode(
    *,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    num_kv_heads: int,
    window: int | None,
    config: DecodeConfig,
    target: int | None = None,
) -> DecodePlan:
    """Divide the contexts of the sequences that have one query row; others get no slot.

    Args:
        query_start: `[R + 1]` int32, prefix sums of query rows.
        context_lens: `[R]` int32, 0 for padding.
        rows: `[R]` int32, each sequence's row in the block tables.
        num_kv_heads: of the model.
        window: latest positions that a query sees, itself included; None for all.
        config: of the attention kernel.
        target: chunks to aim at over all sequences; there are at most R more.
    """
    sequences = context_lens.shape[0]
    if target is None:
        target = max(1, (PROGRAMS_OF_ONE if sequences == 1 else PROGRAMS) // num_kv_heads)
    slots = sequences + target
    cut = plan_cut(sequences)
    device = context_lens.device
    records = torch.empty((slots, RECORD), dtype=torch.int32, device=device)
    counters = torch.empty(slots * num_kv_heads, dtype=torch.int32, device=device)
    _plan_kernel[(1,)](
        records,
        counters,
        query_start,
        context_lens,
        rows,
        sequences,
        slots,
        slots * num_kv_heads,
        target,
        SEQUENCES_PAD=cut.padded,
        WINDOW=window or 0,
        TILE=config.tile,
        BLOCK=1024,
        OTHERS=cut.others,
        RECORD=RECORD,
        num_warps=cut.num_warps,
    )
    return DecodePlan(records, counters, config)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    *,
    plan: DecodePlan,
    block_tables: torch.Tensor,
    num_heads: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend with the query row of every planned sequence; rows of padding become zeros, other rows stay as they are.

    Block tables and plan may be read before the kernels ahead of this one have ended, as in `rotary_to_cache`.

    Args:
        query: `[T, >= heads * head_dim]`, transformed queries in front, rows contiguous.
        keys, values: a layer's cache `[num_blocks, kv_heads, block_size, head_dim]`, this step's tokens included; of
            the query's dtype or float8_e4m3fn.
        out: `[T, heads * head_dim]` of the query's dtype.
        plan: of this step and the layer's window.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
        num_heads: of the query.
        scale: factor on query-key products, positive.
        softcap: bound of the scores, 0 for none.
        sinks: `[heads]` float32, a score of each head that takes part in its softmax and adds no value.
    """
    _, kv_heads, block_size, head_dim = keys.shape
    group = num_heads // kv_heads
    slots = plan.records.shape[0]
    config = plan.config
    threads = config.num_warps * 32
    group_pad = next_power_of_2(group)
    dim = next_power_of_2(head_dim)
    partials = torch.empty((slots, kv_heads, group, head_dim), dtype=torch.float32, device=query.device)
    statistics = torch.empty((slots, kv_heads, 2, group), dtype=torch.float32, device=query.device)
    pdl = pdl_supported(query.device)
    _decode_kernel[(kv_heads, slots)](
        query,
        kernel_view(keys),
        kernel_view(values),
        out,
        plan.records,
        plan.counters,
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
        GROUP_PAD=group_pad,
        ROWS=max(MIN_PRODUCT_ROWS, group_pad),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        COMBINE=combined_at_once(group_pad, dim, threads),
        SOFTCAP=softcap,
        HAS_SINKS=sinks is not None,
        FORMAT=int(kv_format(keys)),
        RECORD=RECORD,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(pdl),
    )


@functools.cache
def combined_at_once(group_pad: int, dim: int, threads: int) -> int:
    """Chunks whose partial results are loaded together: what fits into 128 registers a thread, at most 32."""
    return max(1, min(32, 128 * threads // (group_pad * dim)))


@triton.jit
def _sequence(query_start, context_lens, sequence, num_sequences, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Of each sequence: token row, context, oldest visible position, tiles to read, whether it has one query row."""
    live = sequence < num_sequences
    token = tl.load(query_start + sequence, mask=live, other=0)
    decodes = live & (tl.load(query_start + sequence + 1, mask=live, other=0) - token == 1)
    context = tl.load(context_lens + sequence, mask=decodes, other=0)
    oldest = tl.zeros_like(context)
    if WINDOW > 0:
        oldest = tl.maximum(context - WINDOW, 0)
    return token, context, oldest, tl.cdiv(context - oldest // TILE * TILE, TILE), decodes


@triton.jit
def _divided(tiles, decodes, longest):
    """Of each sequence: tiles of a chunk, which are equally many but for the last, and the number of chunks."""
    chunk = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, longest), 1)), 1)
    return chunk, tl.where(decodes, tl.maximum(tl.cdiv(tiles, chunk), 1), 0)


@direct_launch
@triton.jit(do_not_specialize=["num_sequences", "num_slots", "num_counters", "target"])
def _plan_kernel(
    records,
    counters,
    query_start,
    context_lens,
    rows,
    num_sequences,
    num_slots,
    num_counters,
    target,
    SEQUENCES_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Fields of a slot: token row, block table row, first position of the chunk, its end, oldest visible position,
    the sequence's first slot, its number of chunks (0: idle slot)."""
    sequence = tl.arange(0, SEQUENCES_PAD)
    token, context, oldest, tiles, decodes = _sequence(query_start, context_lens, sequence, num_sequences, WINDOW, TILE)
    row = tl.load(rows + sequence, mask=decodes, other=0)
    begin = oldest // TILE * TILE
    longest = tl.maximum(tl.cdiv(tl.sum(tiles), target), 1)
    chunk, chunks = _divided(tiles, decodes, longest)
    first = tl.zeros_like(chunks)
    for base in range(0, num_sequences, OTHERS):
        other = base + tl.arange(0, OTHERS)
        _, _, _, other_tiles, other_decodes = _sequence(query_start, context_lens, other, num_sequences, WINDOW, TILE)
        other_chunk, other_chunks = _divided(other_tiles, other_decodes, longest)
        longer = other_chunk[None, :] > chunk[:, None]
        earlier = (other_chunk[None, :] == chunk[:, None]) & (other[None, :] < sequence[:, None])
        first += tl.sum(tl.where(longer | earlier, other_chunks[None, :], 0), 1)
    for index in range(tl.max(chunks)):
        mine = index < chunks
        record = records + (first + index) * RECORD
        start = begin + index * chunk * TILE
        tl.store(record, token, mask=mine)
        tl.store(record + 1, row, mask=mine)
        tl.store(record + 2, start, mask=mine)
        tl.store(record + 3, tl.minimum(start + chunk * TILE, context), mask=mine)
        tl.store(record + 4, oldest, mask=mine)
        tl.store(record + 5, first, mask=mine)
        tl.store(record + 6, chunks, mask=mine)
    used = tl.sum(chunks)
    for base in range(0, num_slots, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        tl.store(records + slot * RECORD + 6, 0, mask=(slot >= used) & (slot < num_slots))
    for base in range(0, num_counters, BLOCK):
        counter = base + tl.arange(0, BLOCK)
        tl.store(counters + counter, 0, mask=counter < num_counters)


@direct_launch
@triton.jit
def _decode_kernel(
    query,
    keys,
    values,
    out,
    records,
    counters,
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
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    COMBINE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FORMAT: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    slot = tl.program_id(1)
    record = records + slot * RECORD
    chunks = tl.load(record + 6)
    if chunks == 0:
        return  # without waiting: the slots in use wait for the producer
    token = tl.load(record).to(tl.int64)
    table = block_tables + tl.load(record + 1).to(tl.int64) * table_stride
    start = tl.load(record + 2)
    end = tl.load(record + 3)
    oldest = tl.load(record + 4)
    first_slot = tl.load(record + 5)
    blocks = tile_blocks(table, start, end, TILE, BLOCK_SIZE)
    factor = score_factor(scale, SOFTCAP, FORMAT)

    wait_for_producer(PDL)
    member = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    q = tl.load(
        query + token * query_stride + (head * GROUP + member)[:, None] * HEAD_DIM + dims[None, :],
        mask=(member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    if FORMAT != 0:
        q = q.to(tl.float16)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for base in range(start, end, TILE):
        positions = base + tl.arange(0, TILE)
        seen = (positions < end) & (positions >= oldest)
        row = tile_rows(blocks, base, head, TILE, KV_HEADS, BLOCK_SIZE)
        blocks = tile_blocks(table, base + TILE, end, TILE, BLOCK_SIZE)
        k = load_tile(keys, row, seen, HEAD_DIM, DIM, True, FORMAT)
        v = load_tile(values, row, seen, HEAD_DIM, DIM, True, FORMAT)
        scores = tl.where(seen[None, :], scores_of(q, k, scale, SOFTCAP, FORMAT), float("-inf"))
        acc, peak, total = accumulate(acc, peak, total, scores, v, factor, False)
    acc *= decoded_scale(FORMAT)

    heads = head * GROUP + member
    inside = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    if chunks == 1:
        launch_dependents(PDL)
        total = with_sink(total, peak * factor, sinks, heads, member < GROUP, HAS_SINKS)
        result = tl.where(total[:, None] > 0.0, acc / total[:, None], 0.0)  # a padding row has seen nothing
        target = out + token * out_stride + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    else:
        index = (slot * KV_HEADS + head).to(tl.int64) * GROUP
        tl.store(partials + (index + member)[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(statistics + 2 * index + member, peak * factor, mask=member < GROUP)
        tl.store(statistics + 2 * index + GROUP + member, total, mask=member < GROUP)
        tl.debug_barrier()  # all threads' stores before the one that counts
        counter = counters + first_slot * KV_HEADS + head
        finished = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        launch_dependents(PDL)
        if finished == chunks - 1:
            tl.store(counter, 0)  # for the next layer
            result = _combine(
                partials, statistics, sinks, first_slot, chunks, head, KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, DIM,
                COMBINE, HAS_SINKS,
            )  # fmt: skip
            few = tl.arange(0, GROUP_PAD)
            target = out + token * out_stride + (head * GROUP + few)[:, None] * HEAD_DIM + dims[None, :]
            inside_few = (few < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside_few)


@triton.jit
def _combine(
    partials,
    statistics,
    sinks,
    first_slot,
    chunks,
    head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """`[GROUP_PAD, DIM]` float32: the chunks' results weighted by their share of the softmax.

    COMBINE chunks are loaded at once: each round is a trip to L2 that nothing hides. Loads bypass L1.
    """
    member = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM)
    acc = tl.zeros([GROUP_PAD, DIM], tl.float32)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    for base in range(0, chunks, COMBINE):
        chunk = base + tl.arange(0, COMBINE)
        index = ((first_slot + chunk) * KV_HEADS + head).to(tl.int64) * GROUP
        there = (chunk < chunks)[:, None] & (member < GROUP)[None, :]
        at = 2 * index[:, None] + member[None, :]
        peaks = tl.load(statistics + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(statistics + at + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            partials + (index[:, None] + member[None, :])[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # members of the padding have none
        weights = tl.exp2(peaks - shift[None, :])
        keep = tl.exp2(peak - shift)
        acc = acc * keep[:, None] + tl.sum(parts * weights[:, :, None], 0)
        total = total * keep + tl.sum(totals * weights, 0)
        peak = new_peak
    total = with_sink(total, peak, sinks, head * GROUP + member, member < GROUP, HAS_SINKS)
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
