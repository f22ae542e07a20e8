"""4-bit weights expanded for the vendor's library, on every card. Bound by writing: 2.53 bytes a value move."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.int4_words import Int4Words
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    pdl_supported,
    wait_for_producer,
)

STRIPS = 4  # of a block


@triton.jit
def _chunk_values(
    words,
    scales,
    strip,
    chunk,
    chunks,
    groups,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """float32 `[16 STRIPS, 128]`, the inputs of `chunk` of the strips `strip` `[16 STRIPS]`."""
    S: tl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    row = tl.arange(0, 16 * STRIPS) % 16
    base = (strip.to(tl.int64) * chunks + chunk) * 256 + row * 16
    word = tl.load(words + base[:, None] + tl.arange(0, 16)[None, :], eviction_policy="evict_first")
    part = tl.arange(0, 8)
    codes = (word[:, :, None] >> (part // 2 * 4 + part % 2 * 16)[None, None, :]) & 15
    # t, j, e, b -> j, e, t, b
    codes = tl.permute(tl.reshape(codes, (16 * STRIPS, 4, 4, 4, 2)), (0, 2, 3, 1, 4))
    codes = tl.reshape(codes, (16 * STRIPS, S, 128 // S))
    group = chunk * S + tl.arange(0, S) if GROUP <= 128 else chunk // (GROUP // 128) + tl.arange(0, S)
    at = (strip[:, None] * groups + group[None, :]) * 16 + row[:, None]
    scale_word = tl.load(scales + at)
    scale = (scale_word & -256).to(tl.float32, bitcast=True)
    values = (codes - (scale_word & 255)[:, :, None]).to(tl.float32) * scale[:, :, None]
    return tl.reshape(values, (16 * STRIPS, 128))


@direct_launch
@triton.jit
def _expand_kernel(
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    out,  # [out, in]
    out_features,
    in_features,
    strips,
    chunks,
    groups,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    place = tl.arange(0, 16 * STRIPS)
    strip = tl.program_id(1) * STRIPS + place // 16
    chunk = tl.program_id(0)
    values = _chunk_values(words, scales, tl.minimum(strip, strips - 1), chunk, chunks, groups, GROUP, STRIPS)
    row = strip * 16 + place % 16
    if PAIRED:
        row = strip * 16 + place % 8 * 2 + place // 8 % 2
    k = chunk * 128 + tl.arange(0, 128)
    inside = (row < out_features)[:, None] & (k < in_features)[None, :]
    wait_for_producer(PDL)
    tl.store(out + row.to(tl.int64)[:, None] * in_features + k[None, :], values.to(out.dtype.element_ty), mask=inside)


def expand_int4(weight: Int4Words, out: torch.Tensor) -> torch.Tensor:
    """Write the weight to `out` `[out, in]` contiguous; the rows of a paired weight as g0, u0, g1, u1, ..."""
    strips, chunks = weight.words.shape[:2]
    pdl = pdl_supported(out.device)
    _expand_kernel[(chunks, ceil_div(strips, STRIPS))](
        weight.words,
        weight.scales,
        out,
        weight.out_features,
        weight.in_features,
        strips,
        chunks,
        weight.scales.shape[1],
        GROUP=weight.group_size,
        STRIPS=STRIPS,
        PAIRED=weight.paired,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
