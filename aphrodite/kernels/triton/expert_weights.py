"""Experts' matrices as kernels read them: stacked along their rows, dense or packed in planes of bits.

Packed weights stay so in memory and are widened in registers, a tile at a time (`packed.py`).
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.packed import load_plane, load_values, packed_code, packed_field, spread_runs
from aphrodite.kernels.triton.packed_grid import (
    grid_code,
    grid_codes,
    grid_scale,
    grid_tile,
    grid_zero,
    is_grid,
    is_shifted,
    load_run_values,
    load_runs,
    run_factor,
    run_shift,
    scale_words,
    sum_rows,
)
from aphrodite.quantization.planes import Planes


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One projection of all experts.

    Attributes:
        weight: `[experts, out, in]` of the compute dtype, or planes of `experts * out` rows.
        experts: how many.
        bias: `[experts, out]` float32.
        is_e2m1: the planes are MXFP4's, whose codes are floats that arithmetic widens faster than their table.
    """

    weight: torch.Tensor | Planes
    experts: int
    bias: torch.Tensor | None = None
    is_e2m1: bool = False

    @property
    def packed(self) -> bool:
        return isinstance(self.weight, Planes)

    @property
    def out_features(self) -> int:
        return self.weight.rows // self.experts if isinstance(self.weight, Planes) else self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.form.columns if isinstance(self.weight, Planes) else self.weight.shape[2]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        own = self.weight.tensors if isinstance(self.weight, Planes) else (self.weight,)
        return own if self.bias is None else (*own, self.bias)

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """The kernels' pointers; anything for those that there are not."""
        weight = self.weight
        if not isinstance(weight, Planes):
            return (*(weight,) * 7, weight if self.bias is None else self.bias)
        first = weight.low
        rest = (weight.high, weight.scales, weight.super_scales, weight.offsets, weight.super_offsets, weight.table)
        return (first, *(first if tensor is None else tensor for tensor in (*rest, self.bias)))

    @property
    def constants(self) -> dict[str, Any]:
        """The kernels' constants that tell what the planes mean."""
        if not isinstance(self.weight, Planes):
            form: tuple[Any, ...] = (16, 0, 32, 0, "none", 0, "dense")
        else:
            of = self.weight.form
            form = (of.low_bits, of.high_bits, of.group_size, of.super_size, of.offset, of.zero, of.kind)
            form = (*form[:-1], "e2m1") if self.is_e2m1 else form
        names = ("LOW_BITS", "HIGH_BITS", "GROUP", "SUPER", "OFFSET", "ZERO", "KIND")
        return {**dict(zip(names, form, strict=True)), "HAS_BIAS": self.bias is not None}


@triton.jit
def _expert_code(
    low, high, table, index: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, KIND: tl.constexpr
):
    """`packed.packed_code`, and of "e2m1" twice the number, as the table of MXFP4 has it: exponent and mantissa are put
    where float32 has them, whose bias is 127 above, denormals included."""
    if KIND == "e2m1":
        field = packed_field(low, index, 4, 22)
        bits = (field & 0x01C00000) | ((field & 0x02000000) << 6)
        value = bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38
    else:
        value = packed_code(low, high, table, index, LOW_BITS, HIGH_BITS, KIND)
    return value


