"""Products of few activation rows with a weight: act(norm(x) W^T + b) + residual for up to 64 rows.

Both kernels are bound by reading the weight once, `out * in * itemsize` bytes; below, arithmetic is
`2 * rows * out * in` operations.

GEMV, 1..4 rows. A block owns a few whole rows of W, walks them in chunks through a queue of register tiles and adds up
products on the vector units: no shared memory, no matrix units, no partial sums between blocks. The first chunks are
requested before the kernel waits for its predecessor. RMSNorm costs nothing here: the squares are summed beside the
product, and 1 / rms scales the finished sum. A weight in fp8 is widened in registers and the scales of its rows are
applied to the sums, so activations keep their type.

Skinny GEMM, up to 64 rows. W is the M operand of the matrix units (its rows are many), the activations the N operand.
Where W has too few rows to fill the card, blocks share a tile along `in`: each leaves a float32 partial sum, and the
last to arrive adds them up in a fixed order, so equal inputs give equal results.

The rows of a gated projection are interleaved (gate, up) pairs, so a block has both halves of a result.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple  # noqa: F401 (Any: the type comments of kernels)

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.epilogue import (
    WORKSPACE_VALUES,
    Epilogue,
    finish_gemv,
    finish_skinny,
    output_of,
    split_workspace,
)
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)

GEMV_MAX_ROWS = 4
SKINNY_MAX_ROWS = 64


class GemvConfig(NamedTuple):
    """How a GEMV is cut: weight rows a block, values of `in` a chunk, chunks in flight, warps."""

    rows: int
    chunk: int
    depth: int
    warps: int


class SkinnyConfig(NamedTuple):
    """How a skinny GEMM is cut: tile of W (rows, values of `in`), splits of `in`, pipeline stages, warps.

    With `ahead` a block requests its last tile of W before it waits for the predecessor, into registers. That takes
    splits of equal length.
    """

    rows: int
    chunk: int
    splits: int
    stages: int
    warps: int
    ahead: bool = False


Kernel = Literal["gemv", "skinny", "library"]


@functools.cache
def choose_kernel(out_features: int, in_features: int, rows: int, itemsize: int, *, gated: bool = False) -> Kernel:
    """The fastest way to multiply `rows` activations by a weight `[out, in]`, as measured on an H100.

    Args:
        itemsize: bytes a value. Matrix units would round float32 operands to tf32, so the library multiplies those.
        gated: an activation of (gate, up) pairs follows, which the library leaves to another kernel.
    """
    if not 0 < rows <= SKINNY_MAX_ROWS:
        return "library"
    if itemsize == 4:
        return "gemv" if rows <= GEMV_MAX_ROWS else "library"
    # Long sums for two rows keep too many registers from holding weights that are on their way.
    if rows == 1 or (rows == 2 and in_features <= 8192):
        return "gemv"
    if rows <= 16 or gated:
        return "skinny"
    # With more rows a product pays where the weight is large, or has so many rows that nothing needs to be split.
    if rows <= 32:
        return "skinny" if out_features * in_features > 1 << 24 else "library"
    return "skinny" if out_features > 1 << 16 else "library"


# The best cuts for one row of 16-bit values, by (out, in), measured on an H100 in a chain of layers.
MEASURED_GEMV = {
    (6144, 4096): GemvConfig(4, 2048, 1, 4),
    (4096, 4096): GemvConfig(4, 2048, 1, 8),
    (28672, 4096): GemvConfig(2, 2048, 1, 8),
    (4096, 14336): GemvConfig(4, 2048, 2, 8),
    (128256, 4096): GemvConfig(4, 2048, 1, 8),
    (4096, 1024): GemvConfig(2, 512, 2, 2),
    (1024, 2048): GemvConfig(2, 2048, 1, 8),
    (6144, 1024): GemvConfig(4, 256, 4, 1),
    (1024, 3072): GemvConfig(4, 512, 4, 2),
    (151936, 1024): GemvConfig(4, 1024, 1, 8),
}


@functools.cache
def gemv_config(out_features: int, in_features: int, rows: int, itemsize: int = 2) -> GemvConfig:
    """The cut for a weight `[out, in]` of `itemsize` bytes a value and 1..4 activation rows.

    Chunks of 2,048 16-bit values won for every 8B shape (the best lie within 2-4 %); of a small weight everything is
    requested at once, by blocks of one or two warps. Sums for more activation rows take the registers of weight rows.
    """
    if rows == 1 and itemsize == 2 and (measured := MEASURED_GEMV.get((out_features, in_features))):
        return measured
    longest = 4096 // itemsize
    fitting = [chunk for chunk in (longest, longest // 2, longest // 4) if in_features % chunk == 0]
    chunk = fitting[0] if fitting else min(longest, max(256, next_power_of_2(in_features)))
    chunks = ceil_div(in_features, chunk)
    if rows == 1 and itemsize == 2 and out_features * in_features < 8 << 20 and in_features % 512 == 0:
        return GemvConfig(4, 512, min(4, in_features // 512), 2)
    # Warps that load 16 bytes a thread from one row; 8 of fp8, whose sums for many rows would take twice the registers.
    lanes = max(chunk * itemsize // (256 if itemsize == 1 and rows > 2 else 512), 1)
    if out_features * in_features < 24 << 20:
        return GemvConfig(2, chunk, min(2 if chunks <= 3 else 1, chunks), min(lanes, 4 if rows <= 2 else 8))
    return GemvConfig(4 if rows <= 2 else 2, chunk, min(2, chunks), min(lanes, 8))


@functools.cache
def skinny_config(out_features: int, in_features: int, rows: int, hip: bool = False) -> SkinnyConfig:
    """The cut for a weight `[out, in]` and up to 64 rows: `in` is split where tiles would not fill the processors.

    AMD's processors have 64 KiB of shared memory, which holds two pipeline stages.
    """
    padded = padded_rows(rows)
    tiles = ceil_div(out_features, 64)
    chunk = 256 if 48 <= tiles < 192 and padded <= 16 else 128
    splits = 1 if tiles >= 96 else 2 if tiles >= 48 else 4
    splits = min(splits, ceil_div(in_features, chunk))
    stages = 2 if hip else 3 if chunk == 256 or padded > 32 else 4
    # Worth 2-4 % where blocks are short and have the registers.
    ahead = not hip and chunk == 256 and splits > 1 and ceil_div(in_features, chunk) % splits == 0
    return SkinnyConfig(64, chunk, splits, stages, 4, ahead)


def padded_rows(rows: int) -> int:
    """Activation rows as the matrix units want them: a power of two, at least 16."""
    return max(16, 1 << (rows - 1).bit_length())


@triton.jit
def _load_chunk(weight, rows, start, in_features: tl.constexpr, CHUNK: tl.constexpr):
    columns = start + tl.arange(0, CHUNK)
    pointers = weight + rows[:, None] * in_features + columns[None, :]
    if start + CHUNK <= in_features:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=columns[None, :] < in_features, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_row(base, start, in_features: tl.constexpr, CHUNK: tl.constexpr):
    columns = start + tl.arange(0, CHUNK)
    if start + CHUNK <= in_features:
        return tl.load(base + columns).to(tl.float32)
    return tl.load(base + columns, mask=columns < in_features, other=0.0).to(tl.float32)


@direct_launch
@triton.jit
def _gemv_kernel(
    x,  # [M, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    weight,  # [out, in]
    weight_scale,  # [out] float32, or anything when not HAS_SCALE
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    out_features,
    in_features: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    first = tl.program_id(0) * ROWS
    # Rows beyond the last read the last again instead of being masked.
    rows = tl.minimum(first + tl.arange(0, ROWS), out_features - 1).to(tl.int64)
    queue = ()  # type: Any
    for ahead in tl.static_range(DEPTH):
        queue = queue + (_load_chunk(weight, rows, ahead * CHUNK, in_features, CHUNK),)
    if HAS_SCALE:
        row_scales = tl.load(weight_scale + rows)
    wait_for_producer(PDL)
    sums = ()  # type: Any
    squares = ()  # type: Any
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros((ROWS, CHUNK), tl.float32),)
        squares = squares + (tl.zeros((CHUNK,), tl.float32),)
    for step in tl.static_range((in_features + CHUNK - 1) // CHUNK):
        tile = queue[0].to(tl.float32)
        if (step + DEPTH) * CHUNK < in_features:
            queue = queue[1:] + (_load_chunk(weight, rows, (step + DEPTH) * CHUNK, in_features, CHUNK),)
        else:
            queue = queue[1:]
        if HAS_NORM:
            scale = _load_row(norm_weight, step * CHUNK, in_features, CHUNK)
        new_sums = ()  # type: Any
        new_squares = ()  # type: Any
        for m in tl.static_range(M):
            values = _load_row(x + m * x_stride, step * CHUNK, in_features, CHUNK)
            if HAS_NORM:
                new_squares = new_squares + (squares[m] + values * values,)
                values = values * scale
            else:
                new_squares = new_squares + (squares[m],)
            new_sums = new_sums + (sums[m] + tile * values[None, :],)
        sums = new_sums
        squares = new_squares
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=1)
        if HAS_NORM:
            total = total * (1.0 / tl.sqrt(tl.sum(squares[m], axis=0) / in_features + eps))
        if HAS_SCALE:
            total = total * row_scales
        width = out_features if ACTIVATION is None else out_features // 2
        finish_gemv(total, bias, residual, out, m, width, out_features, first, ROWS, ACTIVATION, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def _weight_tile(weight, rows, start, in_features: tl.constexpr, CHUNK: tl.constexpr):
    """`[ROWS, CHUNK]` of W, zeros beyond `in`."""
    k = start + tl.arange(0, CHUNK)
    pointers = weight + rows[:, None] * in_features + k[None, :]
    if in_features % CHUNK == 0:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=k[None, :] < in_features, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _activation_tile(x, columns, start, in_features: tl.constexpr, CHUNK: tl.constexpr):
    """`[CHUNK, COLUMNS]` of x transposed, zeros beyond `in`."""
    k = start + tl.arange(0, CHUNK)
    pointers = x + columns[None, :] + k[:, None]
    if in_features % CHUNK == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=k[:, None] < in_features, other=0.0)
    return tile


@direct_launch
@triton.jit(do_not_specialize=["M"])
def _skinny_kernel(
    x,  # [M, in]
    x_stride,
    weight,  # [out, in]
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # [M, width], or anything when not HAS_RESIDUAL
    out,  # [M, width]
    workspace,  # [tiles, SPLITS, ROWS, COLUMNS] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    in_features: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,  # M padded
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    first = tl.program_id(0) * ROWS
    rows = tl.minimum(first + tl.arange(0, ROWS), out_features - 1).to(tl.int64)
    columns = tl.minimum(tl.arange(0, COLUMNS), M - 1)
    chunks: tl.constexpr = (in_features + CHUNK - 1) // CHUNK
    share: tl.constexpr = (chunks + SPLITS - 1) // SPLITS
    start = tl.program_id(1) * share
    end = tl.minimum(start + share, chunks)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if AHEAD:
        end -= 1
        last_tile = _weight_tile(weight, rows, end * CHUNK, in_features, CHUNK)
    wait_for_producer(PDL)
    for chunk in tl.range(start, end, num_stages=STAGES):
        tile = _weight_tile(weight, rows, chunk * CHUNK, in_features, CHUNK)
        total = tl.dot(tile, _activation_tile(x, columns * x_stride, chunk * CHUNK, in_features, CHUNK), total)
    if AHEAD:
        total = tl.dot(last_tile, _activation_tile(x, columns * x_stride, end * CHUNK, in_features, CHUNK), total)
    width = out_features if ACTIVATION is None else out_features // 2
    finish_skinny(
        total, bias, residual, out, width, workspace, counters, M, out_features, first, ROWS, COLUMNS, SPLITS,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    norm: tuple[torch.Tensor, float] | None = None,
    config: GemvConfig | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(x) W^T + b) + residual for 1..4 rows.

    Args:
        x: `[T, in]`, rows may be strided, 1 <= T <= 4.
        weight: `[out, in]` contiguous; (gate, up) rows interleaved when there is an activation. It is read before the
            kernels of the same stream have ended, so none of them may write it (copies may).
        norm: RMSNorm of x: weight `[in]` and epsilon.
        config: how to cut the work; chosen by shape when None.
        weight_scale: `[out]` float32, factors of the rows of a weight in fp8.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = output_of(x, out_features, epilogue)
    cut = config or gemv_config(out_features, in_features, rows, weight.itemsize)
    pdl = pdl_supported(x.device)
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    _gemv_kernel[(ceil_div(out_features, cut.rows),)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        weight,
        x if weight_scale is None else weight_scale,
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out_features,
        in_features=in_features,
        M=rows,
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        DEPTH=cut.depth,
        HAS_NORM=norm is not None,
        HAS_SCALE=weight_scale is not None,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    config: SkinnyConfig | None = None,
) -> torch.Tensor:
    """act(x W^T + b) + residual for a handful of rows.

    Args:
        x: `[T, in]` of a 16-bit dtype, rows may be strided.
        weight: as for `gemv`.
        config: how to cut the work; chosen by shape when None.

    Returns:
        As `gemv`.

    Raises:
        ValueError: `config` needs more room for partial sums than there is, or is `ahead` with unequal splits.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    out = output_of(x, out_features, epilogue)
    cut = config or skinny_config(out_features, in_features, rows, torch.version.hip is not None)
    tiles, columns = ceil_div(out_features, cut.rows), padded_rows(rows)
    if cut.splits > 1 and tiles * cut.splits * cut.rows * columns > WORKSPACE_VALUES:
        raise ValueError(f"{cut} of {rows} rows and a weight {list(weight.shape)} outgrows the workspace: split less")
    if cut.ahead and ceil_div(in_features, cut.chunk) % cut.splits:
        raise ValueError(f"{cut} does not split {in_features} evenly, which ahead takes")
    workspace, counters = split_workspace(x.device) if cut.splits > 1 else (x, x)
    pdl = pdl_supported(x.device)
    _skinny_kernel[(tiles, cut.splits)](
        x,
        x.stride(0),
        weight,
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        workspace,
        counters,
        rows,
        out_features,
        in_features=in_features,
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        COLUMNS=columns,
        SPLITS=cut.splits,
        STAGES=cut.stages,
        AHEAD=cut.ahead,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out
