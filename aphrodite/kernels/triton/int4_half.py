"""Many activation rows times a 4-bit weight, both in float16 on wgmma: act(x W^T + b) + residual, from 65 rows on.

Bound by arithmetic, `2 * rows * out * in` operations. As `int4_wgmma`, but a weight is multiplied by its scale where it
is unpacked, and rounded to float16, which is an eighth of what rounding it to bfloat16 would be and next to nothing
beside the rounding of the result. So sums need no registers beside the product's own, and tiles are as wide as the
matrix unit allows where there are enough of them: 256 activation rows share what is unpacked, and 128 weight rows share
the activations, for narrower tiles are bound by fetching these from the L2 cache.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from aphrodite.kernels.triton.epilogue import WORKSPACE_VALUES, Epilogue, split_workspace
from aphrodite.kernels.triton.half_rows import HalfRows
from aphrodite.kernels.triton.int4_gluon import (
    gated,
    launch_dependents,
    load_chunk,
    pair_of_zeros,
    scale_of,
    wait_for_producer,
)
from aphrodite.kernels.triton.int4_words import CHUNK, RAISED, STRIP, Int4Words, whole_splits
from aphrodite.kernels.triton.launch import direct_launch, launch_options, pdl_supported

RAISE = gl.constexpr(RAISED)

# As `int4_gluon.unpack`'s; $20 on are pairs of scales.
_UNPACK = "\n".join(
    f"shr.b32 w, $4, {4 * pair};\nlop3.b32 w, w, 0x000F000F, 0x64006400, 0xEA;\n"
    f"sub.rn.f16x2 w, w, $12;\nmul.rn.f16x2 ${pair}, w, $20;"
    for pair in range(4)
)
UNPACK = gl.constexpr("{\n.reg .b32 w;\n" + _UNPACK + "\n}")
OPERANDS = gl.constexpr("=r,=r,=r,=r" + ",r" * 24)


class HalfConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        warps: of a block, 4 or 8; each has a strip of 16 weight rows.
        columns: activation rows of a tile, a power of two from 64 to 256.
        splits: of the inputs among blocks.
        stages: chunks of activations in flight.
    """

    warps: int
    columns: int
    splits: int
    stages: int


