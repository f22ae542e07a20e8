"""Between the qkv product and attention, in one kernel: per-head RMSNorm, rotation, and the write to the KV cache.

Cost: reads qkv once, writes the queries in place and K and V to the cache; bound by memory traffic,
about 2 * T * (heads + 2 * kv_heads) * head_dim elements.
"""

from __future__ import annotations

from typing import NamedTuple

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
from aphrodite.kernels.triton.paged import KVFormat, encode_e4m3, kernel_view, kv_format


class RotaryConfig(NamedTuple):
    """Launch parameters.

    Attributes:
        block_heads: heads of a token that one program transforms.
        table_first: load cos and sin, whose addresses wait for the position, while the producer still runs; otherwise
            after the loads of qkv, which then need not wait for the position.
        num_warps: of a program.
    """

    block_heads: int
    table_first: bool
    num_warps: int


def rotary_config(tokens: int, heads: int, head_dim: int) -> RotaryConfig:
    """Launch parameters for `heads` heads a token, those of keys and values included.

    For few tokens, programs with little to do; for many, ones with enough loads in flight to fill the memory bus.
    """
    dim = next_power_of_2(head_dim)
    all_heads = next_power_of_2(heads)
    if tokens <= 512:
        block_heads = min(16, all_heads)
        return RotaryConfig(block_heads, table_first=True, num_warps=max(1, block_heads * dim // 512))
    block_heads = min(8192 // dim, all_heads)
    return RotaryConfig(block_heads, table_first=False, num_warps=max(1, block_heads * dim // 1024))


def rotary_to_cache(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    keep_keys: bool = False,
    config: RotaryConfig | None = None,
) -> None:
    """Norm and rotate queries in place; norm and rotate keys and put keys and values into the cache.

    Positions and slots may be read before the kernels ahead of this one have ended (see launch.py): a launch that
    takes no part in dependent launch has to lie between the kernel that writes them and this one.

    Args:
        qkv: `[>= T, (heads + 2 * kv_heads) * head_dim]`, rows contiguous; queries, keys, values.
        keys, values: a layer's cache, `[num_blocks, kv_heads, block_size, head_dim]` of qkv's dtype or float8_e4m3fn.
        positions: `[>= T]` int32.
        slot_mapping: `[T]` int64, block * block_size + offset; of a token with a negative slot nothing is written
            to the cache.
        cos, sin: `[max_len, rotated / 2]` float32, contiguous; dimensions from `rotated` on are not turned.
        query_norm, key_norm: `[head_dim]` weights of RMSNorm over each head before it is rotated; both or neither.
        keep_keys: write the transformed keys back to qkv as well.
        config: launch parameters; by default `rotary_config`.
    """
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    _, kv_heads, block_size, head_dim = keys.shape
    half = cos.shape[1]
    rest = head_dim - 2 * half
    heads = num_heads + 2 * kv_heads
    config = config or rotary_config(tokens, heads, head_dim)
    pdl = pdl_supported(qkv.device)
    _rotary_kernel[(tokens, ceil_div(heads, config.block_heads))](
        qkv,
        kernel_view(keys),
        kernel_view(values),
        positions,
        slot_mapping,
        cos,
        sin,
        query_norm,
        key_norm,
        qkv.stride(0),
        norm_eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        HALF_PAD=next_power_of_2(half),
        REST_PAD=next_power_of_2(rest) if rest else 0,
        BLOCK_HEADS=config.block_heads,
        TABLE_FIRST=config.table_first,
        BLOCK_SIZE=block_size,
        NORM=query_norm is not None,
        KEEP_KEYS=keep_keys,
        FP8=kv_format(keys) is not KVFormat.PLAIN,
        PDL=pdl,
        num_warps=config.num_warps,
        **launch_options(pdl),
    )


@direct_launch
@triton.jit
def _rotary_kernel(
    qkv,
    keys,
    values,
    positions,
    slots,
    cos,
    sin,
    query_norm,
    key_norm,
    qkv_stride,
    norm_eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    TABLE_FIRST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK_HEADS heads of one token; a value head is a head that turns by nothing."""
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_query = (heads < HEADS)[:, None]
    is_value = (heads >= HEADS + KV_HEADS)[:, None]
    present = (heads < HEADS + 2 * KV_HEADS)[:, None]
    pair = tl.arange(0, HALF_PAD)
    in_half = (pair < HALF)[None, :]
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token)
    if TABLE_FIRST:
        c = tl.load(cos + position * HALF + pair, mask=pair < HALF, other=0.0)
        s = tl.load(sin + position * HALF + pair, mask=pair < HALF, other=0.0)
    wait_for_producer(PDL)
    source = qkv + token * qkv_stride + heads[:, None] * HEAD_DIM
    first = tl.load(source + pair[None, :], mask=present & in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair[None, :], mask=present & in_half, other=0.0).to(tl.float32)
    if not TABLE_FIRST:
        c = tl.load(cos + position * HALF + pair, mask=pair < HALF, other=0.0)
        s = tl.load(sin + position * HALF + pair, mask=pair < HALF, other=0.0)
    c = tl.where(is_value, 1.0, c[None, :])
    s = tl.where(is_value, 0.0, s[None, :])
    if REST_PAD > 0:
        beyond = tl.arange(0, REST_PAD)
        in_rest = (beyond < HEAD_DIM - 2 * HALF)[None, :]
        rest = tl.load(source + 2 * HALF + beyond[None, :], mask=present & in_rest, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_PAD > 0:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / HEAD_DIM + norm_eps)[:, None]
        first *= _norm_factor(query_norm, key_norm, pair, HALF, factor, is_query, is_value)
        second *= _norm_factor(query_norm + HALF, key_norm + HALF, pair, HALF, factor, is_query, is_value)
        if REST_PAD > 0:
            rest *= _norm_factor(
                query_norm + 2 * HALF, key_norm + 2 * HALF, beyond, HEAD_DIM - 2 * HALF, factor, is_query, is_value
            )

    turned = first * c - second * s
    second = second * c + first * s
    in_cache = present & (heads >= HEADS)[:, None] & (slot >= 0)
    if KEEP_KEYS:
        in_place = present & (heads < HEADS + KV_HEADS)[:, None]
    else:
        in_place = is_query
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    kv_head = tl.where(is_value, heads[:, None] - HEADS - KV_HEADS, heads[:, None] - HEADS)
    row = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM
    _store(source, keys, values, row, pair, turned, in_place & in_half, in_cache & in_half, is_value, FP8)
    moved = HALF + pair
    _store(source, keys, values, row, moved, second, in_place & in_half, in_cache & in_half, is_value, FP8)
    if REST_PAD > 0:
        moved = 2 * HALF + beyond
        _store(source, keys, values, row, moved, rest, in_place & in_rest, in_cache & in_rest, is_value, FP8)


@triton.jit
def _norm_factor(query_norm, key_norm, index, count, factor, is_query, is_value):
    """`[BLOCK_HEADS, len(index)]`: norm weight over root mean square; 1 for value heads."""
    query_weight = tl.load(query_norm + index, mask=index < count, other=0.0).to(tl.float32)[None, :]
    key_weight = tl.load(key_norm + index, mask=index < count, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_value, 1.0, factor * tl.where(is_query, query_weight, key_weight))


@triton.jit
def _store(source, keys, values, row, dims, x, in_place, in_cache, is_value, FP8: tl.constexpr):
    tl.store(source + dims[None, :], x.to(source.dtype.element_ty), mask=in_place)
    if FP8:
        element = encode_e4m3(x)
    else:
        element = x.to(keys.dtype.element_ty)
    tl.store(keys + row + dims[None, :], element, mask=in_cache & (is_value == 0))
    tl.store(values + row + dims[None, :], element, mask=in_cache & is_value)
