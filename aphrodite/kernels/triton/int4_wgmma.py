"""Some activation rows times a 4-bit weight on wgmma: act(x W^T + b) + residual, for 9 to 64 rows.

With scales that float16 cannot hold, which `int4_half` is not for, it is the kernel for more rows as well.

Up to some 64 rows bound by reading the weight, 0.53 bytes a value in groups of 128; above by arithmetic,
`2 * rows * out * in` operations. The weight is the M operand: its words (`int4_words`) come straight into registers,
are unpacked there while the product before runs, and are the A operand as they lie. Codes less their zero are exact and
groups are scaled in the float32 sums: a chunk of small groups is a product for each, whose sums take registers, so that
tiles are narrower. The activations, B, come through a ring of shared memory that the copy engine fills. Where tiles
would not fill the card blocks share a tile along the inputs: each leaves a float32 partial sum and the last to arrive
adds them up in a fixed order.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple  # noqa: F401 (Any: the type comments of kernels)

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from aphrodite.kernels.triton.epilogue import WORKSPACE_VALUES, Epilogue, output_of, split_workspace
from aphrodite.kernels.triton.int4_gluon import (
    finish,
    launch_dependents,
    load_chunk,
    pair_of_zeros,
    scale_of,
    sum_of_splits,
    unpack,
    wait_for_producer,
)
from aphrodite.kernels.triton.int4_words import CHUNK, STRIP, Int4Words, whole_splits
from aphrodite.kernels.triton.launch import direct_launch, launch_options, pdl_supported


class WgmmaConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        warps: of a block, 4 or 8; each has a strip of 16 weight rows.
        columns: activation rows of a tile, a power of two from 16 to 128; at most `most_columns`.
        splits: of the inputs among blocks.
        stages: chunks of activations in flight; all of a split's are requested at once where there is room for them.
    """

    warps: int
    columns: int
    splits: int
    stages: int


def groups_of_chunk(group_size: int) -> int:
    """How many groups a chunk has: products of its own for each."""
    return max(CHUNK // group_size, 1)


def most_columns(group_size: int) -> int:
    """The widest tile whose sums fit the registers beside those of the groups of a chunk."""
    return {1: 128, 2: 64, 4: 32}[groups_of_chunk(group_size)]


@functools.cache
def wgmma_config(out_features: int, in_features: int, rows: int, group_size: int = CHUNK) -> WgmmaConfig:
    """The cut for a weight `[out, in]`: inputs are split where tiles would not fill 132 multiprocessors."""
    columns = min(max(16, 1 << (rows - 1).bit_length()), most_columns(group_size))
    chunks = -(-in_features // CHUNK)
    tiles = -(-out_features // (4 * STRIP)) * -(-rows // columns)
    if columns <= 32 and tiles <= 192:
        # Blocks short enough to request all their activations at once.
        splits = whole_splits(chunks, max(-(-chunks // 8) if chunks <= 64 else 8, 1))
        share = -(-chunks // splits)
        if share * columns * 256 <= 64 << 10:
            return WgmmaConfig(4, columns, splits, share)
    splits = max(min(256 // tiles, 4, chunks // 8), 1)
    return WgmmaConfig(4, columns, whole_splits(chunks, splits), 3 if columns == 128 else 4)


@gluon.jit
def _by_group(values, S: gl.constexpr):
    """`[..., S]` as a tuple of S."""
    if S == 1:
        parts = (values.reshape(values.shape[:-1]),)  # type: Any
    elif S == 2:
        parts = values.split()
    else:
        even, odd = values.reshape(values.shape[:-1] + (2, 2)).split()
        first, third = even.split()
        second, fourth = odd.split()
        parts = (first, second, third, fourth)
    return parts


@gluon.jit
def _weight_operands(
    loaded, group_words, dtype: gl.constexpr, GROUP: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr
):
    """The codes less their zeros, `[R, 128 / S]` for each of the S groups of a chunk."""
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    R: gl.constexpr = 16 * WARPS
    shape: gl.constexpr = (1, R, 4, S, 4 // S, 8)
    wide = loaded[:, :, :, :, :, None].broadcast_to(shape)
    zeros = pair_of_zeros(group_words, dtype)[:, :, None, :][:, :, :, :, None][:, :, :, :, :, None].broadcast_to(shape)
    values = unpack(wide, zeros, dtype)
    values = values.reshape(R, 4, S, 4 // S, 4, 2).permute(0, 3, 4, 1, 5, 2)  # R j e t b S
    operands = ()  # type: Any
    for part in gl.static_range(S):
        operand = _by_group(values, S)[part].reshape(R, 128 // S)
        operands = operands + (gl.convert_layout(operand, gl.DotOperandLayout(0, mma, 2), assert_trivial=True),)
    return operands


@gluon.jit
def _add_products(total, products, group_words, S: gl.constexpr, mma: gl.constexpr):
    """`total` with the finished products of a chunk, each times its group's scale."""
    scales = _by_group(scale_of(group_words).reshape(total.shape[0], S), S)
    for part in gl.static_range(S):
        scale = gl.convert_layout(scales[part], gl.SliceLayout(1, mma), assert_trivial=True)
        total += products[part] * scale[:, None]
    return total


@gluon.jit
def _multiply(weights, smem, place, total, S: gl.constexpr):
    """Start a chunk's products, of `weights` and the activations at `place` in shared memory; their tokens."""
    tokens = ()  # type: Any
    for part in gl.static_range(S):
        activations = smem.index(place * S + part).permute((1, 0))
        tokens = tokens + (warpgroup_mma(weights[part], activations, gl.zeros_like(total), is_async=True),)
    return tokens


@gluon.jit
def _finished(tokens, S: gl.constexpr):
    """The products that `_multiply` started."""
    if S == 1:
        products = (warpgroup_mma_wait(0, deps=tokens),)  # type: Any
    else:
        products = warpgroup_mma_wait(0, deps=tokens)
    return products


@gluon.jit
def _finished_beside(tokens, weights, S: gl.constexpr):
    """The same, and the next operands: unpacking them stays before the wait, beside the products, because the wait
    takes its results."""
    both = warpgroup_mma_wait(0, deps=tokens + weights)
    return both[:S], both[S:]


@gluon.jit
def _request(x, column, chunk, smem, bar, place, pred, S: gl.constexpr):
    """Let the copy engine fetch the activations of a chunk."""
    mbarrier.expect(bar, S * x.block_type.nbytes, pred=pred)
    for part in gl.static_range(S):
        k = chunk * 128 + part * (128 // S)
        tma.async_copy_global_to_shared(x, [column, k], bar, smem.index(place * S + part), pred=pred)


@gluon.jit
def _start_products(x, column, weights, total, smem, bars, start, chunk, end, S: gl.constexpr, STAGES: gl.constexpr):
    """Start the products of `chunk` after those of the one before it have ended, whose place in the ring is free."""
    turn = chunk - start
    gl.thread_barrier()
    free = (turn - 1) % STAGES
    _request(x, column, chunk - 1 + STAGES, smem, bars.index(free), free, chunk - 1 + STAGES < end, S)
    mbarrier.wait(bars.index(turn % STAGES), turn // STAGES & 1)
    return _multiply(weights, smem, turn % STAGES, total, S)


@gluon.jit
def _sum_in_turns(
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
    """The sum over the chunks `start` to `end`, whose activations go through a ring."""
    dtype: gl.constexpr = x.dtype
    COLUMNS: gl.constexpr = x.block_shape[0]
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    words_0, groups_0 = load_chunk(words, scales, start, strip, strips, chunks, GROUP, WARPS)
    words_1, groups_1 = load_chunk(words, scales, start + 1, strip, strips, chunks, GROUP, WARPS)
    smem = gl.allocate_shared_memory(dtype, [STAGES * S, COLUMNS, 128 // S], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    wait_for_producer(PDL)
    for slot in gl.static_range(STAGES):
        _request(x, column, start + slot, smem, bars.index(slot), slot, start + slot < end, S)

    total = gl.zeros([16 * WARPS, COLUMNS], gl.float32, mma)
    weights = _weight_operands(words_0, groups_0, dtype, GROUP, WARPS, mma)
    pending = groups_0
    words_0, groups_0 = words_1, groups_1
    words_1, groups_1 = load_chunk(words, scales, start + 2, strip, strips, chunks, GROUP, WARPS)
    mbarrier.wait(bars.index(0), 0)
    tokens = _multiply(weights, smem, 0, total, S)
    # Products read their registers while the next operands are unpacked, so that those must have others: two turns a
    # loop. Wide tiles have no registers left for that; other blocks work beside their products.
    TURNS: gl.constexpr = 1 if COLUMNS * S > 64 else 2
    for chunk in range(start + 1, end + 1 - TURNS, TURNS):
        for turn in gl.static_range(TURNS):
            if TURNS == 1:
                products = _finished(tokens, S)
                total = _add_products(total, products, pending, S, mma)
                weights = _weight_operands(words_0, groups_0, dtype, GROUP, WARPS, mma)
            else:
                weights = _weight_operands(words_0, groups_0, dtype, GROUP, WARPS, mma)
                products, weights = _finished_beside(tokens, weights, S)
                total = _add_products(total, products, pending, S, mma)
            pending = groups_0
            words_0, groups_0 = words_1, groups_1
            words_1, groups_1 = load_chunk(words, scales, chunk + turn + 2, strip, strips, chunks, GROUP, WARPS)
            tokens = _start_products(x, column, weights, total, smem, bars, start, chunk + turn, end, S, STAGES)
    total = _add_products(total, _finished(tokens, S), pending, S, mma)
    if TURNS == 2 and (end - start) % 2 == 0:
        weights = _weight_operands(words_0, groups_0, dtype, GROUP, WARPS, mma)
        left = _start_products(x, column, weights, total, smem, bars, start, end - 1, end, S, STAGES)
        total = _add_products(total, _finished(left, S), groups_0, S, mma)
    return total


@gluon.jit
def _sum_at_once(
    x,
    words,
    scales,
    column,
    strip,
    strips,
    start,
    chunks: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
    SHARE: gl.constexpr,
    mma: gl.constexpr,
    PDL: gl.constexpr,
):
    """The sum over `SHARE` chunks from `start` on, whose activations are all requested in the beginning.

    Chunks beyond the last bring activations of zero.
    """
    dtype: gl.constexpr = x.dtype
    COLUMNS: gl.constexpr = x.block_shape[0]
    DEPTH: gl.constexpr = min(SHARE, 4)
    queue = ()  # type: Any
    for ahead in gl.static_range(DEPTH):
        queue = queue + (load_chunk(words, scales, start + ahead, strip, strips, chunks, GROUP, WARPS),)
    S: gl.constexpr = 1 if GROUP >= 128 else 128 // GROUP
    smem = gl.allocate_shared_memory(dtype, [SHARE * S, COLUMNS, 128 // S], x.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    wait_for_producer(PDL)
    mbarrier.expect(bar, SHARE * S * x.block_type.nbytes)
    for part in gl.static_range(SHARE * S):
        k = (start + part // S) * 128 + part % S * (128 // S)
        tma.async_copy_global_to_shared(x, [column, k], bar, smem.index(part))
    total = gl.zeros([16 * WARPS, COLUMNS], gl.float32, mma)
    loaded, pending = queue[0]
    weights = _weight_operands(loaded, pending, dtype, GROUP, WARPS, mma)
    mbarrier.wait(bar, 0)
    tokens = _multiply(weights, smem, gl.to_tensor(0), total, S)
    for chunk in gl.static_range(1, SHARE):
        queue = queue[1:]
        if chunk + DEPTH <= SHARE:
            ahead = start + chunk + DEPTH - 1
            queue = queue + (load_chunk(words, scales, ahead, strip, strips, chunks, GROUP, WARPS),)
        loaded, following = queue[0]
        weights = _weight_operands(loaded, following, dtype, GROUP, WARPS, mma)
        products, weights = _finished_beside(tokens, weights, S)
        total = _add_products(total, products, pending, S, mma)
        pending = following
        tokens = _multiply(weights, smem, gl.to_tensor(chunk), total, S)
    return _add_products(total, _finished(tokens, S), pending, S, mma)


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _int4_wgmma_kernel(
    x,  # descriptor of [M, in], blocks [COLUMNS, a group of a chunk]
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
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    chunks: gl.constexpr = (in_features + 127) // 128
    share: gl.constexpr = (chunks + SPLITS - 1) // SPLITS
    column = gl.program_id(0) * COLUMNS
    strip = gl.program_id(1) * WARPS
    start = gl.program_id(2) * share
    if share <= STAGES:
        total = _sum_at_once(x, words, scales, column, strip, strips, start, chunks, GROUP, WARPS, share, mma, PDL)
    else:
        end = gl.minimum(start + share, chunks)
        total = _sum_in_turns(
            x, words, scales, column, strip, strips, start, end, chunks, GROUP, WARPS, STAGES, mma, PDL
        )

    width = out_features if ACTIVATION is None else out_features // 2
    if SPLITS == 1:
        finish(
            total, bias, residual, out, width, M, out_features, strip, column, WARPS, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
        )
    else:
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        last, total = sum_of_splits(total, workspace, counters, tile, gl.program_id(2), SPLITS)
        if last:
            finish(
                total, bias, residual, out, width, M, out_features, strip, column, WARPS, HAS_BIAS, HAS_RESIDUAL,
                ACTIVATION,
            )  # fmt: skip


def int4_wgmma(
    x: torch.Tensor, weight: Int4Words, epilogue: Epilogue = Epilogue(), config: WgmmaConfig | None = None
) -> torch.Tensor:
    """act(x W^T + b) + residual for any number of rows.

    Args:
        x: `[T, in]` bfloat16 or float16, 16-byte aligned; rows are multiples of 8 values apart, as is `in`.
        weight: (gate, up) pairs when there is an activation. It is read before the kernels of the
            same stream have ended, so none of them may write it (copies may).
        config: how to cut the work; chosen by shape when None.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.

    Raises:
        ValueError: `config` needs more room for partial sums than there is, or leaves a split without inputs.
    """
    rows, out_features, in_features = x.shape[0], weight.out_features, weight.in_features
    out = output_of(x, out_features, epilogue)
    config = config or wgmma_config(out_features, in_features, rows, weight.group_size)
    strips = weight.words.shape[0]
    grid = (-(-rows // config.columns), -(-strips // config.warps), config.splits)
    chunks = -(-in_features // CHUNK)
    if config.splits != whole_splits(chunks, config.splits):
        raise ValueError(f"{config} leaves a split without any of {in_features} inputs")
    workspace, counters = split_workspace(x.device) if config.splits > 1 else (x, x)
    if config.splits > 1 and math.prod(grid) * config.columns * config.warps * STRIP > WORKSPACE_VALUES:
        raise ValueError(f"{config} of {rows} rows outgrows the workspace: split less")
    pdl = pdl_supported(x.device)
    block = [config.columns, CHUNK // groups_of_chunk(weight.group_size)]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    _int4_wgmma_kernel[grid](
        TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kind)),
        weight.words,
        weight.scales,
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
        WARPS=config.warps,
        COLUMNS=config.columns,
        SPLITS=config.splits,
        STAGES=config.stages,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=config.warps,
        **launch_options(pdl),
    )
    return out
