"""4-bit weights in plain Triton, for every card: products of up to 64 rows, and expansion for the library.

The product, act(x W^T + b) + residual, is bound by reading the weight, 0.53 bytes a value in groups of 128. Unpacked
tiles pass through shared memory on their way to the matrix units, which costs about half of the speed that the Gluon
kernels reach where they run. Expansion is bound by writing, 2.53 bytes a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import gated
from aphrodite.kernels.triton.int4_words import STRIP, Int4Words, whole_splits
from aphrodite.kernels.triton.launch import (
    direct_launch,
    launch_dependents,
    launch_options,
    pdl_supported,
    wait_for_producer,
)
from aphrodite.kernels.triton.linear import (
    WORKSPACE_VALUES,
    Epilogue,
    _activation_tile,
    _output,
    _sum_of_splits,
    _workspace,
    padded_rows,
)

PLAIN_MAX_ROWS = 64


class PlainConfig(NamedTuple):
    """How the product is cut: strips of a tile, splits of `in`, pipeline stages, warps."""

    strips: int
    splits: int
    stages: int
    warps: int


def plain_config(out_features: int, in_features: int, rows: int, hip: bool = False) -> PlainConfig:
    """The cut for a weight `[out, in]` and up to 64 rows: `in` is split where tiles would not fill the processors."""
    strips = 4
    tiles = -(-out_features // (STRIP * strips))
    splits = 1 if tiles >= 192 else 2 if tiles >= 96 else 4
    return PlainConfig(strips, whole_splits(-(-in_features // 128), splits), 2 if hip else 3, 4)


@triton.jit
def _chunk_values(
    words,
    scales,
    offsets,
    strip,
    chunk,
    chunks,
    groups,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
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
    if HAS_OFFSETS:
        values += tl.load(offsets + at)[:, :, None]
    return tl.reshape(values, (16 * STRIPS, 128))


@direct_launch
@triton.jit
def _expand_kernel(
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    offsets,  # [strips, groups, 16] float32, or anything when not HAS_OFFSETS
    out,  # [out, in]
    out_features,
    in_features,
    strips,
    chunks,
    groups,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    place = tl.arange(0, 16 * STRIPS)
    strip = tl.program_id(1) * STRIPS + place // 16
    chunk = tl.program_id(0)
    values = _chunk_values(
        words, scales, offsets, tl.minimum(strip, strips - 1), chunk, chunks, groups, GROUP, STRIPS, HAS_OFFSETS
    )
    row = strip * 16 + place % 16
    if PAIRED:
        row = strip * 16 + place % 8 * 2 + place // 8 % 2
    k = chunk * 128 + tl.arange(0, 128)
    inside = (row < out_features)[:, None] & (k < in_features)[None, :]
    wait_for_producer(PDL)
    tl.store(out + row.to(tl.int64)[:, None] * in_features + k[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish_strips(
    total,
    bias,
    residual,
    out,
    M,
    out_features,
    first,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of `total` `[16 STRIPS, COLUMNS]`, and the store."""
    place = tl.arange(0, 16 * STRIPS)
    if ACTIVATION is None:
        index = first * 16 + place
        width = out_features
        if HAS_BIAS:
            total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)[:, None]
        result = total
    else:
        if HAS_BIAS:
            pair = (first + place // 16) * 16 + place % 8 * 2 + place // 8 % 2
            total += tl.load(bias + pair, mask=pair < out_features, other=0.0).to(tl.float32)[:, None]
        width = out_features // 2
        index = first * 8 + tl.arange(0, 8 * STRIPS)
        gate, up = tl.split(tl.permute(tl.reshape(total, (STRIPS, 2, 8, COLUMNS)), (0, 2, 3, 1)))
        result = tl.reshape(gated(gate, up, ACTIVATION), (8 * STRIPS, COLUMNS))
    row = tl.arange(0, COLUMNS)
    inside = (index < width)[:, None] & (row < M)[None, :]
    at = row[None, :] * width + index[:, None]
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@direct_launch
@triton.jit(do_not_specialize=["M"])
def _int4_plain_kernel(
    x,  # [M, in]
    x_stride,
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    offsets,  # [strips, groups, 16] float32, or anything when not HAS_OFFSETS
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    workspace,  # [tiles, SPLITS, 16 STRIPS, COLUMNS] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    strips,
    in_features: tl.constexpr,
    GROUP: tl.constexpr,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,  # M padded
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    chunks: tl.constexpr = (in_features + 127) // 128
    groups: tl.constexpr = (chunks * 128 + GROUP - 1) // GROUP
    share: tl.constexpr = (chunks + SPLITS - 1) // SPLITS
    first = tl.program_id(0) * STRIPS
    strip = tl.minimum(first + tl.arange(0, 16 * STRIPS) // 16, strips - 1)
    columns = tl.minimum(tl.arange(0, COLUMNS), M - 1)
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, chunks)
    total = tl.zeros((16 * STRIPS, COLUMNS), tl.float32)
    wait_for_producer(PDL)
    for chunk in tl.range(start, end, num_stages=STAGES):
        values = _chunk_values(words, scales, offsets, strip, chunk, chunks, groups, GROUP, STRIPS, HAS_OFFSETS)
        right = _activation_tile(x, columns * x_stride, chunk * 128, in_features, 128)
        total = tl.dot(values.to(right.dtype), right, total)
    if SPLITS == 1:
        _finish_strips(
            total, bias, residual, out, M, out_features, first, STRIPS, COLUMNS, ACTIVATION, HAS_BIAS, HAS_RESIDUAL
        )
    else:
        last, total = _sum_of_splits(total, workspace, counters, 16 * STRIPS, COLUMNS, SPLITS)
        if last:
            _finish_strips(
                total, bias, residual, out, M, out_features, first, STRIPS, COLUMNS, ACTIVATION, HAS_BIAS, HAS_RESIDUAL
            )


def int4_plain(
    x: torch.Tensor, weight: Int4Words, epilogue: Epilogue = Epilogue(), config: PlainConfig | None = None
) -> torch.Tensor:
    """act(x W^T + b) + residual for 1..64 rows.

    Args:
        x: `[T, in]` of a 16-bit dtype, rows may be strided.
        weight: with (gate, up) pairs when there is an activation. It is read before the kernels of the same stream
            have ended, so none of them may write it (copies may).
        config: how to cut the work; chosen by shape when None.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.

    Raises:
        ValueError: `config` needs more room for partial sums than there is.
    """
    rows, out_features, in_features = x.shape[0], weight.out_features, weight.in_features
    out = _output(x, out_features, epilogue)
    cut = config or plain_config(out_features, in_features, rows, torch.version.hip is not None)
    strips, columns = weight.words.shape[0], padded_rows(rows)
    tiles = triton.cdiv(strips, cut.strips)
    if cut.splits > 1 and tiles * cut.splits * cut.strips * STRIP * columns > WORKSPACE_VALUES:
        raise ValueError(f"{cut} of {rows} rows and a weight [{out_features}, {in_features}] outgrows the workspace")
    workspace, counters = _workspace(x.device) if cut.splits > 1 else (x, x)
    pdl = pdl_supported(x.device)
    _int4_plain_kernel[(tiles, cut.splits)](
        x,
        x.stride(0),
        weight.words,
        weight.scales,
        weight.words if weight.offsets is None else weight.offsets,
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        workspace,
        counters,
        rows,
        out_features,
        strips,
        in_features=in_features,
        GROUP=weight.group_size,
        STRIPS=cut.strips,
        COLUMNS=columns,
        SPLITS=cut.splits,
        STAGES=cut.stages,
        HAS_OFFSETS=weight.offsets is not None,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out


def expand_int4(weight: Int4Words, out: torch.Tensor) -> torch.Tensor:
    """Write the weight to `out` `[out, in]` contiguous; the rows of a paired weight as g0, u0, g1, u1, ..."""
    strips, chunks = weight.words.shape[:2]
    per_block = 4
    pdl = pdl_supported(out.device)
    _expand_kernel[(chunks, triton.cdiv(strips, per_block))](
        weight.words,
        weight.scales,
        weight.words if weight.offsets is None else weight.offsets,
        out,
        weight.out_features,
        weight.in_features,
        strips,
        chunks,
        weight.scales.shape[1],
        GROUP=weight.group_size,
        STRIPS=per_block,
        HAS_OFFSETS=weight.offsets is not None,
        PAIRED=weight.paired,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
