"""Dense 16-bit products of some 17 to 256 activation rows on wgmma: act(x W^T + b) + residual.

Bound by reading the weight once, `out * in * itemsize` bytes, up to about 200 rows, above by arithmetic, `2 * rows *
out * in` operations. The copy engine brings both operands into a ring of shared memory. The weight depends on no kernel
of the step: as many chunks of it as the ring holds are requested before the kernel waits for its predecessor, so that
the card's memory works through the launches, norms and rotations between two products, which the library's products
leave idle. All activation rows share a tile of the weight, in parts of 64 or 128 rows with sums of their own; the pairs
(gate, up) are neighbouring columns of a sum, which one thread holds. To split a tile along the inputs cost more than it
brought: partial sums of so many rows take 5 to 10 us to meet.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

from typing import Any  # noqa: F401 (the type comments of kernels)

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from aphrodite.kernels.triton.dense_cuts import DenseConfig
from aphrodite.kernels.triton.epilogue import Epilogue, output_of
from aphrodite.kernels.triton.int4_gluon import gated, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.launch import ceil_div, direct_launch, launch_options, pdl_supported

TILE_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.constexpr_function
def sum_layout(part, columns, warps):
    """Layout of sums `[part, columns]`: warpgroups share the rows of a part of 128 and the columns of one of 64."""
    across = part // 16
    return gl.NVMMADistributedLayout([3, 0], [across, warps // across], [16, columns * across // warps, 16])


@gluon.constexpr_function
def row_layout(columns, warps):
    """Layout of results in which a thread has 8 neighbours of a row."""
    across = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _request_weight(x, weight, first, chunk, weights, bars, slot, pred, PARTS: gl.constexpr):
    """Let the copy engine fetch a chunk of the weight; its barrier waits for the activations as well."""
    bar = bars.index(slot)
    mbarrier.expect(bar, weight.block_type.nbytes + PARTS * x.block_type.nbytes, pred=pred)
    columns: gl.constexpr = weight.block_shape[1]
    tma.async_copy_global_to_shared(weight, [first, chunk * columns], bar, weights.index(slot), pred=pred)


@gluon.jit
def _request_rows(x, row, chunk, rows, bars, slot, pred, PARTS: gl.constexpr):
    """Let the copy engine fetch a chunk of the activations; rows beyond the last are zeros."""
    part: gl.constexpr = x.block_shape[0]
    columns: gl.constexpr = x.block_shape[1]
    for index in gl.static_range(PARTS):
        place = rows.index(slot * PARTS + index)
        tma.async_copy_global_to_shared(x, [row + index * part, chunk * columns], bars.index(slot), place, pred=pred)


@gluon.jit
def _sums(
    x, weight, row, first, start, CHUNKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """A tuple of PARTS sums `[part, columns]` over all chunks, the first of which is `start`."""
    dtype: gl.constexpr = weight.dtype
    R: gl.constexpr = x.block_shape[0]
    C: gl.constexpr = weight.block_shape[0]
    CHUNK: gl.constexpr = weight.block_shape[1]
    mma: gl.constexpr = sum_layout(R, C, WARPS)
    weights = gl.allocate_shared_memory(dtype, [STAGES, C, CHUNK], weight.layout)
    rows = gl.allocate_shared_memory(dtype, [STAGES * PARTS, R, CHUNK], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        _request_weight(x, weight, first, (start + slot) % CHUNKS, weights, bars, slot, slot < CHUNKS, PARTS)
    wait_for_producer(PDL)
    for slot in gl.static_range(STAGES):
        _request_rows(x, row, (start + slot) % CHUNKS, rows, bars, slot, slot < CHUNKS, PARTS)
    sums = ()  # type: Any
    for _ in gl.static_range(PARTS):
        sums = sums + (gl.zeros([R, C], gl.float32, mma),)
    for turn in range(CHUNKS):
        place = turn % STAGES
        mbarrier.wait(bars.index(place), turn // STAGES & 1)
        tokens = ()  # type: Any
        for index in gl.static_range(PARTS):
            left = rows.index(place * PARTS + index)
            right = weights.index(place).permute((1, 0))
            tokens = tokens + (warpgroup_mma(left, right, sums[index], is_async=True),)
        # The products of the turn before have ended, and its place in the ring is free, while these run.
        if PARTS == 1:
            sums = (warpgroup_mma_wait(PARTS, deps=tokens),)
        else:
            sums = warpgroup_mma_wait(PARTS, deps=tokens)
        gl.thread_barrier()
        ahead = turn - 1 + STAGES
        free = ahead % STAGES
        pred = (turn > 0) & (ahead < CHUNKS)
        chunk = (start + ahead) % CHUNKS
        _request_weight(x, weight, first, chunk, weights, bars, free, pred, PARTS)
        _request_rows(x, row, chunk, rows, bars, free, pred, PARTS)
    if PARTS == 1:
        sums = (warpgroup_mma_wait(0, deps=sums),)
    else:
        sums = warpgroup_mma_wait(0, deps=sums)
    return sums


@gluon.jit
def _finish(
    total, bias, residual, out, row, M, out_features, first, WARPS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of sums `[part, columns]`, and the store, 16 bytes at a time."""
    R: gl.constexpr = total.shape[0]
    C: gl.constexpr = total.shape[1] if ACTIVATION is None else total.shape[1] // 2
    if HAS_BIAS:
        index = first + gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
        total += gl.load(bias + index, mask=index < out_features, other=0.0).to(gl.float32)[None, :]
    if ACTIVATION is None:
        width = out_features
        begin = first
        result = total
    else:
        width = out_features // 2
        begin = first // 2
        gate, up = total.reshape(R, C, 2).split()
        result = gated(gate, up, ACTIVATION)
    layout: gl.constexpr = row_layout(C, WARPS)
    if not HAS_RESIDUAL:
        result = result.to(out.dtype.element_ty)
    result = gl.convert_layout(result, layout)
    column = begin + gl.arange(0, C, gl.SliceLayout(0, layout))
    token = row + gl.arange(0, R, gl.SliceLayout(1, layout))
    inside = (token < M)[:, None] & (column < width)[None, :]
    at = token[:, None] * width + column[None, :]
    if HAS_RESIDUAL:
        result += gl.load(residual + at, mask=inside, other=0.0).to(gl.float32)
    gl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@direct_launch
@gluon.jit(do_not_specialize=["M"])
def _dense_kernel(
    x,  # descriptor of [M, in], blocks [part, chunk]
    weight,  # descriptor of [out, in], blocks [columns, chunk]
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    M,
    out_features,
    in_features: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    ROTATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    launch_dependents(PDL)
    R: gl.constexpr = x.block_shape[0]
    C: gl.constexpr = weight.block_shape[0]
    chunks: gl.constexpr = (in_features + x.block_shape[1] - 1) // x.block_shape[1]
    row = gl.program_id(0) * (PARTS * R)
    first = gl.program_id(1) * C
    # Blocks that begin with different chunks ask the L2 cache for different activations.
    start = gl.program_id(1) * 5 % chunks if ROTATED else 0
    sums = _sums(x, weight, row, first, start, chunks, PARTS, STAGES, WARPS, PDL)
    # Results go through the ring's memory: no warp may still read it.
    gl.thread_barrier()
    for index in gl.static_range(PARTS):
        _finish(
            sums[index], bias, residual, out, row + index * R, M, out_features, first, WARPS, HAS_BIAS, HAS_RESIDUAL,
            ACTIVATION,
        )  # fmt: skip


def dense_wgmma(
    x: torch.Tensor, weight: torch.Tensor, config: DenseConfig, epilogue: Epilogue = Epilogue()
) -> torch.Tensor:
    """act(x W^T + b) + residual for any number of rows.

    Args:
        x: `[T, in]` of bfloat16 or float16, rows strided by a multiple of 16 bytes.
        weight: `[out, in]` contiguous, of x's dtype, `in` a multiple of 8, `out` of 16; (gate, up) rows interleaved
            when there is an activation. It is read before the kernels of the same stream have ended, so none of them
            may write it (copies may).
        config: how to cut the work.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = output_of(x, out_features, epilogue)
    grid = (ceil_div(rows, config.parts * config.part), ceil_div(out_features, config.columns))
    dtype = TILE_DTYPES[x.dtype]
    row_tile, weight_tile = [config.part, config.chunk], [config.columns, config.chunk]
    pdl = pdl_supported(out.device)
    _dense_kernel[grid](
        TensorDescriptor.from_tensor(x, row_tile, gl.NVMMASharedLayout.get_default_for(row_tile, dtype)),
        TensorDescriptor.from_tensor(weight, weight_tile, gl.NVMMASharedLayout.get_default_for(weight_tile, dtype)),
        out if epilogue.bias is None else epilogue.bias,
        out,
        out,
        rows,
        out_features,
        in_features=in_features,
        PARTS=config.parts,
        STAGES=config.stages,
        WARPS=config.warps,
        ROTATED=config.rotated,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=config.warps,
        **launch_options(pdl),
    )
    return out
