"""Up to 8 activation rows times a 4-bit weight on mma.sync: act(norm(x) W^T + b) + residual.

Bound by reading the weight, 0.53 bytes a value in groups of 128; its kernels are short, so what counts is how early
the first words are on their way: they are requested before the kernel waits for its predecessor.

A warp multiplies one strip of 16 rows (`int4_words`). The warps of a block stand side by side over strips, or share a
strip and split the inputs, and then add up. Weights come straight into registers, where a chunk is unpacked to be the A
operand as it lies; activations, the B operand, go through shared memory, padded to 8 columns. A group's product is
exact but for the float32 sum; the scale is applied to that.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from aphrodite.kernels.triton.epilogue import Epilogue, output_of
from aphrodite.kernels.triton.int4_gluon import (
    finish,
    group_offsets,
    launch_dependents,
    pair_of_zeros,
    residual_tile,
    scale_of,
    unpack,
    wait_for_producer,
    word_layout,
    word_offsets,
)
from aphrodite.kernels.triton.int4_words import CHUNK, Int4Words
from aphrodite.kernels.triton.launch import direct_launch, launch_options, pdl_supported

# Steps of a warp are unrolled, some 150 instructions each; the instruction cache holds little more than these.
# Chunk numbers are handed to functions as values and not as constants, for each of which Triton would go through the
# function again; later passes find the constants.
MAX_STEPS = 32


class MmaConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        strips: of a block, one a warp.
        splits: of the inputs, one a warp; a power of two like strips.
        depth: chunks of words in flight a warp.
        stages: parts of the activations in flight, for 2..8 rows.
    """

    strips: int
    splits: int
    depth: int
    stages: int = 4


