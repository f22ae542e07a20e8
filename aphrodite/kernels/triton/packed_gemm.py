"""Products of more activation rows with a weight in planes of bits, and its rows as dense ones.

Skinny GEMM, up to 64 rows: act(x W^T + b) + residual. A tile is decoded and multiplied by the matrix units, with
activations of bfloat16 as tf32: to round weights to bfloat16, too, would cost as much as rounding the result does
(1.6e-3 of it). The planes are read once; of a weight with few rows blocks share a tile along `in`, as in `linear.py`.

Expansion, for the vendor's library where there are more rows, and for embeddings: `out * in` values are written.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from typing import Any, NamedTuple  # noqa: F401 (Any: the type comments of kernels)

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.epilogue import Epilogue, finish_skinny, split_workspace
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
    in_column_order,
    load_affine,
    load_plane,
    mantissa_place,
    packed_code,
    packed_mantissa,
    plane_arguments,
    spread_runs,
)
from aphrodite.kernels.triton.packed_grid import grid_tile, is_grid
from aphrodite.quantization.planes import RUN_WORDS, Planes

PACKED_SKINNY_MAX_ROWS = 64


class PackedSkinnyCut(NamedTuple):
    """How a skinny GEMM is cut: tile of the weight (rows, columns), splits of `in`, pipeline stages, warps."""

    rows: int
    chunk: int
    splits: int
    stages: int
    warps: int


@functools.cache
def packed_skinny_cut(out_features: int, in_features: int, rows: int, hip: bool = False) -> PackedSkinnyCut:
    """The cut for a weight `[out, in]` and up to 64 activation rows; on AMD's processors for 64 KiB.

    Tiles of 64 rows and 128 columns are what Hopper's matrix units take from registers.
    """
    splits = max(1, min(512 // ceil_div(out_features, 64), in_features // 512))
    return PackedSkinnyCut(64, 128, splits, 2 if hip or rows > 16 else 3, 4)


@triton.jit
def _decoded_tile(
    low, high, scales, super_scales, offsets, super_offsets, table, one, rows, step,
    columns: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, GROUP: tl.constexpr, SUPER: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """`[ROWS, CHUNK]` weights of columns step * CHUNK and following."""
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    COUNT: tl.constexpr = CHUNK // IN_WORD
    if is_grid(KIND):
        tile = grid_tile(
            low, high, scales, super_scales, table, rows, step * (CHUNK // 32), columns, KIND, ROWS, CHUNK // 32
        )
        weight = tile.to(TYPE)
    else:
        RUN: tl.constexpr = 4 * IN_WORD
        SPANS: tl.constexpr = 2 if GROUP < RUN else 1
        SPAN: tl.constexpr = RUN // SPANS
        BITS: tl.constexpr = LOW_BITS + HIGH_BITS
        RUNS: tl.constexpr = CHUNK // RUN
        words: tl.constexpr = columns // IN_WORD
        low_words = load_plane(low, rows, step * COUNT, words, COUNT)
        high_words = low_words
        if HIGH_BITS > 0:
            high_words = load_plane(high, rows, step * COUNT, words, COUNT)
        fields = ()  # type: Any
        for span in tl.static_range(SPANS):
            factor, shift = load_affine(
                scales, super_scales, offsets, super_offsets, rows, step * RUNS, span, columns, RUN, SPAN, RUNS, BITS,
                GROUP, SUPER, OFFSET, ZERO, KIND, PLAIN=True,
            )  # fmt: skip
            # Of codes in a mantissa, by their place: those of even and of odd fields.
            affine = ()  # type: Any
            for parity in tl.static_range(2):
                raised = (
                    factor * (1 << (23 - mantissa_place(parity, LOW_BITS, HIGH_BITS))) if KIND == "integer" else factor
                )
                offset = shift + raised if KIND == "integer" else shift
                affine = affine + (spread_runs(raised, ROWS, RUNS), spread_runs(offset, ROWS, RUNS))
            for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
                if KIND == "integer":
                    code = packed_mantissa(low_words, high_words, one, index, LOW_BITS, HIGH_BITS)
                else:
                    code = packed_code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
                fields = fields + ((code * affine[index % 2 * 2] - affine[index % 2 * 2 + 1]).to(TYPE),)
        weight = in_column_order(fields, ROWS, RUNS, IN_WORD)
    return weight


@direct_launch
@triton.jit(do_not_specialize=["M"])
def _packed_skinny_kernel(
    x,  # [M, in]
    x_stride,
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,
    residual,
    out,  # [M, width]
    out_stride,
    workspace,  # [tiles, SPLITS, ROWS, COLUMNS] float32
    counters,  # [tiles] int32, zero between launches
    M,
    out_features,
    one,  # the bits of 1.0
    columns: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,  # M padded
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    TYPE: tl.constexpr = tl.float16 if x.dtype.element_ty == tl.float16 else tl.float32
    first = tl.program_id(0) * ROWS
    rows = tl.minimum(first + tl.arange(0, ROWS), out_features - 1).to(tl.int64)
    tokens = tl.minimum(tl.arange(0, COLUMNS), M - 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    wait_for_producer(PDL)
    steps: tl.constexpr = (columns + CHUNK - 1) // CHUNK
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    start = tl.program_id(1) * share
    for step in tl.range(start, tl.minimum(start + share, steps), num_stages=STAGES):
        weight = _decoded_tile(
            low, high, scales, super_scales, offsets, super_offsets, table, one, rows, step, columns, LOW_BITS,
            HIGH_BITS, GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, TYPE,
        )  # fmt: skip
        column = step * CHUNK + tl.arange(0, CHUNK)
        pointers = x + tokens[None, :] * x_stride + column[:, None]
        if columns % CHUNK == 0:
            values = tl.load(pointers)
        else:
            values = tl.load(pointers, mask=(column < columns)[:, None], other=0.0)
        total = tl.dot(weight, values.to(TYPE), total, input_precision="tf32")
    finish_skinny(
        total, bias, residual, out, out_stride, workspace, counters, M, out_features, first, ROWS, COLUMNS, SPLITS,
        ACTIVATION, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@direct_launch
@triton.jit
def _expand_kernel(
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    numbers,  # [rows] integers, or anything when not HAS_NUMBERS
    out,  # [rows, in]
    first_row,
    end_row,
    columns: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_NUMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows first_row to end_row of the weight, or those that `numbers` names from first_row to end_row."""
    launch_dependents(PDL)
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    SPANS: tl.constexpr = 2 if GROUP < RUN else 1
    SPAN: tl.constexpr = RUN // SPANS
    BITS: tl.constexpr = LOW_BITS + HIGH_BITS
    words: tl.constexpr = columns // IN_WORD
    COUNT: tl.constexpr = CHUNK // IN_WORD
    RUNS: tl.constexpr = CHUNK // RUN
    first = tl.program_id(0) * ROWS
    step = tl.program_id(1)
    row = first + tl.arange(0, ROWS)
    rows = tl.minimum(first_row + row, end_row - 1).to(tl.int64)
    if HAS_NUMBERS:
        wait_for_producer(PDL)
        rows = tl.load(numbers + rows).to(tl.int64)
    if is_grid(KIND):
        tile = grid_tile(
            low, high, scales, super_scales, table, rows, step * (CHUNK // 32), columns, KIND, ROWS, CHUNK // 32
        )
        weight = tile.to(out.dtype.element_ty)
    else:
        low_words = load_plane(low, rows, step * COUNT, words, COUNT)
        high_words = low_words
        if HIGH_BITS > 0:
            high_words = load_plane(high, rows, step * COUNT, words, COUNT)
        fields = ()  # type: Any
        for span in tl.static_range(SPANS):
            factor, shift = load_affine(
                scales, super_scales, offsets, super_offsets, rows, step * RUNS, span, columns, RUN, SPAN, RUNS, BITS,
                GROUP, SUPER, OFFSET, ZERO, KIND,
            )  # fmt: skip
            factor = spread_runs(factor, ROWS, RUNS)
            shift = spread_runs(shift, ROWS, RUNS)
            for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
                code = packed_code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
                fields = fields + ((code * factor - shift).to(out.dtype.element_ty),)
        weight = in_column_order(fields, ROWS, RUNS, IN_WORD)
    if not HAS_NUMBERS:
        # The result's memory may still be read by an earlier kernel's product.
        wait_for_producer(PDL)
    column = step * CHUNK + tl.arange(0, CHUNK)
    inside = (first_row + row < end_row)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], weight, mask=inside)


