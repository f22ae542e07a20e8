"""What the attention kernels share: reading a tile of the paged KV cache, fp8 numbers, softmax scores.

Cache layout of a layer: keys and values `[num_blocks, kv_heads, block_size, head_dim]`, so the positions of a block and
head are one contiguous piece. An fp8 cache holds e4m3 numbers (OCP 8-bit floating point, "FN" variant: no infinities,
largest 448) with scale 1 and is seen by kernels as bytes, because not every card knows the type.
"""

from __future__ import annotations

import enum
from typing import Literal

import torch
import triton
import triton.language as tl

Card = Literal["hopper", "cuda", "hip"]  # what launch parameters depend on: data centre cards since 9.0, others, AMD
LARGE_SHARED = 200 << 10  # bytes of shared memory that a program can have on the first kind; consumer cards have 99 KiB


def card_of(device: torch.device) -> Card:
    """The kind of card; of a CPU, where kernels are interpreted, any."""
    if torch.version.hip is not None:
        return "hip"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)  # not in torch's stubs
        return "hopper" if shared >= LARGE_SHARED else "cuda"
    return "cuda"


def multiprocessors(device: torch.device) -> int:
    """How many programs a card runs at the same time, each with a multiprocessor to itself; of a CPU, any number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


class KVFormat(enum.IntEnum):
    """How a kernel reads the elements of the cache."""

    PLAIN = 0  # the compute dtype
    E4M3 = 1  # fp8, converted by the hardware
    E4M3_BITS = 2  # fp8, by shifting bits: cards without the conversion, and the interpreter


def kv_format(cache: torch.Tensor) -> KVFormat:
    """How kernels on the cache's device read it."""
    if cache.dtype != torch.float8_e4m3fn:
        return KVFormat.PLAIN
    hardware = cache.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(cache.device) >= (8, 9)
    return KVFormat.E4M3 if hardware else KVFormat.E4M3_BITS


def kernel_view(cache: torch.Tensor) -> torch.Tensor:
    """The cache as kernels take it: fp8 as uint8."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@triton.jit
def encode_e4m3(x):
    """float32 -> e4m3 bits (uint8): nearest, ties to even, saturating."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    # 20 of 23 mantissa bits go, the exponent's bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the code counts steps of 2^-9, which are the units in the last place of 2^14 + x.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return (sign | tl.where(magnitude < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit
def _decode_e4m3(code, FORMAT: tl.constexpr):
    """e4m3 bits -> float16, exact; with E4M3_BITS the result is 2^8 too small (see `decoded_scale`)."""
    if FORMAT == 1:
        number = code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = code.to(tl.uint16)
        number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return number


@triton.jit
def decoded_scale(FORMAT: tl.constexpr):
    """What products with a decoded tile must be multiplied by: moved bits keep float16's exponent bias of 15, not 7."""
    return 256.0 if FORMAT == 2 else 1.0


@triton.jit
def tile_blocks(table, base, end, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """`[TILE]` int32, the blocks of positions from `base` on, a multiple of TILE; 0 for those from `end` on.

    Loops load the next tile's before they use this tile's: loads whose addresses come from a load of the same
    iteration are not started ahead of time by Triton's pipeliner.
    """
    within = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0:
        entries = table + base // BLOCK_SIZE + within // BLOCK_SIZE
    else:
        entries = table + (base + within) // BLOCK_SIZE
    return tl.load(entries, mask=base + within < end, other=0)


@triton.jit
def tile_rows(blocks, base, head, TILE: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Index of each position's `[head_dim]` row in a layer's cache, `[TILE]` int64; arguments as in `tile_blocks`."""
    within = tl.arange(0, TILE)
    if TILE % BLOCK_SIZE == 0:
        offset = within % BLOCK_SIZE
    else:
        offset = (base + within) % BLOCK_SIZE
    return (blocks.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + offset


@triton.jit
def load_tile(
    cache,
    rows,
    seen,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """`[TILE, DIM]` of keys or values; what lies beyond `seen` or HEAD_DIM is zero, for it may hold another's NaN."""
    dims = tl.arange(0, DIM)
    pointers = cache + rows[:, None] * HEAD_DIM + dims[None, :]
    if MASKED and HEAD_DIM < DIM:
        tile = tl.load(pointers, mask=seen[:, None] & (dims < HEAD_DIM)[None, :], other=0)
    elif MASKED:
        tile = tl.load(pointers, mask=seen[:, None], other=0)
    elif HEAD_DIM < DIM:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    if FORMAT != 0:
        tile = _decode_e4m3(tile, FORMAT)
    return tile


@triton.jit
def load_part(
    cache,
    rows,
    seen,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    PAD: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """`[TILE, PAD]`: SIZE values from OFFSET on of rows of STRIDE; zero beyond `seen` and SIZE, as in `load_tile`."""
    dims = tl.arange(0, PAD)
    pointers = cache + rows[:, None] * STRIDE + (OFFSET + dims)[None, :]
    if SIZE < PAD:
        tile = tl.load(pointers, mask=seen[:, None] & (dims < SIZE)[None, :], other=0)
    else:
        tile = tl.load(pointers, mask=seen[:, None], other=0)
    if FORMAT != 0:
        tile = _decode_e4m3(tile, FORMAT)
    return tile


@triton.jit
def scores_of(query, keys, scale, SOFTCAP: tl.constexpr, FORMAT: tl.constexpr):
    """`[M, TILE]` float32: scores, but for a factor that is `score_factor`.

    With a soft-cap c a score s becomes c * tanh(s / c) (arXiv 2408.00118, section 2).
    """
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0.0:
        ratio = scores * (scale * decoded_scale(FORMAT) / SOFTCAP)
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(ratio * (2.0 * 1.4426950408889634)))  # tanh
    return scores


@triton.jit
def score_factor(scale, SOFTCAP: tl.constexpr, FORMAT: tl.constexpr):
    """What `scores_of` is to be multiplied by for softmax by powers of two; positive, log2(e) included."""
    if SOFTCAP > 0.0:
        factor = SOFTCAP * 1.4426950408889634
    else:
        factor = scale * decoded_scale(FORMAT) * 1.4426950408889634
    return factor


@triton.jit
def with_sink(total, peak, sinks, heads, inside, HAS_SINKS: tl.constexpr):
    """`total` `[M]`, a sum of powers of two relative to `peak` `[M]` (base 2), with the share of the sink of each row's
    head: a score that takes part and adds no value. `sinks` `[heads]` float32, or anything when not HAS_SINKS."""
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + heads, mask=inside, other=0.0) * 1.4426950408889634 - peak)
    return total


@triton.jit
def accumulate(acc, peak, total, scores, values, factor, GUARD: tl.constexpr):
    """One step of streaming softmax (arXiv 1805.02867): rescale by the new peak, add the tile.

    Args:
        acc: `[M, DIM]` float32, not normalised.
        peak, total: `[M]` float32: largest score so far, and the sum of powers of two.
        scores: `[M, TILE]` float32, -inf where not seen.
        factor: of scores and peak, applied in one instruction with the subtraction of the peak.
        GUARD: a row may have seen nothing yet.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shift = new_peak * factor
    if GUARD:
        shift = tl.where(new_peak == float("-inf"), 0.0, shift)
    weights = tl.exp2(scores * factor - shift[:, None])
    keep = tl.exp2(peak * factor - shift)
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, new_peak, total