@functools.cache
def half_config(out_features: int, in_features: int, rows: int) -> HalfConfig:
    """The cut for a weight `[out, in]`.

    The widest tiles where they keep 132 multiprocessors busy four fifths of the time, else small ones, two on each.
    Only these are split along the inputs where there are too few: to sum up splits of wide ones takes long.
    """
    chunks = -(-in_features // CHUNK)
    wide = -(-out_features // (8 * STRIP)) * -(-rows // 256)
    if rows > 128 and wide >= 0.8 * 132 * -(-wide // 132):
        return HalfConfig(8, 256, 1, 3)
    tiles = -(-out_features // (4 * STRIP)) * -(-rows // 128)
    splits = max(min(256 // tiles, 4, chunks // 8), 1)
    return HalfConfig(4, 128, whole_splits(chunks, splits), 3)


@gluon.jit
def _operand(loaded, group_words, GROUP: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr):
    """The weights of a chunk, raised, float16 `[R, 128]`."""
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    R: gl.constexpr = 16 * WARPS
    shape: gl.constexpr = (1, R, 4, S, 4 // S, 8)
    wide = loaded[:, :, :, :, :, None].broadcast_to(shape)
    zeros = pair_of_zeros(group_words, gl.float16)
    scales = (scale_of(group_words) * RAISE).to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    zeros = zeros[:, :, None, :][:, :, :, :, None][:, :, :, :, :, None].broadcast_to(shape)
    scales = (scales * 0x10001)[:, :, None, :][:, :, :, :, None][:, :, :, :, :, None].broadcast_to(shape)
    values = gl.inline_asm_elementwise(UNPACK, OPERANDS, [wide, zeros, scales], gl.float16, True, 8)
    values = values.reshape(R, 4, 4, 4, 2).permute(0, 2, 3, 1, 4).reshape(R, 128)  # j e t b
    return gl.convert_layout(values, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def _request(x, column, chunk, smem, bars, slot, pred):
    """Let the copy engine fetch the activations of a chunk."""
    bar = bars.index(slot)
    mbarrier.expect(bar, x.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(x, [column, chunk * 128], bar, smem.index(slot), pred=pred)


@gluon.jit
def _start_product(x, column, weight, total, smem, bars, start, chunk, end, STAGES: gl.constexpr):
    """Start the product of `chunk` after the one before it has ended, whose place in the ring is free then."""
    turn = chunk - start
    gl.thread_barrier()
    _request(x, column, chunk - 1 + STAGES, smem, bars, (turn - 1) % STAGES, chunk - 1 + STAGES < end)
    mbarrier.wait(bars.index(turn % STAGES), turn // STAGES & 1)
    return warpgroup_mma(weight, smem.index(turn % STAGES).permute((1, 0)), total, is_async=True)


@gluon.jit
def _sum_of_chunks(
    x,
    words,
    scales,
    column,
    strip,
    strips,
    start,
    end,
    chunks: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
    PDL: gl.constexpr,
):
    """The sum over the chunks `start` to `end`: while a product runs the operand of the next is unpacked."""
    COLUMNS: gl.constexpr = x.block_shape[0]
    words_0, groups_0 = load_chunk(words, scales, start, strip, strips, chunks, GROUP, WARPS)
    words_1, groups_1 = load_chunk(words, scales, start + 1, strip, strips, chunks, GROUP, WARPS)
    smem = gl.allocate_shared_memory(gl.float16, [STAGES, COLUMNS, 128], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    wait_for_producer(PDL)
    for slot in gl.static_range(STAGES):
        _request(x, column, start + slot, smem, bars, slot, start + slot < end)
    total = gl.zeros([16 * WARPS, COLUMNS], gl.float32, mma)
    weight = _operand(words_0, groups_0, GROUP, WARPS, mma)
    words_0, groups_0 = words_1, groups_1
    words_1, groups_1 = load_chunk(words, scales, start + 2, strip, strips, chunks, GROUP, WARPS)
    mbarrier.wait(bars.index(0), 0)
    token = warpgroup_mma(weight, smem.index(0).permute((1, 0)), total, is_async=True)
    # A product reads its registers while the next operand is unpacked, so that one must have others: two turns a loop.
    for chunk in range(start + 1, end - 1, 2):
        for turn in gl.static_range(2):
            weight = _operand(words_0, groups_0, GROUP, WARPS, mma)
            # Unpacking stays before the wait, beside the product, because the wait takes its result.
            total, weight = warpgroup_mma_wait(0, deps=[token, weight])
            words_0, groups_0 = words_1, groups_1
            words_1, groups_1 = load_chunk(words, scales, chunk + turn + 2, strip, strips, chunks, GROUP, WARPS)
            token = _start_product(x, column, weight, total, smem, bars, start, chunk + turn, end, STAGES)
    total = warpgroup_mma_wait(0, deps=[token])
    if (end - start) % 2 == 0:
        weight = _operand(words_0, groups_0, GROUP, WARPS, mma)
        left = _start_product(x, column, weight, total, smem, bars, start, end - 1, end, STAGES)
        total = warpgroup_mma_wait(0, deps=[left])
    return total


@gluon.jit
def _halves(total):
    """`[R, C]` as two of half the columns."""
    R: gl.constexpr = total.shape[0]
    C: gl.constexpr = total.shape[1]
    return total.reshape(R, 2, C // 2).permute(0, 2, 1).split()


@gluon.jit
def _lowered(total, x_scales, column, M):
    """`total` times what its activation rows were divided by and weights multiplied by."""
    row = column + gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
    return total * (gl.load(x_scales + row, mask=row < M, other=0.0) * (1.0 / RAISE))[None, :]


@gluon.constexpr_function
def column_layout(rows, warps):
    """Layout of results `[rows, columns]` in which a thread has 8 neighbours of a column, and a warp whole columns."""
    across = min(rows // 8, 32)
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.jit
def _finish(
    total, bias, residual, out, M, out_features, strip, first_column, WARPS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, HANDED_ON: gl.constexpr,
):  # fmt: skip
    """As `int4_gluon.finish`, through shared memory, so that 16 bytes at a time are stored."""
    C: gl.constexpr = total.shape[1]
    R: gl.constexpr = total.shape[0] if ACTIVATION is None else total.shape[0] // 2
    if ACTIVATION is None:
        width = out_features
        first = strip * 16
        if HAS_BIAS:
            row = first + gl.arange(0, R)
            total += gl.load(bias + row, mask=row < out_features, other=0.0).to(gl.float32)[:, None]
        result = total
    else:
        # Pairs (gate, up) are rows g and g + 8 of a strip.
        width = out_features // 2
        first = strip * 8
        if HAS_BIAS:
            place = gl.arange(0, 2 * R)
            pair = strip * 16 + place // 16 * 16 + place % 8 * 2 + place // 8 % 2
            total += gl.load(bias + pair, mask=pair < out_features, other=0.0).to(gl.float32)[:, None]
        gate, up = total.reshape(R // 8, 2, 8, C).permute(0, 2, 3, 1).split()
        result = gated(gate, up, ACTIVATION).reshape(R, C)
    layout: gl.constexpr = column_layout(R, WARPS)
    if HANDED_ON > 0:
        result = result * (1.0 / HANDED_ON)
        # Neither comparison is true of a NaN, which stays.
        result = gl.where(result > 65504.0, 65504.0, gl.where(result < -65504.0, -65504.0, result))
    if not HAS_RESIDUAL:
        result = result.to(out.dtype.element_ty)
    result = gl.convert_layout(result, layout)
    index = first + gl.arange(0, R, gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, C, gl.SliceLayout(0, layout))
    inside = (index < width)[:, None] & (column < M)[None, :]
    at = column[None, :] * width + index[:, None]
    if HAS_RESIDUAL:
        result += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _place(part, layout: gl.constexpr, R: gl.constexpr, C: gl.constexpr):
    """Where half `part` of a tile's partial sums lies; a warp's rows g make neighbours of 8 values."""
    offsets = gl.arange(0, R)[:, None] + gl.arange(0, C // 2)[None, :] * R
    return gl.set_auto_layout(offsets, layout) + part * (R * C // 2)


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _int4_half_kernel(
    x,  # descriptor of [M, in] float16, blocks [COLUMNS, 128]
    x_scales,  # [M] float32
    words,  # [strips, chunks, 16, 16] int32
    scales,  # [strips, groups, 16] int32
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    workspace,  # [tiles, SPLITS, columns, rows] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    strips,
    in_features: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HANDED_ON: gl.constexpr,  # what results are divided by, 0 for those that are stored as they are
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    chunks: gl.constexpr = (in_features + 127) // 128
    share: gl.constexpr = (chunks + SPLITS - 1) // SPLITS
    column = gl.program_id(0) * COLUMNS
    strip = gl.program_id(1) * WARPS
    start = gl.program_id(2) * share
    end = gl.minimum(start + share, chunks)
    total = _sum_of_chunks(x, words, scales, column, strip, strips, start, end, chunks, GROUP, WARPS, STAGES, mma, PDL)
    if SPLITS == 1:
        total = _lowered(total, x_scales, column, M)
        _finish(
            total, bias, residual, out, M, out_features, strip, column, WARPS, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            HANDED_ON,
        )  # fmt: skip
    else:
        # Half a tile at a time, for all of another's sums would not fit the registers beside its own.
        R: gl.constexpr = 16 * WARPS
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        sums = workspace + tile * (SPLITS * R * COLUMNS)
        halves = _halves(total)
        layout: gl.constexpr = halves[0].type.layout
        for part in gl.static_range(2):
            gl.store(sums + gl.program_id(2) * (R * COLUMNS) + _place(part, layout, R, COLUMNS), halves[part])
        gl.thread_barrier()
        if gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            for part in gl.static_range(2):
                place = _place(part, layout, R, COLUMNS)
                half = gl.zeros([R, COLUMNS // 2], gl.float32, layout)
                for split in range(SPLITS):
                    half += gl.load(sums + split * (R * COLUMNS) + place, cache_modifier=".cg")
                first = column + part * (COLUMNS // 2)
                half = _lowered(half, x_scales, first, M)
                _finish(
                    half, bias, residual, out, M, out_features, strip, first, WARPS, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                    HANDED_ON,
                )  # fmt: skip
            gl.store(counters + tile, 0)


def int4_half(
    x: HalfRows,
    weight: Int4Words,
    dtype: torch.dtype,
    epilogue: Epilogue = Epilogue(),
    config: HalfConfig | None = None,
    handed_on: float = 0.0,
) -> torch.Tensor:
    """act(x W^T + b) + residual for any number of rows.

    Args:
        x: in the order of the weight's columns.
        weight: (gate, up) pairs when there is an activation; its scales fit float16. It is read before the kernels of
            the same stream have ended, so none of them may write it (copies may).
        dtype: of the result, bfloat16 or float16.
        config: how to cut the work; chosen by shape when None.
        handed_on: results are divided by this, and stay finite; 0 for results as they are.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation; `residual` itself where one is given.

    Raises:
        ValueError: `config` needs more room for partial sums than there is, or leaves a split without inputs.
    """
    rows, out_features, in_features = x.values.shape[0], weight.out_features, weight.in_features
    out = epilogue.residual
    if out is None:
        width = out_features if epilogue.activation is None else out_features // 2
        out = torch.empty((rows, width), dtype=dtype, device=x.values.device)
    config = config or half_config(out_features, in_features, rows)
    strips = weight.words.shape[0]
    grid = (-(-rows // config.columns), -(-strips // config.warps), config.splits)
    if config.splits != whole_splits(-(-in_features // CHUNK), config.splits):
        raise ValueError(f"{config} leaves a split without any of {in_features} inputs")
    if config.splits > 1 and math.prod(grid) * config.columns * config.warps * STRIP > WORKSPACE_VALUES:
        raise ValueError(f"{config} of {rows} rows outgrows the workspace: split less")
    workspace, counters = split_workspace(out.device) if config.splits > 1 else (x.scales, x.scales)
    pdl = pdl_supported(out.device)
    block = [config.columns, CHUNK]
    _int4_half_kernel[grid](
        TensorDescriptor.from_tensor(x.values, block, gl.NVMMASharedLayout.get_default_for(block, gl.float16)),
        x.scales,
        weight.words,
        weight.scales,
        out if epilogue.bias is None else epilogue.bias,
        out,
        out,
        workspace,
        counters,
        rows,
        out_features,
        strips,
        in_features=in_features,
        GROUP=weight.group_size,
        WARPS=config.warps,
        COLUMNS=config.columns,
        SPLITS=config.splits,
        STAGES=config.stages,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        HANDED_ON=handed_on,
        PDL=pdl,
        num_warps=config.warps,
        **launch_options(pdl),
    )
    return out
