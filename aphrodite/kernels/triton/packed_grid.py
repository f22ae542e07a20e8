"""Reading weights that name points of a grid (`quantization/grid_fields.py`) inside kernels; of Gluon `grid_gluon.py`.

A thread has runs of 32 columns. Points are fetched from a table that stays in the L1 cache (0.5 to 26 KB), and signs
are applied to the four bytes or eight nibbles of a register at once. What comes out are codes as those of `packed.py`:
put into a float's mantissa and scaled. Six operations a weight of IQ2 and five of IQ1, of which the product is one.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

from typing import Any  # noqa: F401 (the type comments of kernels)

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.packed import mantissa_place, packed_field, packed_mantissa
from aphrodite.quantization.planes import Planes

_IN_BYTES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
_KINDS = (*_IN_BYTES, "iq3_s", "iq1_s", "iq1_m", "tq1_0")


@triton.constexpr_function
def is_grid(KIND):
    return KIND in _KINDS


@triton.constexpr_function
def in_bytes(KIND):
    """Whether a code is a byte, four to a register, and not a nibble, eight to a register."""
    return KIND in _IN_BYTES


@triton.constexpr_function
def is_shifted(KIND):
    """Whether coordinates are shifted by an eighth, up or down."""
    return KIND in ("iq1_s", "iq1_m")


@triton.constexpr_function
def ends_shift(word, KIND):
    """Whether a word of a run is the last one of those that share a shift."""
    return KIND == "iq1_m" or (KIND == "iq1_s" and word == 3)


@triton.constexpr_function
def scale_words(KIND):
    """Words of a run that share a scale."""
    return 2 if KIND in ("iq2_xs", "iq2_s", "iq1_m") else 4


@triton.constexpr_function
def grid_scale(KIND):
    """What times a number of `grid_code` is itself and the code."""
    return 128 if KIND in _IN_BYTES else 16


@triton.constexpr_function
def grid_raise(index, KIND, EXACT):
    """What times a number of `grid_mantissa` for field `index` is itself and the code."""
    return grid_scale(KIND) if EXACT else 128 if KIND in _IN_BYTES else 1 << (23 - mantissa_place(index, 4, 0))


@triton.constexpr_function
def grid_zero(KIND):
    """The code of zero."""
    return 64 if KIND in _IN_BYTES else 7.5 if KIND == "iq3_s" else 8


@triton.constexpr_function
def _unit(KIND):
    """What a code of 1 is, beside d and the odd number 2 s + 1."""
    return {"iq2_xxs": 0.125, "iq2_xs": 0.125, "iq2_s": 0.125, "iq3_s": 2.0}.get(KIND, 0.25)


@triton.jit
def _of_runs(plane, rows, column, columns: tl.constexpr, SIZE: tl.constexpr, RUNS: tl.constexpr):
    """Of a plane with a number for `SIZE` columns that of each run; zeros behind the last column."""
    at = plane + rows * (columns // SIZE) + column // SIZE
    if columns % (RUNS * 32) == 0:
        return tl.load(at)
    return tl.load(at, mask=column < columns, other=0)


@triton.jit
def load_runs(
    low, high, scales, super_scales, rows, column, columns: tl.constexpr, KIND: tl.constexpr, RUNS: tl.constexpr
):
    """All of the runs that begin at `column`, `RUNS` of a row: `[RUNS]` and a row's number, or `[1, RUNS]` and numbers
    `[ROWS, 1]`. Of single rows a thread has the same runs of each; how it shares out rows, Triton's versions differ.

    Returns:
        Tensors of a number for each run: points' numbers, what lies beside them, scales (of TQ1_0 top bits, in their
        places), and the factor of the super-block times the kind's unit, zero behind the last column.
    """
    numbers = _of_runs(low, rows, column, columns, 32, RUNS)
    beside = numbers
    if KIND != "iq2_xxs" and KIND != "iq2_xs":
        beside = _of_runs(high, rows, column, columns, 32, RUNS).to(tl.int32)
    scale = beside
    if KIND == "tq1_0":
        scale = (_of_runs(scales, rows, column, columns, 256, RUNS) >> (column // 8 % 32)) & 15
    elif KIND == "iq2_xs" or KIND == "iq2_s" or KIND == "iq3_s" or KIND == "iq1_m":
        scale = _of_runs(scales, rows, column, columns, 32, RUNS).to(tl.int32)
    factor = _of_runs(super_scales, rows, column, columns, 256, RUNS).to(tl.float32) * _unit(KIND)
    return numbers, beside, scale, factor


@triton.jit
def run_factor(runs, part: tl.constexpr, KIND: tl.constexpr):
    """What times code - zero is a weight, float32, of part `part` of the runs, `scale_words` words."""
    if KIND == "tq1_0":
        return runs[3]
    if KIND == "iq2_xxs":
        scale = (runs[0] >> 60).to(tl.int32) & 15
    elif KIND == "iq3_xxs":
        scale = (runs[1] >> 28) & 15
    elif KIND == "iq3_s":
        scale = (runs[2] >> 8) & 15
    elif KIND == "iq1_s":
        scale = (runs[1] >> 12) & 7
    else:
        scale = (runs[2] >> (4 * part)) & 15
    return runs[3] * (2 * scale + 1).to(tl.float32)


@triton.jit
def run_shift(runs, word: tl.constexpr, KIND: tl.constexpr):
    """What is subtracted from code - zero in a word of IQ1: an eighth of a coordinate, or minus that; float32."""
    place: tl.constexpr = 15 if KIND == "iq1_s" else 4 * word + 3
    return tl.where((runs[1] & (1 << place)) != 0, 0.5, -0.5)


@triton.jit
def _signed_bytes(codes, signs):
    """64 + a coordinate below 128 in each byte, or 64 - it where `signs` has bit 0, 2, 4, 6; other bits of `signs` are
    zero, the bytes' top ones are kept."""
    ones = (signs * 0x41041) & 0x01010101
    return (codes ^ (ones * 127)) + ones


