"""Between the projections of latent attention and its products, in one kernel: RMSNorm of the latent, rotation of what
turns, and the write to the cache; and the way back, from the paged cache into one dense matrix.

A layer's cache is `[num_blocks, block_size, rank + turning]`: normalised latents, then the shared key that turns; of
the compute dtype or fp8 e4m3 with scale 1.

Cost: reads and writes each token's turning parts and latent once; bound by memory traffic, about
4 * T * (heads * turning + rank + turning) bytes in 16 bits. Gathering reads and writes rank + turning values a
position.
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
from aphrodite.kernels.triton.paged import (
    KVFormat,
    decoded_scale,
    encode_e4m3,
    kernel_view,
    kv_format,
    load_part,
    tile_blocks,
    tile_rows,
)

GATHER_TILE = 64  # positions of a program
GATHER_FIELDS = 2  # int32 of a gathered sequence: its index, first row of the dense matrix


def latent_to_cache(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    *,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor,
    norm_eps: float,
    num_heads: int,
    head_dim: int,
) -> None:
    """Turn queries in place, normalise the latent and turn the shared key into the cache.

    Positions and slots may be read before the kernels ahead of this one have ended, as in `rotary_to_cache`.

    Args:
        qkv: `[>= T, heads * head_dim + rank + turning]`, rows contiguous; queries, whose last dimensions turn, then
            latent and shared key, which stay as they are.
        cache: a layer's, `[num_blocks, block_size, rank + turning]` of qkv's dtype or float8_e4m3fn.
        positions: `[>= T]` int32.
        slot_mapping: `[T]` int64, block * block_size + offset; of a token with a negative slot nothing is written to
            the cache.
        cos, sin: `[max_len, turning / 2]` float32, contiguous.
        norm: `[rank]` weight of the latent's RMSNorm.
        num_heads, head_dim: of the queries.
    """
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    half, rank = cos.shape[1], norm.shape[0]
    block_heads = min(16, next_power_of_2(num_heads))
    pdl = pdl_supported(qkv.device)
    _cache_kernel[(tokens, 1 + ceil_div(num_heads, block_heads))](
        qkv,
        kernel_view(cache),
        positions,
        slot_mapping,
        cos,
        sin,
        norm,
        qkv.stride(0),
        norm_eps,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        RANK=rank,
        RANK_PAD=next_power_of_2(rank),
        HALF=half,
        HALF_PAD=next_power_of_2(half),
        BLOCK_HEADS=block_heads,
        FP8=kv_format(cache) is not KVFormat.PLAIN,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def gather_latents(
    cache: torch.Tensor,
    out: torch.Tensor,
    *,
    sequences: torch.Tensor,
    longest: int,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    block_tables: torch.Tensor,
) -> None:
    """Copy the contexts of some sequences out of the paged cache, one after the other.

    Args:
        cache: a layer's, `[num_blocks, block_size, rank + turning]`, this step's tokens included.
        out: `[N, rank + turning]` of the compute dtype.
        sequences: `[n, GATHER_FIELDS]` int32: index of a sequence, and the first row of its context in `out`.
        longest: context among them.
        context_lens: `[R]` int32.
        rows: `[R]` int32, each sequence's row in the block tables.
        block_tables: `[>= rows, max_blocks]` int32, rows contiguous.
    """
    width = cache.shape[2]
    pdl = pdl_supported(out.device)
    _gather_kernel[(sequences.shape[0], ceil_div(longest, GATHER_TILE))](
        kernel_view(cache),
        out,
        sequences,
        context_lens,
        rows,
        block_tables,
        block_tables.stride(0),
        WIDTH=width,
        WIDTH_PAD=next_power_of_2(width),
        BLOCK_SIZE=cache.shape[1],
        TILE=GATHER_TILE,
        FORMAT=int(kv_format(cache)),
        FIELDS=GATHER_FIELDS,
        PDL=pdl,
        num_warps=8,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit
def _cache_kernel(
    qkv,
    cache,
    positions,
    slots,
    cos,
    sin,
    norm,
    qkv_stride,
    norm_eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first program of a token takes its latent and shared key, the others BLOCK_HEADS queries each."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token)
    pair = tl.arange(0, HALF_PAD)
    in_half = pair < HALF
    c = tl.load(cos + position * HALF + pair, mask=in_half, other=0.0)
    s = tl.load(sin + position * HALF + pair, mask=in_half, other=0.0)
    source = qkv + token * qkv_stride
    if part == 0:
        dims = tl.arange(0, RANK_PAD)
        weight = tl.load(norm + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        wait_for_producer(PDL)
        latent = tl.load(source + HEADS * HEAD_DIM + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        shared = source + HEADS * HEAD_DIM + RANK
        one = tl.load(shared + pair, mask=in_half, other=0.0).to(tl.float32)
        other = tl.load(shared + HALF + pair, mask=in_half, other=0.0).to(tl.float32)
        latent *= tl.rsqrt(tl.sum(latent * latent, 0) / RANK + norm_eps) * weight
        target = cache + slot * (RANK + 2 * HALF)
        kept = slot >= 0
        _put(target + dims, latent, kept & (dims < RANK), FP8)
        _put(target + RANK + pair, one * c - other * s, kept & in_half, FP8)
        _put(target + RANK + HALF + pair, other * c + one * s, kept & in_half, FP8)
    else:
        heads = (part - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (heads < HEADS)[:, None] & in_half[None, :]
        wait_for_producer(PDL)
        turning = source + heads[:, None] * HEAD_DIM + (HEAD_DIM - 2 * HALF) + pair[None, :]
        first = tl.load(turning, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(turning + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(turning, (first * c - second * s).to(qkv.dtype.element_ty), mask=inside)
        tl.store(turning + HALF, (second * c + first * s).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _put(pointers, x, mask, FP8: tl.constexpr):
    if FP8:
        tl.store(pointers, encode_e4m3(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@direct_launch
@triton.jit
def _gather_kernel(
    cache,
    out,
    sequences,
    context_lens,
    rows,
    block_tables,
    table_stride,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    record = sequences + tl.program_id(0) * FIELDS
    sequence = tl.load(record)
    base = tl.program_id(1) * TILE
    context = tl.load(context_lens + sequence)
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * table_stride
    blocks = tile_blocks(table, base, context, TILE, BLOCK_SIZE)
    within = tl.arange(0, TILE)
    there = base + within < context
    dims = tl.arange(0, WIDTH_PAD)
    wait_for_producer(PDL)
    row = tile_rows(blocks, base, 0, TILE, 1, BLOCK_SIZE)
    tile = load_part(cache, row, there, WIDTH, 0, WIDTH, WIDTH_PAD, FORMAT) * decoded_scale(FORMAT)
    target = out + (tl.load(record + 1) + base + within).to(tl.int64)[:, None] * WIDTH + dims[None, :]
    tl.store(target, tile.to(out.dtype.element_ty), mask=there[:, None] & (dims < WIDTH)[None, :])