def packed_skinny(
    x: torch.Tensor,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    cut: PackedSkinnyCut | None = None,
) -> None:
    """Writes act(x W^T + b) + residual for up to 64 rows of a 16-bit type; arguments as `packed_gemv`'s."""
    cut = cut or packed_skinny_cut(weight.rows, weight.form.columns, x.shape[0], torch.version.hip is not None)
    workspace, counters = split_workspace(x.device) if cut.splits > 1 else (x, x)
    pdl = pdl_supported(x.device)
    _packed_skinny_kernel[(ceil_div(weight.rows, cut.rows), cut.splits)](
        x,
        x.stride(0),
        *plane_arguments(weight),
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        workspace,
        counters,
        x.shape[0],
        weight.rows,
        BITS_OF_ONE,
        **form_arguments(weight),
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        COLUMNS=max(16, next_power_of_2(x.shape[0])),
        SPLITS=cut.splits,
        STAGES=cut.stages,
        HAS_BIAS=epilogue.bias is not None,
        HAS_RESIDUAL=epilogue.residual is not None,
        ACTIVATION=epilogue.activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )


def expand_planes(weight: Planes, out: torch.Tensor, first: int = 0) -> None:
    """Writes rows `first` and following, as many as `out` `[rows, in]` (contiguous, floating) has."""
    _expand(weight, out, None, first)


def expand_rows(weight: Planes, numbers: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the rows that `numbers` `[rows]` (integers) names to `out` `[rows, in]`, contiguous, floating."""
    if out.shape[0]:
        _expand(weight, out, numbers, 0)


def _expand(weight: Planes, out: torch.Tensor, numbers: torch.Tensor | None, first: int) -> None:
    rows, columns = out.shape
    chunk = min(1024, max(RUN_WORDS * 32, next_power_of_2(columns)))
    pdl = pdl_supported(out.device)
    _expand_kernel[(ceil_div(rows, 4), ceil_div(columns, chunk))](
        *plane_arguments(weight),
        out if numbers is None else numbers,
        out,
        first,
        first + rows,
        **form_arguments(weight),
        ROWS=4,
        CHUNK=chunk,
        HAS_NUMBERS=numbers is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