@triton.jit
def _signed_nibbles(codes, signs):
    """7.5 + half a coordinate in each nibble, or 7.5 - it where the nibble's bit of `signs` is set."""
    ones = ((signs & 0x55) * 0x41041) & 0x01010101
    ones |= ((signs & 0xAA) * (0x41041 << 3)) & 0x10101010
    return codes ^ (ones * 15)


@triton.jit
def _half(numbers, which: tl.constexpr):
    """int32 of int64."""
    return (numbers >> 32 if which > 0 else numbers).to(tl.int32)


@triton.jit
def _eight_points(runs, table, word: tl.constexpr, KIND: tl.constexpr):
    """Of IQ2, whose points have eight coordinates: codes of columns 0 to 3, of 4 to 7, and both their signs."""
    if KIND == "iq2_xs":
        half = _half(runs[0], word // 2)
        point = (half >> (word % 2 * 16)) & 511
        parities = (half >> (word % 2 * 16 + 9)) & 127
    else:
        point = (_half(runs[0], 0) >> (8 * word)) & 255
        parities = _half(runs[0], 1) >> (7 * word)
    if KIND == "iq2_s":
        point |= ((runs[1] >> (2 * word)) & 3) << 8
        signs = _half(runs[0], 1) >> (8 * word)
        even = signs & 0x55
        odd = (signs >> 1) & 0x55
    else:
        even = ((parities & 127) ^ (parities << 1)) & 0x55
        odd = ((parities & 127) ^ ((parities & 127) >> 1)) & 0x55
    both = tl.load(table + point)
    return _half(both, 0), _half(both, 1), even, odd


@triton.jit
def grid_codes(runs, table, word: tl.constexpr, KIND: tl.constexpr):
    """The codes of word `word` of each run, as a tuple: two registers of four bytes, or one of eight nibbles."""
    if in_bytes(KIND):
        if KIND == "iq3_xxs":
            points = _half(runs[0], word // 2) >> (word % 2 * 16)
            first = tl.load(table + (points & 255))
            second = tl.load(table + ((points >> 8) & 255))
            parities = (runs[1] >> (7 * word)) & 127
            even = (parities ^ (parities << 1)) & 0x55
            odd = (parities ^ (parities >> 1)) & 0x55
        else:
            first, second, even, odd = _eight_points(runs, table, word, KIND)
        codes = (_signed_bytes(first, even), _signed_bytes(second, odd))  # type: Any
    elif KIND == "iq3_s":
        points = _half(runs[0], word // 2) >> (word % 2 * 16)
        upper = runs[2] >> (2 * word)
        first = tl.load(table + ((points & 255) | ((upper & 1) << 8))).to(tl.int32)
        second = tl.load(table + (((points >> 8) & 255) | ((upper & 2) << 7))).to(tl.int32)
        codes = (_signed_nibbles((first & 0xFFFF) | (second << 16), runs[1] >> (8 * word)),)
    else:
        point = (runs[0] >> (8 * word)) & 255
        if KIND == "tq1_0":
            point |= (((runs[1] >> (4 * word)) & 15) << 8) | (((runs[2] >> word) & 1) << 12)
        else:
            point |= ((runs[1] >> ((3 if KIND == "iq1_s" else 4) * word)) & 7) << 8
        codes = (tl.load(table + point),)
    return codes


@triton.jit
def grid_code(codes, index: tl.constexpr, KIND: tl.constexpr):
    """Code `index` of each word at a mantissa's top: 1 + code / `grid_scale`."""
    if in_bytes(KIND):
        # The top bit of a byte is the lowest of the exponent.
        place: tl.constexpr = index % 4 * 8
        word = codes[index // 4]
        moved = word << (16 - place) if place < 16 else word >> (place - 16)
        bits = (moved & 0x00FF0000) | 0x3F000000
    else:
        bits = packed_field(codes[0], index, 4, 19) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def grid_mantissa(
    codes, one, index: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Code `index` of each word in a float's mantissa, in fewer instructions: 1 + code / `grid_raise`.

    Args:
        one: the bits of 1.0 in a register, for an instruction takes one constant.
        EXACT: keep all of a float32's bits for what the code is multiplied by.
        PTX: put a byte below an exponent by one instruction, which NVIDIA's cards have.
    """
    if in_bytes(KIND) and PTX:
        SELECT: tl.constexpr = "prmt.b32 $0, $1, $2, " + ["0x7044", "0x7144", "0x7244", "0x7344"][index % 4] + ";"
        bits = tl.inline_asm_elementwise(
            SELECT, "=r,r,r", [codes[index // 4], one - 0x00800000], dtype=tl.int32, is_pure=True, pack=1
        )
        value = bits.to(tl.float32, bitcast=True)
    elif in_bytes(KIND) or EXACT:
        value = grid_code(codes, index, KIND)
    else:
        value = packed_mantissa(codes[0], codes[0], one, index, 4, 0)
    return value


@triton.jit
def grid_tile(
    low, high, scales, super_scales, table, rows, first,
    columns: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Weights of `RUNS` runs from `first`, columns in their order: `[ROWS, RUNS * 32]` float32, exact."""
    column = ((first + tl.arange(0, RUNS)) * 32)[None, :]
    runs = load_runs(low, high, scales, super_scales, rows[:, None], column, columns, KIND, RUNS)
    weights = ()  # type: Any
    for word in tl.static_range(4):
        codes = grid_codes(runs, table, word, KIND)
        factor = run_factor(runs, word // scale_words(KIND), KIND)
        below = factor * (grid_scale(KIND) + grid_zero(KIND))
        if is_shifted(KIND):
            below += factor * run_shift(runs, word, KIND)
        factor *= grid_scale(KIND)
        for index in tl.static_range(8):
            weights = weights + (grid_code(codes, index, KIND) * factor - below,)
    return tl.reshape(_in_order(weights), (ROWS, RUNS * 32))


@triton.jit
def sum_rows(rows, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """The sums `[ROWS]` of a tuple of `[RUNS]`, one, two, four or eight of them."""
    if ROWS == 1:
        together = tl.reshape(rows[0], (RUNS, 1))
    elif ROWS == 2:
        together = tl.join(rows[0], rows[1])
    elif ROWS == 4:
        together = tl.reshape(tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3])), (RUNS, 4))
    else:
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        odd = tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7]))
        together = tl.reshape(tl.join(even, odd), (RUNS, 8))
    return tl.sum(together, axis=0)


@triton.jit
def _in_order(parts):
    """32 tensors `[ROWS, RUNS]` as the last five dimensions of one, whose order is theirs. Threads keep what they
    have."""
    for level in tl.static_range(5):
        joined = ()  # type: Any
        for index in tl.static_range(16 >> level):
            joined = joined + (tl.join(parts[index], parts[index + (16 >> level)]),)
        parts = joined
    return parts[0]


@triton.jit
def load_run_values(base, first, columns: tl.constexpr, RUNS: tl.constexpr):
    """Of a row of activations what the runs from `first` are multiplied by: float32 `[RUNS]` for each of 32 columns, as
    a tuple."""
    values = ()  # type: Any
    for word in tl.static_range(4):
        column = ((first + tl.arange(0, RUNS)) * 32 + 8 * word)[:, None] + tl.arange(0, 8)[None, :]
        if columns % (RUNS * 32) == 0:
            eight = tl.load(base + column)
        else:
            eight = tl.load(base + column, mask=column < columns, other=0.0)
        even, odd = tl.split(tl.reshape(eight.to(tl.float32), (RUNS, 2, 2, 2)))
        first_even, second_even = tl.split(even)
        first_odd, second_odd = tl.split(odd)
        v0, v4 = tl.split(first_even)
        v2, v6 = tl.split(second_even)
        v1, v5 = tl.split(first_odd)
        v3, v7 = tl.split(second_odd)
        values = values + (v0, v1, v2, v3, v4, v5, v6, v7)
    return values


def grid_arguments(weight: Planes) -> tuple[torch.Tensor, ...]:
    """The kernels' pointers: low, high, scales, super_scales, table; of planes that are not there, to anything."""
    low = weight.low
    planes = (low, weight.high, weight.scales, weight.super_scales, weight.table)
    return tuple(low if tensor is None else tensor for tensor in planes)


def understands_ptx(device: torch.device) -> bool:
    """Whether kernels on `device` may have instructions of NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None