@triton.jit
def _load_raw(
    scales,
    super_scales,
    offsets,
    super_offsets,
    rows,
    first_run,
    span: tl.constexpr,
    columns: tl.constexpr,
    RUN: tl.constexpr,
    SPAN: tl.constexpr,
    RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """What `_affine` makes factors and shifts of, `[ROWS, RUNS]` each: scales, super-scales, offsets, their scales.
    They are loaded a chunk ahead, for the compiler does not pipeline such short loads."""
    column = (first_run + tl.arange(0, RUNS)) * RUN + span * SPAN
    inside = (column < columns)[None, :]
    at = rows[:, None] * (columns // GROUP) + (column // GROUP)[None, :]
    scale = tl.load(scales + at, mask=inside, other=0)
    above = scale
    offset = scale
    below = scale
    if SUPER > 0:
        block = rows[:, None] * (columns // SUPER) + (column // SUPER)[None, :]
        above = tl.load(super_scales + block, mask=inside, other=0.0)
        if OFFSET != "none":
            below = tl.load(super_offsets + block, mask=inside, other=0.0)
    if OFFSET == "zeros" or OFFSET == "offsets":
        offset = tl.load(offsets + at, mask=inside, other=0)
    return scale, above, offset, below


@triton.jit
def _affine(
    scale,
    above,
    offset,
    below,
    BITS: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
):
    """(factor, shift) of `_load_raw`'s: a weight is factor * code - shift, for the code that `_expert_code` gives."""
    if OFFSET == "paired":
        pair = scale.to(tl.int32)
        factor = (pair & 15).to(tl.float32) * above.to(tl.float32)
        shift = ((pair >> 4) & 15).to(tl.float32) * below.to(tl.float32)
    else:
        factor = scale.to(tl.float32)
        if SUPER > 0:
            factor *= above.to(tl.float32)
        if OFFSET == "zeros":
            shift = factor * (offset.to(tl.float32) + ZERO)
        elif OFFSET == "offsets":
            shift = offset.to(tl.float32)
            if SUPER > 0:
                shift *= below.to(tl.float32)
            shift += factor * ZERO
        else:
            shift = factor * ZERO
    if KIND == "integer":
        factor = factor * (1 << BITS)
        shift = shift + factor
    return factor, shift


@triton.jit
def _dense_rows(x, weight, rows, columns: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    sums = tl.zeros((ROWS, CHUNK), tl.float32)
    for step in tl.static_range((columns + CHUNK - 1) // CHUNK):
        k = step * CHUNK + tl.arange(0, CHUNK)
        pointers = weight + rows[:, None] * columns + k[None, :]
        if columns % CHUNK == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=k[None, :] < columns, other=0.0)
        values = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)
        sums += tile.to(tl.float32) * values[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _dense_tile(total, from_x, weight, rows, step, columns: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    k = step * CHUNK + tl.arange(0, CHUNK)
    pointers = weight + rows[:, None] * columns + k[None, :]
    if columns % CHUNK == 0:
        tile = tl.load(pointers)
        values = tl.load(from_x + k[:, None])
    else:
        tile = tl.load(pointers, mask=k[None, :] < columns, other=0.0)
        values = tl.load(from_x + k[:, None], mask=k[:, None] < columns, other=0.0)
    return tl.dot(tile, values, total, input_precision="ieee")


@triton.jit
def _plane_chunk(
    of_runs,  # [ROWS, RUNS] float32, what is added to
    x,
    low,
    high,
    table,
    first_raw,  # of `_load_raw`, for the first span
    second_raw,  # for the second, where groups are shorter than runs
    rows,
    step,
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
):
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    SPANS: tl.constexpr = 2 if GROUP < RUN else 1
    words: tl.constexpr = columns // IN_WORD
    COUNT: tl.constexpr = CHUNK // IN_WORD
    RUNS: tl.constexpr = CHUNK // RUN
    low_words = load_plane(low, rows, step * COUNT, words, COUNT)
    high_words = low_words
    if HIGH_BITS > 0:
        high_words = load_plane(high, rows, step * COUNT, words, COUNT)
    for span in tl.static_range(SPANS):
        raw = first_raw if span == 0 else second_raw
        factor, shift = _affine(raw[0], raw[1], raw[2], raw[3], LOW_BITS + HIGH_BITS, SUPER, OFFSET, ZERO, KIND)
        products = tl.zeros((ROWS, COUNT), tl.float32)
        total = tl.zeros((COUNT,), tl.float32)
        for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
            code = _expert_code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
            values = load_values(x, step * COUNT, index, columns, RUN, COUNT)
            products += code * values[None, :]
            total += values
        of_runs += factor * tl.sum(tl.reshape(products, (ROWS, RUNS, 4)), axis=2)
        if KIND == "integer" or OFFSET != "none":
            of_runs -= shift * tl.sum(tl.reshape(total, (RUNS, 4)), axis=1)[None, :]
    return of_runs


@triton.jit
def _plane_rows(
    x,
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    rows,
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
    STAGES: tl.constexpr,
):
    RUN: tl.constexpr = 16 if LOW_BITS == 8 else 32
    RUNS: tl.constexpr = CHUNK // RUN
    LAST: tl.constexpr = 1 if GROUP < RUN else 0  # span
    SPAN: tl.constexpr = RUN // (LAST + 1)
    of_runs = tl.zeros((ROWS, RUNS), tl.float32)
    first = _load_raw(
        scales, super_scales, offsets, super_offsets, rows, 0, 0, columns, RUN, SPAN, RUNS, GROUP, SUPER, OFFSET
    )
    second = _load_raw(
        scales, super_scales, offsets, super_offsets, rows, 0, LAST, columns, RUN, SPAN, RUNS, GROUP, SUPER, OFFSET
    )
    for step in tl.range((columns + CHUNK - 1) // CHUNK, num_stages=STAGES):
        next_first = _load_raw(
            scales, super_scales, offsets, super_offsets, rows, (step + 1) * RUNS, 0, columns, RUN, SPAN, RUNS, GROUP,
            SUPER, OFFSET,
        )  # fmt: skip
        next_second = _load_raw(
            scales, super_scales, offsets, super_offsets, rows, (step + 1) * RUNS, LAST, columns, RUN, SPAN, RUNS,
            GROUP, SUPER, OFFSET,
        )  # fmt: skip
        of_runs = _plane_chunk(
            of_runs, x, low, high, table, first, second, rows, step, columns, LOW_BITS, HIGH_BITS, GROUP, SUPER,
            OFFSET, ZERO, KIND, ROWS, CHUNK,
        )  # fmt: skip
        first = next_first
        second = next_second
    return tl.sum(of_runs, axis=1)


@triton.jit
def _plane_tile(
    total,
    from_x,
    low,
    high,
    table,
    first_raw,
    second_raw,
    rows,
    step,
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
):
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    SPANS: tl.constexpr = 2 if GROUP < RUN else 1
    words: tl.constexpr = columns // IN_WORD
    COUNT: tl.constexpr = CHUNK // IN_WORD
    RUNS: tl.constexpr = CHUNK // RUN
    low_words = load_plane(low, rows, step * COUNT, words, COUNT)
    high_words = low_words
    if HIGH_BITS > 0:
        high_words = load_plane(high, rows, step * COUNT, words, COUNT)
    k = step * CHUNK + tl.arange(0, CHUNK)
    if columns % CHUNK == 0:
        values = tl.load(from_x + k[:, None])
    else:
        values = tl.load(from_x + k[:, None], mask=k[:, None] < columns, other=0.0)
    fields = ()  # type: Any
    for span in tl.static_range(SPANS):
        raw = first_raw if span == 0 else second_raw
        factor, shift = _affine(raw[0], raw[1], raw[2], raw[3], LOW_BITS + HIGH_BITS, SUPER, OFFSET, ZERO, KIND)
        factor = spread_runs(factor, ROWS, RUNS)
        shift = spread_runs(shift, ROWS, RUNS)
        for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
            code = _expert_code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
            fields = fields + ((code * factor - shift).to(values.dtype),)
    # Columns in their order, so that activations are fetched whole and one product takes them all.
    if IN_WORD == 8:
        even = tl.join(tl.join(fields[0], fields[4]), tl.join(fields[2], fields[6]))
        odd = tl.join(tl.join(fields[1], fields[5]), tl.join(fields[3], fields[7]))
        joined = tl.join(even, odd)
    else:
        joined = tl.join(tl.join(fields[0], fields[2]), tl.join(fields[1], fields[3]))
    tile = tl.permute(tl.reshape(joined, (ROWS, RUNS, 4, IN_WORD)), (0, 1, 3, 2))
    return tl.dot(tl.reshape(tile, (ROWS, CHUNK)), values, total, input_precision="ieee")


@triton.jit
def _plane_tiles(
    from_x,
    low,
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    rows,
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
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    RUN: tl.constexpr = 16 if LOW_BITS == 8 else 32
    RUNS: tl.constexpr = CHUNK // RUN
    LAST: tl.constexpr = 1 if GROUP < RUN else 0  # span
    SPAN: tl.constexpr = RUN // (LAST + 1)
    total = tl.zeros((ROWS, PAIRS), tl.float32)
    first = _load_raw(
        scales, super_scales, offsets, super_offsets, rows, 0, 0, columns, RUN, SPAN, RUNS, GROUP, SUPER, OFFSET
    )
    second = _load_raw(
        scales, super_scales, offsets, super_offsets, rows, 0, LAST, columns, RUN, SPAN, RUNS, GROUP, SUPER, OFFSET
    )
    for step in tl.range((columns + CHUNK - 1) // CHUNK, num_stages=STAGES):
        next_first = _load_raw(
            scales, super_scales, offsets, super_offsets, rows, (step + 1) * RUNS, 0, columns, RUN, SPAN, RUNS, GROUP,
            SUPER, OFFSET,
        )  # fmt: skip
        next_second = _load_raw(
            scales, super_scales, offsets, super_offsets, rows, (step + 1) * RUNS, LAST, columns, RUN, SPAN, RUNS,
            GROUP, SUPER, OFFSET,
        )  # fmt: skip
        total = _plane_tile(
            total, from_x, low, high, table, first, second, rows, step, columns, LOW_BITS, HIGH_BITS, GROUP, SUPER,
            OFFSET, ZERO, KIND, ROWS, CHUNK,
        )  # fmt: skip
        first = next_first
        second = next_second
    return total


@triton.jit
def _grid_rows(
    x, low, high, scales, super_scales, table, rows,
    columns: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = CHUNK // 32
    totals = ()  # type: Any
    numbers = ()  # type: Any
    for row in tl.static_range(ROWS):
        totals = totals + (tl.zeros((RUNS,), tl.float32),)
        numbers = numbers + (tl.sum(tl.where(tl.arange(0, ROWS) == row, rows, 0), axis=0),)
    for step in tl.range((columns + CHUNK - 1) // CHUNK, num_stages=STAGES):
        column = step * CHUNK + tl.arange(0, RUNS) * 32
        values = load_run_values(x, step * RUNS, columns, RUNS)
        new_totals = ()  # type: Any
        for row in tl.static_range(ROWS):
            runs = load_runs(low, high, scales, super_scales, numbers[row], column, columns, KIND, RUNS)
            new_totals = new_totals + (totals[row] + _grid_products(runs, values, table, KIND, RUNS),)
        totals = new_totals
    return sum_rows(totals, ROWS, RUNS)


@triton.jit
def _grid_products(runs, values, table, KIND: tl.constexpr, RUNS: tl.constexpr):
    """`[RUNS]` float32: a row's runs times the activations `values`."""
    PART: tl.constexpr = scale_words(KIND)
    total = tl.zeros((RUNS,), tl.float32)
    for part in tl.static_range(4 // PART):
        products = tl.zeros((RUNS,), tl.float32)
        summed = tl.zeros((RUNS,), tl.float32)
        shifted = tl.zeros((RUNS,), tl.float32)
        for word in tl.static_range(part * PART, (part + 1) * PART):
            codes = grid_codes(runs, table, word, KIND)
            of_word = tl.zeros((RUNS,), tl.float32)
            for index in tl.static_range(8):
                products += grid_code(codes, index, KIND) * values[8 * word + index]
                of_word += values[8 * word + index]
            summed += of_word
            if is_shifted(KIND):
                shifted += run_shift(runs, word, KIND) * of_word
        products = products * grid_scale(KIND) - summed * (grid_scale(KIND) + grid_zero(KIND))
        total += run_factor(runs, part, KIND) * (products - shifted)
    return total


@triton.jit
def _grid_tiles(
    from_x, low, high, scales, super_scales, table, rows,
    columns: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = CHUNK // 32
    total = tl.zeros((ROWS, PAIRS), tl.float32)
    for step in tl.range((columns + CHUNK - 1) // CHUNK, num_stages=STAGES):
        k = step * CHUNK + tl.arange(0, CHUNK)
        if columns % CHUNK == 0:
            values = tl.load(from_x + k[:, None])
        else:
            values = tl.load(from_x + k[:, None], mask=k[:, None] < columns, other=0.0)
        tile = grid_tile(low, high, scales, super_scales, table, rows, step * RUNS, columns, KIND, ROWS, RUNS)
        total = tl.dot(tile.to(values.dtype), values, total, input_precision="ieee")
    return total


@triton.jit
def dot_expert_rows(
    x,  # a row of activations
    low,  # of "dense" weights these themselves
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    rows,  # [ROWS] int64, numbers into [experts * out]
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
    STAGES: tl.constexpr,  # chunks of packed weights in flight; dense ones are requested as registers allow
):
    """`[ROWS]` float32: rows of experts times one of x, on the vector units."""
    if KIND == "dense":
        result = _dense_rows(x, low, rows, columns, ROWS, CHUNK)
    elif is_grid(KIND):
        result = _grid_rows(x, low, high, scales, super_scales, table, rows, columns, KIND, ROWS, CHUNK, STAGES)
    else:
        result = _plane_rows(
            x, low, high, scales, super_scales, offsets, super_offsets, table, rows, columns, LOW_BITS, HIGH_BITS,
            GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, STAGES,
        )  # fmt: skip
    return result


@triton.jit
def dot_expert_tiles(
    from_x,  # [1, PAIRS] pointers to rows of activations
    low,  # of "dense" weights these themselves
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    rows,  # [ROWS] int64, numbers into [experts * out]
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
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`[ROWS, PAIRS]` float32: rows of experts times transposed rows of x, on the matrix units."""
    if KIND == "dense":
        result = tl.zeros((ROWS, PAIRS), tl.float32)
        for step in tl.range((columns + CHUNK - 1) // CHUNK, num_stages=STAGES):
            result = _dense_tile(result, from_x, low, rows, step, columns, ROWS, CHUNK)
    elif is_grid(KIND):
        result = _grid_tiles(
            from_x, low, high, scales, super_scales, table, rows, columns, KIND, ROWS, CHUNK, PAIRS, STAGES
        )
    else:
        result = _plane_tiles(
            from_x, low, high, scales, super_scales, offsets, super_offsets, table, rows, columns, LOW_BITS, HIGH_BITS,
            GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, PAIRS, STAGES,
        )  # fmt: skip
    return result
