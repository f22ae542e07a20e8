"""Products of one or two activation rows with a weight in planes of bits: act(norm(x) W^T + b) + residual.

Bound by reading the planes once, 4.6 bits a value of Q4_K, 4.2 of 4 bits in groups of 128; on the vector units. What
the 1 of a mantissa and the zero add is taken back once a group, with sums of the group's activations. That is 2.5
operations a weight of 4 bits and 1.5 a weight beside, where an H100 has 6 at its full bandwidth.

A block keeps its activations, normalised, in registers, and walks over tiles of a few rows; the next tile is on its way
while one is multiplied, the first before the kernel waits for its predecessor. RMSNorm is applied as in `linear.py`:
squares are summed beside the products, and 1 / rms scales the finished sums.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.epilogue import Epilogue, finish_gemv
from aphrodite.kernels.triton.grid_gemv import grid_gemv_kernel
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)
from aphrodite.kernels.triton.packed import (
    BITS_OF_ONE,
    form_arguments,
    load_affine,
    load_plane,
    load_values,
    mantissa_place,
    packed_code,
    packed_mantissa,
    plane_arguments,
)
from aphrodite.kernels.triton.packed_grid import grid_arguments, is_grid, understands_ptx
from aphrodite.platforms import platform_of
from aphrodite.quantization.planes import Planes

PACKED_GEMV_MAX_ROWS = 2
GRID_COLUMNS = 16384  # of activations that the registers of a block hold beside the tiles of a grid's points


class PackedGemvCut(NamedTuple):
    """How a GEMV is cut: weight rows a tile, columns a chunk, warps, blocks for each multiprocessor."""

    rows: int
    chunk: int
    warps: int
    blocks: int


@functools.cache
def packed_gemv_cut(in_features: int, rows: int, bits: int) -> PackedGemvCut:
    """The cut for a weight with `in` columns of codes of `bits` bits and 1 or 2 activation rows.

    A thread has a run of columns, or two where there are more than 16,384; tiles are as high and blocks as many as
    registers hold.
    """
    warps = min(16, max(1, next_power_of_2(in_features) // 1024))
    chunk = min(1024 * warps, max(128, next_power_of_2(in_features)))
    return PackedGemvCut(2 if rows > 1 or bits > 4 else 4, chunk, warps, max(1, 16 // warps))


@functools.cache
def grid_gemv_cut(in_features: int, rows: int, gated: bool) -> PackedGemvCut:
    """The same for weights that name points of a grid."""
    cut = packed_gemv_cut(in_features, rows, 1)
    if rows == 1 and in_features <= GRID_COLUMNS:
        return cut._replace(rows=4, blocks=max(1, 20 // cut.warps))
    few = in_features * rows > GRID_COLUMNS and not gated  # pairs of rows make one activation
    return cut._replace(rows=1 if few else 2)


@triton.jit
def _load_tile(
    low, high, scales, super_scales, offsets, super_offsets, rows,
    columns: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """All that a product needs of whole rows, chunk after chunk: words, words of high bits if there are any, and
    (factor, shift) of each span."""
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    words: tl.constexpr = columns // IN_WORD
    tile = ()  # type: Any
    for chunk in tl.static_range((columns + CHUNK - 1) // CHUNK):
        tile = tile + (load_plane(low, rows, chunk * CHUNK // IN_WORD, words, CHUNK // IN_WORD),)
        if HIGH_BITS > 0:
            tile = tile + (load_plane(high, rows, chunk * CHUNK // IN_WORD, words, CHUNK // IN_WORD),)
        for span in tl.static_range(SPANS):
            tile = tile + load_affine(
                scales, super_scales, offsets, super_offsets, rows, chunk * CHUNK // RUN, span, columns, RUN,
                RUN // SPANS, CHUNK // RUN, LOW_BITS + HIGH_BITS, GROUP, SUPER, OFFSET, ZERO, KIND, PLAIN=True,
            )  # fmt: skip
    return tile


@direct_launch
@triton.jit(do_not_specialize=["passes"])
def _packed_gemv_kernel(
    x,  # [M, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # as out, or anything when not HAS_RESIDUAL
    out,  # [M, width]
    out_stride,
    out_features,
    passes,  # tiles of rows a block
    one,  # the bits of 1.0
    columns: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    SPANS: tl.constexpr = 2 if GROUP < RUN else 1
    COUNT: tl.constexpr = CHUNK // IN_WORD
    RUNS: tl.constexpr = CHUNK // RUN
    CHUNKS: tl.constexpr = (columns + CHUNK - 1) // CHUNK
    PLANES: tl.constexpr = 2 if HIGH_BITS > 0 else 1
    ENTRY: tl.constexpr = PLANES + 2 * SPANS  # of a tile, for each chunk
    SHIFTS: tl.constexpr = ZERO != 0 or OFFSET != "none"
    # Rows beyond the last read the last again instead of being masked.
    first = tl.program_id(0) * ROWS
    rows = tl.minimum(first + tl.arange(0, ROWS), out_features - 1).to(tl.int64)
    tile = _load_tile(
        low, high, scales, super_scales, offsets, super_offsets, rows, columns, LOW_BITS, HIGH_BITS, GROUP, SUPER,
        OFFSET, ZERO, KIND, CHUNK, SPANS,
    )  # fmt: skip
    factors = ()  # type: Any
    if HAS_NORM:
        for field in tl.static_range(CHUNKS * IN_WORD):
            factors = factors + (
                load_values(norm_weight, field // IN_WORD * COUNT, field % IN_WORD, columns, RUN, COUNT),
            )
    wait_for_producer(PDL)
    # Activations stay in registers for all rows of the block, [m][chunk][field], times what makes their product with a
    # mantissa that with the code plus themselves; and their sums, so multiplied and not, [m][chunk][span].
    values = ()  # type: Any
    raised_sums = ()  # type: Any
    sums = ()  # type: Any
    norms = ()  # type: Any
    for m in tl.static_range(M):
        squares = tl.zeros((COUNT,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            for span in tl.static_range(SPANS):
                summed = tl.zeros((COUNT,), tl.float32)
                raised_sum = tl.zeros((COUNT,), tl.float32)
                for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
                    prepared = load_values(x + m * x_stride, chunk * COUNT, index, columns, RUN, COUNT)
                    if HAS_NORM:
                        squares += prepared * prepared
                        prepared = prepared * factors[chunk * IN_WORD + index]
                    summed += prepared
                    if KIND == "integer":
                        prepared = prepared * (1 << (23 - mantissa_place(index, LOW_BITS, HIGH_BITS)))
                        raised_sum += prepared
                    values = values + (prepared,)
                sums = sums + (tl.sum(tl.reshape(summed, (RUNS, 4)), axis=1),)
                raised_sums = raised_sums + (tl.sum(tl.reshape(raised_sum, (RUNS, 4)), axis=1),)
        if HAS_NORM:
            norms = norms + (1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps),)
    for _ in tl.range(passes):
        current = tile
        first_of_tile = first
        first += tl.num_programs(0) * ROWS
        rows = tl.minimum(first + tl.arange(0, ROWS), out_features - 1).to(tl.int64)
        tile = _load_tile(
            low, high, scales, super_scales, offsets, super_offsets, rows, columns, LOW_BITS, HIGH_BITS, GROUP, SUPER,
            OFFSET, ZERO, KIND, CHUNK, SPANS,
        )  # fmt: skip
        totals = ()  # type: Any
        for _ in tl.static_range(M):
            totals = totals + (tl.zeros((ROWS, RUNS), tl.float32),)
        for part in tl.static_range(CHUNKS * SPANS):
            products = ()  # type: Any
            for _ in tl.static_range(M):
                products = products + (tl.zeros((ROWS, COUNT), tl.float32),)
            for within in tl.static_range(IN_WORD // SPANS):
                if KIND == "integer":
                    code = packed_mantissa(
                        current[part // SPANS * ENTRY],
                        current[part // SPANS * ENTRY + PLANES - 1],
                        one,
                        part % SPANS * (IN_WORD // SPANS) + within,
                        LOW_BITS,
                        HIGH_BITS,
                    )
                else:
                    code = packed_code(
                        current[part // SPANS * ENTRY],
                        current[part // SPANS * ENTRY + PLANES - 1],
                        table,
                        part % SPANS * (IN_WORD // SPANS) + within,
                        LOW_BITS,
                        HIGH_BITS,
                        KIND,
                    )
                new_products = ()  # type: Any
                for m in tl.static_range(M):
                    value = values[m * CHUNKS * IN_WORD + part * (IN_WORD // SPANS) + within]
                    new_products = new_products + (products[m] + code * value[None, :],)
                products = new_products
            new_totals = ()  # type: Any
            for m in tl.static_range(M):
                product = tl.sum(tl.reshape(products[m], (ROWS, RUNS, 4)), axis=2)
                if KIND == "integer":
                    product -= raised_sums[m * CHUNKS * SPANS + part][None, :]
                total = totals[m] + current[part // SPANS * ENTRY + PLANES + 2 * (part % SPANS)] * product
                if SHIFTS:
                    shift = current[part // SPANS * ENTRY + PLANES + 2 * (part % SPANS) + 1]
                    total -= shift * sums[m * CHUNKS * SPANS + part][None, :]
                new_totals = new_totals + (total,)
            totals = new_totals
        for m in tl.static_range(M):
            total = tl.sum(totals[m], axis=1)
            if HAS_NORM:
                total = total * norms[m]
            finish_gemv(
                total, bias, residual, out, m, out_stride, out_features, first_of_tile, ROWS, ACTIVATION, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return platform_of(device).multiprocessors if device.type == "cuda" else 1


def packed_gemv(
    x: torch.Tensor,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    norm: tuple[torch.Tensor, float] | None = None,
    cut: PackedGemvCut | None = None,
) -> None:
    """Writes act(norm(x) W^T + b) + residual for 1 or 2 rows.

    Args:
        x: `[T, in]`, in the order of the weight's columns, rows may be strided.
        weight: (gate, up) rows interleaved when there is an activation. Read before the kernels of the same step have
            ended, so none of them may write it.
        out: `[T, width]`, rows may be strided; where there is a residual it is this tensor.
        norm: RMSNorm of x: weight `[in]` and epsilon.
        cut: chosen by shape when None.
    """
    form = weight.form
    if is_grid(form.kind):
        if x.shape[0] > 1 and form.columns > GRID_COLUMNS:
            for row in range(x.shape[0]):
                packed_gemv(x[row : row + 1], weight, out[row : row + 1], epilogue, norm)
            return
        cut = cut or grid_gemv_cut(form.columns, x.shape[0], epilogue.activation is not None)
    else:
        cut = cut or packed_gemv_cut(form.columns, x.shape[0], form.low_bits + form.high_bits)
    tiles = ceil_div(weight.rows, cut.rows)
    passes = ceil_div(tiles, cut.blocks * _multiprocessors(x.device))
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    pdl = pdl_supported(x.device)
    if is_grid(form.kind):
        kernel: Any = grid_gemv_kernel
        planes = grid_arguments(weight)
        constants: dict[str, Any] = {"columns": form.columns, "KIND": form.kind, "PTX": understands_ptx(x.device)}
    else:
        kernel, planes, constants = _packed_gemv_kernel, plane_arguments(weight), form_arguments(weight)
    kernel[(ceil_div(tiles, passes),)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        *planes,
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        weight.rows,
        passes,
        BITS_OF_ONE,
        **constants,
        M=x.shape[0],
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        HAS_NORM=norm is not None,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