@functools.cache
def mma_config(out_features: int, in_features: int, rows: int, group_size: int = CHUNK) -> MmaConfig:
    """The cut for a weight `[out, in]` and 1..8 rows, as measured on an H100 in a chain of layers of an 8B model.

    Warps share a strip where there are too few to fill the card. Small groups have sums of their own, whose registers
    leave room for fewer chunks in flight.
    """
    chunks = -(-in_features // CHUNK)
    single = rows == 1
    if out_features >= 16384:
        cut = MmaConfig(4, 2, 2) if single else MmaConfig(4, 1, 4)
    elif chunks >= 64:
        cut = MmaConfig(1, 8, 4 if single else 2)
    else:
        cut = MmaConfig(2 if out_features > 4096 else 1, 4, 6 if single else 4)
    splits = cut.splits
    while chunks < 2 * splits and splits > 1:
        splits //= 2
    while chunks > MAX_STEPS * splits and splits < 8:
        splits *= 2
    strips = max(cut.strips, 4 // splits)
    depth = cut.depth if group_size >= CHUNK else 2
    return MmaConfig(strips, splits, depth)


@gluon.jit
def _factor_offsets(
    chunk,
    strip,
    strips,
    chunks: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    S: gl.constexpr,
):
    """Where the scales `[S K, R]` of a step lie."""
    groups: gl.constexpr = (chunks * 128 + GROUP - 1) // GROUP
    row = gl.arange(0, 16 * N_WARPS)[None, :]
    batch = gl.arange(0, S * K_WARPS)[:, None]
    q = gl.minimum(chunk + batch % K_WARPS, chunks - 1)
    group = q * S + batch // K_WARPS if GROUP <= 128 else q // (GROUP // 128)
    return (gl.minimum(strip + row // 16, strips - 1) * groups + group) * 16 + row % 16


@gluon.jit
def _load_words(
    words,
    scales,
    chunk,
    strip,
    strips,
    chunks: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    mma: gl.constexpr,
):
    """(words `[K, R, 4, S, J]`, scales `[K, R, S]` for unpacking, scales `[S K, R]` for the sums) of one step."""
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    L: gl.constexpr = gl.SliceLayout(5, word_layout(K_WARPS, N_WARPS, S))
    offsets = word_offsets(chunk, strip, strips, chunks, N_WARPS, K_WARPS, S)
    loaded = gl.load(words + gl.set_auto_layout(offsets, L), eviction_policy="evict_first")
    g_offsets = group_offsets(chunk, strip, strips, chunks, GROUP, N_WARPS, K_WARPS, S)
    zeros = gl.load(scales + gl.set_auto_layout(g_offsets, gl.SliceLayout(2, gl.SliceLayout(4, L))))
    f_offsets = _factor_offsets(chunk, strip, strips, chunks, GROUP, N_WARPS, K_WARPS, S)
    factors = gl.load(scales + gl.set_auto_layout(f_offsets, gl.SliceLayout(2, mma)))
    return loaded, zeros, factors


@gluon.jit
def _weight_operand(
    loaded,
    zeros,
    dtype: gl.constexpr,
    KW: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    mma: gl.constexpr,
):
    """Codes less zeros, `[S K, R, 128 / S]`."""
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    R: gl.constexpr = 16 * N_WARPS
    shape: gl.constexpr = (K_WARPS, R, 4, S, 4 // S, 8)
    wide = loaded[:, :, :, :, :, None].broadcast_to(shape)
    zero = pair_of_zeros(zeros, dtype)[:, :, None, :][:, :, :, :, None][:, :, :, :, :, None].broadcast_to(shape)
    values = unpack(wide, zero, dtype)
    if KW == 8:
        values = values.permute(3, 0, 1, 4, 2, 5)  # S K R J t e
    else:
        values = values.reshape(K_WARPS, R, 4, S, 4 // S, 4, 2).permute(3, 0, 1, 4, 5, 2, 6)  # S K R J e2 t b
    values = values.reshape(S * K_WARPS, R, 128 // S)
    return gl.convert_layout(values, gl.DotOperandLayout(0, mma, KW), assert_trivial=True)


@gluon.constexpr_function
def single_layout(k_warps, n_warps, subgroups):
    """Layout of one row's activations in the order of the words, `[k_warps, subgroups, 128 / subgroups, 8 columns]`."""

    def basis(dimension, value):
        return [value if d == dimension else 0 for d in range(4)]

    registers = [basis(2, 1), basis(2, 2), basis(2, 4)]
    inner = 4 // subgroups
    registers += [basis(2, 32 << i) for i in range(inner.bit_length() - 1)]
    registers += [basis(1, 1 << i) for i in range(subgroups.bit_length() - 1)]
    lanes = [basis(2, 8), basis(2, 16), basis(3, 1), basis(3, 2), basis(3, 4)]
    warps = [[0, 0, 0, 0] for i in range(n_warps.bit_length() - 1)]
    warps += [basis(0, 1 << i) for i in range(k_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [k_warps, subgroups, 128 // subgroups, 8])


@gluon.constexpr_function
def staging_layout(warps):
    """Threads that stage one row of activations, 16 bytes each."""
    return gl.BlockedLayout([8], [32], [warps], [0])


@gluon.jit
def _load_part(row, part, in_features: gl.constexpr, PART: gl.constexpr):
    """Values of a part of a row `[in]`, zeros beyond it."""
    k = part * PART + gl.arange(0, PART, staging_layout(gl.num_warps()))
    return gl.load(row + k, mask=k < in_features, other=0.0)


@gluon.jit
def _stage_row(x, gammas, eps, smem, in_features: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr):
    """One row of activations, normed if there are weights for it, into shared memory in the order of the words."""
    parts = ()  # type: Any
    for part in gl.static_range(PARTS):
        parts = parts + (_load_part(x, part, in_features, PART),)
    if len(gammas) > 0:
        squares = gl.zeros([PART], gl.float32, staging_layout(gl.num_warps()))
        for part in gl.static_range(PARTS):
            squares += parts[part].to(gl.float32) * parts[part].to(gl.float32)
        factor = 1.0 / gl.sqrt(gl.sum(squares, 0) / in_features + eps)
    for part in gl.static_range(PARTS):
        values = parts[part]
        if len(gammas) > 0:
            values = (values.to(gl.float32) * factor * gammas[part].to(gl.float32)).to(values.dtype)
        smem.index(part).store(values.reshape(PART // 32, 4, 4, 2).permute(0, 2, 1, 3).reshape(PART))


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _int4_row_kernel(
    x,  # [1, in]
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [1, width], or anything when not HAS_RESIDUAL
    out,  # [1, width]
    M,
    out_features,
    strips,
    in_features: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    DEPTH: gl.constexpr,
    PARTS: gl.constexpr,
    PART: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [K_WARPS, N_WARPS, 1], [1, 16, 8])
    chunks: gl.constexpr = (in_features + 127) // 128
    steps: gl.constexpr = (chunks + K_WARPS - 1) // K_WARPS
    dtype: gl.constexpr = x.dtype.element_ty
    strip = gl.program_id(0) * N_WARPS
    queue = ()  # type: Any
    for ahead in gl.static_range(DEPTH):
        queue = queue + (
            _load_words(
                words, scales, gl.to_tensor(ahead * K_WARPS), strip, strips, chunks, GROUP, N_WARPS, K_WARPS, mma
            ),
        )
    gammas = ()  # type: Any
    if HAS_NORM:
        for part in gl.static_range(PARTS):
            gammas = gammas + (_load_part(norm_weight, part, in_features, PART),)
    wait_for_producer(PDL)
    EARLY: gl.constexpr = HAS_RESIDUAL and ACTIVATION is None
    if EARLY:
        addend = residual_tile(residual, M, out_features, strip, N_WARPS, gl.SliceLayout(0, mma))
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    smem = gl.allocate_shared_memory(dtype, [PARTS, PART], flat)
    _stage_row(x, gammas, eps, smem, in_features, PARTS, PART)
    tiles = smem._reinterpret(
        dtype, [PARTS * PART // (128 * K_WARPS), K_WARPS, S, 128 // S], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    XL: gl.constexpr = single_layout(K_WARPS, N_WARPS, S)
    total = gl.zeros([S * K_WARPS, 16 * N_WARPS, 8], gl.float32, mma)
    for step in gl.static_range(steps):
        loaded, zeros, factors = queue[0]
        if step + DEPTH < steps:
            ahead = gl.to_tensor((step + DEPTH) * K_WARPS)
            queue = queue[1:] + (
                _load_words(words, scales, ahead, strip, strips, chunks, GROUP, N_WARPS, K_WARPS, mma),
            )
        else:
            queue = queue[1:]
        a = _weight_operand(loaded, zeros, dtype, 8, GROUP, N_WARPS, K_WARPS, mma)
        values = tiles.index(step).load(gl.SliceLayout(3, XL))
        b = (
            values[:, :, :, None]
            .broadcast_to((K_WARPS, S, 128 // S, 8))
            .permute(1, 0, 2, 3)
            .reshape(S * K_WARPS, 128 // S, 8)
        )
        b = gl.convert_layout(b, gl.DotOperandLayout(1, mma, 8), assert_trivial=True)
        product = mma_v2(a, b, gl.zeros([S * K_WARPS, 16 * N_WARPS, 8], gl.float32, mma))
        total += product * scale_of(factors)[:, :, None]
    done = gl.sum(total, 0)
    if EARLY:
        done += addend.to(gl.float32)
    LATE: gl.constexpr = HAS_RESIDUAL and not EARLY
    width = out_features if ACTIVATION is None else out_features // 2
    finish(done, bias, residual, out, width, M, out_features, strip, 0, N_WARPS, HAS_BIAS, LATE, ACTIVATION)


@gluon.constexpr_function
def copy_layout(batch, inner, warps):
    """Threads that copy activations `[batch, inner, 8 columns]`, 16 bytes each."""
    lanes = inner // 8
    columns = 32 // lanes
    column_warps = min(warps, 8 // columns)
    return gl.BlockedLayout([1, 8, 1], [1, lanes, columns], [warps // column_warps, 1, column_warps], [1, 2, 0])


@gluon.constexpr_function
def activation_layout(inner):
    """Shared memory of activations `[batch, inner, 8 columns]` that ldmatrix reads without bank conflicts."""
    return gl.SwizzledSharedLayout(8, max(64 // inner, 1), min(inner // 8, 8), [1, 2, 0])


@gluon.jit
def _copy_rows(x, x_stride, M, smem, chunk, in_features: gl.constexpr, S: gl.constexpr, K_WARPS: gl.constexpr):
    """Request the activations of a step, `[S K, 128 / S, 8]`."""
    inner: gl.constexpr = 128 // S
    layout: gl.constexpr = copy_layout(S * K_WARPS, inner, gl.num_warps())
    batch = gl.arange(0, S * K_WARPS)[:, None, None]
    k = (chunk + batch % K_WARPS) * 128 + batch // K_WARPS * inner + gl.arange(0, inner)[None, :, None]
    column = gl.arange(0, 8)[None, None, :]
    # Columns without a row are zeros and read nothing: the same addresses again would queue up in the cache.
    inside = column < M
    if in_features % (128 * K_WARPS) == 0:
        inside = inside & (k >= 0)
    else:
        inside = inside & (k < in_features)
    offsets = gl.set_auto_layout(column * x_stride + k, layout)
    async_copy.async_copy_global_to_shared(smem, x + offsets, mask=gl.set_auto_layout(inside, layout))


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _int4_rows_kernel(
    x,  # [M, in]
    x_stride,
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    M,
    out_features,
    strips,
    in_features: gl.constexpr,
    GROUP: gl.constexpr,
    N_WARPS: gl.constexpr,
    K_WARPS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [K_WARPS, N_WARPS, 1], [1, 16, 8])
    chunks: gl.constexpr = (in_features + 127) // 128
    steps: gl.constexpr = (chunks + K_WARPS - 1) // K_WARPS
    dtype: gl.constexpr = x.dtype.element_ty
    strip = gl.program_id(0) * N_WARPS
    queue = ()  # type: Any
    for ahead in gl.static_range(DEPTH):
        queue = queue + (
            _load_words(
                words, scales, gl.to_tensor(ahead * K_WARPS), strip, strips, chunks, GROUP, N_WARPS, K_WARPS, mma
            ),
        )
    # Buffers of their own, so that a copy into one is not taken to touch the others.
    ring = ()  # type: Any
    for _ in gl.static_range(STAGES):
        ring = ring + (gl.allocate_shared_memory(dtype, [S * K_WARPS, 128 // S, 8], activation_layout(128 // S)),)
    wait_for_producer(PDL)
    EARLY: gl.constexpr = HAS_RESIDUAL and ACTIVATION is None
    for ahead in gl.static_range(STAGES - 1):
        _copy_rows(x, x_stride, M, ring[ahead], gl.to_tensor(ahead * K_WARPS), in_features, S, K_WARPS)
        async_copy.commit_group()
    if EARLY:
        addend = residual_tile(residual, M, out_features, strip, N_WARPS, gl.SliceLayout(0, mma))
    total = gl.zeros([S * K_WARPS, 16 * N_WARPS, 8], gl.float32, mma)
    for step in gl.static_range(steps):
        loaded, zeros, factors = queue[0]
        if step + DEPTH < steps:
            ahead = gl.to_tensor((step + DEPTH) * K_WARPS)
            queue = queue[1:] + (
                _load_words(words, scales, ahead, strip, strips, chunks, GROUP, N_WARPS, K_WARPS, mma),
            )
        else:
            queue = queue[1:]
        async_copy.wait_group(STAGES - 2)
        if step + STAGES - 1 < steps:
            part = gl.to_tensor((step + STAGES - 1) * K_WARPS)
            _copy_rows(x, x_stride, M, ring[(step + STAGES - 1) % STAGES], part, in_features, S, K_WARPS)
        async_copy.commit_group()
        a = _weight_operand(loaded, zeros, dtype, 2, GROUP, N_WARPS, K_WARPS, mma)
        b = ring[step % STAGES].load(gl.DotOperandLayout(1, mma, 2))
        product = mma_v2(a, b, gl.zeros([S * K_WARPS, 16 * N_WARPS, 8], gl.float32, mma))
        total += product * scale_of(factors)[:, :, None]
    done = gl.sum(total, 0)
    if EARLY:
        done += addend.to(gl.float32)
    LATE: gl.constexpr = HAS_RESIDUAL and not EARLY
    width = out_features if ACTIVATION is None else out_features // 2
    finish(done, bias, residual, out, width, M, out_features, strip, 0, N_WARPS, HAS_BIAS, LATE, ACTIVATION)


def staging(in_features: int, cut: MmaConfig) -> dict[str, int]:
    """How one row of activations, padded to whole steps, is cut for staging: 8 values a thread or fewer."""
    padded = -(-in_features // (CHUNK * cut.splits)) * CHUNK * cut.splits
    part = math.gcd(padded, 256 * cut.strips * cut.splits)
    return {"PARTS": padded // part, "PART": part}


def int4_mma(
    x: torch.Tensor,
    weight: Int4Words,
    epilogue: Epilogue = Epilogue(),
    norm: tuple[torch.Tensor, float] | None = None,
    config: MmaConfig | None = None,
) -> torch.Tensor:
    """act(norm(x) W^T + b) + residual for 1..8 rows.

    Args:
        x: `[T, in]` bfloat16 or float16; rows are multiples of 8 values apart, as is `in`.
        weight: (gate, up) pairs when there is an activation. It is read before the kernels of the
            same stream have ended, so none of them may write it (copies may).
        norm: RMSNorm of x: weight `[in]` and epsilon; for one row only.
        config: how to cut the work; chosen by shape when None.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.
    """
    rows, out_features, in_features = x.shape[0], weight.out_features, weight.in_features
    out = output_of(x, out_features, epilogue)
    cut = config or mma_config(out_features, in_features, rows, weight.group_size)
    strips = weight.words.shape[0]
    grid = (-(-strips // cut.strips),)
    steps = -(-in_features // (CHUNK * cut.splits))
    pdl = pdl_supported(x.device)
    bias = x if epilogue.bias is None else epilogue.bias
    common: dict[str, Any] = {
        "in_features": in_features,
        "GROUP": weight.group_size,
        "N_WARPS": cut.strips,
        "K_WARPS": cut.splits,
        "DEPTH": min(cut.depth, steps),
    }
    last: dict[str, Any] = {
        "HAS_BIAS": epilogue.bias is not None,
        "HAS_RESIDUAL": epilogue.residual is not None,
        "ACTIVATION": epilogue.activation,
        "PDL": pdl,
        "num_warps": cut.strips * cut.splits,
        **launch_options(pdl),
    }
    if rows == 1:
        norm_weight, eps = norm if norm is not None else (x, 0.0)
        _int4_row_kernel[grid](
            x,
            norm_weight,
            eps,
            weight.words,
            weight.scales,
            bias,
            out,
            out,
            rows,
            out_features,
            strips,
            **common,
            **staging(in_features, cut),
            HAS_NORM=norm is not None,
            **last,
        )
    else:
        _int4_rows_kernel[grid](
            x,
            x.stride(0),
            weight.words,
            weight.scales,
            bias,
            out,
            out,
            rows,
            out_features,
            strips,
            **common,
            STAGES=max(min(cut.stages, steps), 2),
            **last,
        )
    return out
