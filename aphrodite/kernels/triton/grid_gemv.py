"""Products of one or two activation rows with a weight that names points of a grid: act(norm(x) W^T + b) + residual.

`packed_gemv.py`'s design over `packed_grid.py`'s runs, a run a thread: for float32, AMD's cards, and versions of Triton
that Gluon's kernels were not checked with; `grid_row.py` is for the others. Lookups bind it, of which the first-level
cache serves a line at a time: 25 % of an H100's bandwidth with weights of 2.3 bits.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

from typing import Any  # noqa: F401 (the type comments of kernels)

import triton
import triton.language as tl

from aphrodite.kernels.triton.epilogue import finish_gemv
from aphrodite.kernels.triton.launch import direct_launch, launch_dependents, wait_for_producer
from aphrodite.kernels.triton.packed_grid import (
    ends_shift,
    grid_codes,
    grid_mantissa,
    grid_raise,
    grid_zero,
    load_run_values,
    load_runs,
    run_factor,
    run_shift,
    scale_words,
    sum_rows,
)


@triton.jit
def _load_tile(
    low, high, scales, super_scales, first, out_features,
    columns: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`load_runs` of `ROWS` rows from `first`, row after row, chunk after chunk. Beyond the last row that is read again
    instead of being masked."""
    tile = ()  # type: Any
    for row in tl.static_range(ROWS):
        number = tl.minimum(first + row, out_features - 1).to(tl.int64)
        for chunk in tl.static_range((columns + CHUNK - 1) // CHUNK):
            column = chunk * CHUNK + tl.arange(0, CHUNK // 32) * 32
            tile = tile + load_runs(low, high, scales, super_scales, number, column, columns, KIND, CHUNK // 32)
    return tile


@triton.jit
def _four(tile, number: tl.constexpr):
    """Entry `number` of `_load_tile`."""
    return tile[4 * number], tile[4 * number + 1], tile[4 * number + 2], tile[4 * number + 3]


@triton.jit
def _prepare(values, KIND: tl.constexpr, RUNS: tl.constexpr, EXACT: tl.constexpr):
    """Of what a chunk's runs are multiplied by, 32 `[RUNS]`: the same times what makes their product with a mantissa
    that with the code, plus themselves; sums of those and of what the zero adds for each scale of a run; and sums of
    the values for each shift of a run, as tuples."""
    raised_values = ()  # type: Any
    raised_sums = ()  # type: Any
    sums = ()  # type: Any
    raised_sum = tl.zeros((RUNS,), tl.float32)
    summed = tl.zeros((RUNS,), tl.float32)
    for word in tl.static_range(4):
        for index in tl.static_range(8):
            value = values[8 * word + index]
            raised = value * grid_raise(index, KIND, EXACT)
            raised_values = raised_values + (raised,)
            raised_sum += raised + value * grid_zero(KIND)
            summed += value
        if (word + 1) % scale_words(KIND) == 0:
            raised_sums = raised_sums + (raised_sum,)
            raised_sum = tl.zeros((RUNS,), tl.float32)
        if ends_shift(word, KIND):
            sums = sums + (summed,)
            summed = tl.zeros((RUNS,), tl.float32)
    return raised_values, raised_sums, sums


@triton.jit
def _add_products(
    totals, runs, prepared, table, one,
    KIND: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`totals`, `[RUNS]` for each of the M rows of activations, and the products of a row's runs in a chunk with what
    `_prepare` made of each."""
    PART: tl.constexpr = scale_words(KIND)
    for part in tl.static_range(4 // PART):
        products = ()  # type: Any
        for m in tl.static_range(M):
            products = products + (-prepared[m][1][part],)
        for word in tl.static_range(part * PART, (part + 1) * PART):
            codes = grid_codes(runs, table, word, KIND)
            for index in tl.static_range(8):
                code = grid_mantissa(codes, one, index, KIND, EXACT, PTX)
                new_products = ()  # type: Any
                for m in tl.static_range(M):
                    new_products = new_products + (products[m] + code * prepared[m][0][8 * word + index],)
                products = new_products
            if ends_shift(word, KIND):
                shift = run_shift(runs, word, KIND)
                shifted = ()  # type: Any
                for m in tl.static_range(M):
                    shifted = shifted + (products[m] - shift * prepared[m][2][word if KIND == "iq1_m" else 0],)
                products = shifted
        factor = run_factor(runs, part, KIND)
        new_totals = ()  # type: Any
        for m in tl.static_range(M):
            new_totals = new_totals + (totals[m] + factor * products[m],)
        totals = new_totals
    return totals


@direct_launch
@triton.jit(do_not_specialize=["passes"])
def grid_gemv_kernel(
    x,  # [M, in]
    x_stride,
    norm_weight,  # [in], or anything when not HAS_NORM
    eps,
    low,
    high,
    scales,
    super_scales,
    table,
    bias,  # [out], or anything when not HAS_BIAS
    residual,  # as out, or anything when not HAS_RESIDUAL
    out,  # [M, width]
    out_stride,
    out_features,
    passes,  # tiles of rows a block
    one,  # the bits of 1.0
    columns: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,  # whether the device understands it
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    RUNS: tl.constexpr = CHUNK // 32
    CHUNKS: tl.constexpr = (columns + CHUNK - 1) // CHUNK
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    first = tl.program_id(0) * ROWS
    tile = _load_tile(low, high, scales, super_scales, first, out_features, columns, KIND, ROWS, CHUNK)
    factors = ()  # type: Any
    if HAS_NORM:
        for chunk in tl.static_range(CHUNKS):
            factors = factors + (load_run_values(norm_weight, chunk * RUNS, columns, RUNS),)
    wait_for_producer(PDL)
    # Activations stay in registers for all rows of the block: [chunk][m].
    prepared = ()  # type: Any
    squares = ()  # type: Any
    for _ in tl.static_range(M):
        squares = squares + (tl.zeros((RUNS,), tl.float32),)
    for chunk in tl.static_range(CHUNKS):
        of_chunk = ()  # type: Any
        new_squares = ()  # type: Any
        for m in tl.static_range(M):
            values = load_run_values(x + m * x_stride, chunk * RUNS, columns, RUNS)
            if HAS_NORM:
                square = squares[m]
                normed = ()  # type: Any
                for field in tl.static_range(32):
                    square += values[field] * values[field]
                    normed = normed + (values[field] * factors[chunk][field],)
                new_squares = new_squares + (square,)
                of_chunk = of_chunk + (_prepare(normed, KIND, RUNS, EXACT),)
            else:
                of_chunk = of_chunk + (_prepare(values, KIND, RUNS, EXACT),)
        prepared = prepared + (of_chunk,)
        if HAS_NORM:
            squares = new_squares
    for _ in tl.range(passes):
        current = tile
        first_of_tile = first
        first += tl.num_programs(0) * ROWS
        tile = _load_tile(low, high, scales, super_scales, first, out_features, columns, KIND, ROWS, CHUNK)
        sums = ()  # type: Any
        for row in tl.static_range(ROWS):
            totals = ()  # type: Any
            for _ in tl.static_range(M):
                totals = totals + (tl.zeros((RUNS,), tl.float32),)
            for chunk in tl.static_range(CHUNKS):
                runs = _four(current, row * CHUNKS + chunk)
                totals = _add_products(totals, runs, prepared[chunk], table, one, KIND, M, EXACT, PTX)
            sums = sums + (totals,)
        for m in tl.static_range(M):
            of_rows = ()  # type: Any
            for row in tl.static_range(ROWS):
                of_rows = of_rows + (sums[row][m],)
            total = sum_rows(of_rows, ROWS, RUNS)
            if HAS_NORM:
                total = total * (1.0 / tl.sqrt(tl.sum(squares[m], axis=0) / columns + eps))
            finish_gemv(
                total, bias, residual, out, m, out_stride, out_features, first_of_tile, ROWS, ACTIVATION, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip
