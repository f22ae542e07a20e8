"""Reading weights in planes of bits (`quantization/planes.py`) inside kernels: the parts that products share.

A code is put into the mantissa of a float between 1 and 2, for half a rotation and one logical operation, without a
conversion: 1 + code * 2^(place - 23). What stands for a number of a table, or is a float8, becomes that number.
Scales and zeros are a factor and a shift of each run of columns.

The words' order of columns makes every load of activations a vector of four.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from aphrodite.quantization.planes import Planes, field_position

BITS_OF_ONE = 0x3F800000  # an argument of kernels: an instruction takes one constant and two registers


_position = triton.constexpr_function(field_position)


@triton.constexpr_function
def mantissa_place(index, LOW_BITS, HIGH_BITS):
    """Where a mantissa holds field `index`: at its top, and every other one four bits below, so that one rotation of a
    word brings two fields to their places."""
    return 23 - LOW_BITS - HIGH_BITS - (4 if LOW_BITS < 8 and index % 2 else 0)


@triton.jit
def packed_field(word, index: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr):
    """Field `index` of `BITS` bits, moved to bit `PLACE`; other bits are zero."""
    shift: tl.constexpr = PLACE - _position(index, BITS)
    if shift >= 0:
        moved = word << shift
    else:
        moved = word >> -shift
    return moved & (((1 << BITS) - 1) << PLACE)


@triton.jit
def packed_code(
    low, high, table, index: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, KIND: tl.constexpr
):
    """Code `index` of each word as float32: 1 + code / 2^bits of integers, else what it stands for."""
    if KIND == "integer":
        bits = packed_field(low, index, LOW_BITS, 23 - LOW_BITS - HIGH_BITS) | 0x3F800000
        if HIGH_BITS > 0:
            bits |= packed_field(high, index, HIGH_BITS, 23 - HIGH_BITS)
        value = bits.to(tl.float32, bitcast=True)
    elif KIND == "table":
        value = tl.load(table + packed_field(low, index, LOW_BITS, 0))
    else:
        # A float8 in the place of a float32's exponent and mantissa; its bias is smaller.
        place: tl.constexpr = 20 if KIND == "e4m3" else 21
        factor: tl.constexpr = 2.0**120 if KIND == "e4m3" else 2.0**112
        byte = packed_field(low, index, 8, 0)
        bits = ((byte & 127) << place) | ((byte & 128) << 24)
        value = bits.to(tl.float32, bitcast=True) * factor
    return value


@triton.jit
def load_plane(plane, rows, first, words: tl.constexpr, COUNT: tl.constexpr):
    """`[rows, COUNT]` words from `first`, zeros behind the last; int32."""
    column = first + tl.arange(0, COUNT)
    # A run a thread, whatever a word's size is: with longer vectors the planes' threads would hold different columns.
    at = tl.max_contiguous(rows[:, None] * words + column[None, :], (1, 4))
    if words % COUNT == 0:
        return tl.load(plane + at, eviction_policy="evict_first").to(tl.int32)
    return tl.load(plane + at, mask=(column < words)[None, :], other=0, eviction_policy="evict_first").to(tl.int32)


@triton.jit
def _load_scales(field, super_field, rows, groups, blocks, inside, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """`[rows, runs]` float32: of the groups `groups` `[runs]`, times those of their super-blocks if there are any."""
    scale = tl.load(field + rows[:, None] * GROUPS + groups[None, :], mask=inside[None, :], other=0).to(tl.float32)
    if BLOCKS > 0:
        above = super_field + rows[:, None] * BLOCKS + blocks[None, :]
        scale *= tl.load(above, mask=inside[None, :], other=0.0).to(tl.float32)
    return scale


@triton.jit
def load_affine(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    PLAIN: tl.constexpr = False,
):
    """(factor, shift) `[rows, RUNS]` of span `span` of each run: a weight is factor * code - shift, for what
    `packed_code` gives or, with PLAIN, for the number that it is. Both are zero behind the last column."""
    run = first_run + tl.arange(0, RUNS)
    column = run * RUN + span * SPAN
    inside = column < columns
    group = column // GROUP
    groups: tl.constexpr = columns // GROUP
    blocks: tl.constexpr = columns // SUPER if SUPER > 0 else 0
    block = column // SUPER if SUPER > 0 else column
    if OFFSET == "paired":
        pair = tl.load(scales + rows[:, None] * groups + group[None, :], mask=inside[None, :], other=0).to(tl.int32)
        above = rows[:, None] * blocks + block[None, :]
        scale = (pair & 15).to(tl.float32) * tl.load(super_scales + above, mask=inside[None, :], other=0.0).to(
            tl.float32
        )
        below = tl.load(super_offsets + above, mask=inside[None, :], other=0.0).to(tl.float32)
        shift = ((pair >> 4) & 15).to(tl.float32) * below
    else:
        scale = _load_scales(scales, super_scales, rows, group, block, inside, groups, blocks)
        if OFFSET == "zeros":
            zero = tl.load(offsets + rows[:, None] * groups + group[None, :], mask=inside[None, :], other=0)
            shift = scale * (zero.to(tl.float32) + ZERO)
        elif OFFSET == "offsets":
            shift = _load_scales(offsets, super_offsets, rows, group, block, inside, groups, blocks) + scale * ZERO
        else:
            shift = scale * ZERO
    if KIND == "integer" and not PLAIN:
        scale = scale * (1 << BITS)
        shift = shift + scale
    return scale, shift


@triton.jit
def load_values(base, first, index: tl.constexpr, columns: tl.constexpr, RUN: tl.constexpr, COUNT: tl.constexpr):
    """Of a row of activations what field `index` of the words from `first` is multiplied by: float32 `[COUNT]`."""
    word = first + tl.arange(0, COUNT)
    column = (word // 4) * RUN + word % 4 + 4 * index
    if columns % (COUNT // 4 * RUN) == 0:
        return tl.load(base + column).to(tl.float32)
    return tl.load(base + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def packed_mantissa(low, high, one, index: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """Code `index` of each word in a float's mantissa: 1 + code * 2^(place - 23)."""
    PLACE: tl.constexpr = mantissa_place(index, LOW_BITS, HIGH_BITS)
    TURN: tl.constexpr = (PLACE - _position(index, LOW_BITS) + 32) % 32
    words = low.to(tl.uint32, bitcast=True)
    if TURN != 0:
        words = (words << TURN) | (words >> (32 - TURN))
    # `one` is an argument, for an instruction takes one constant and two registers; its bits are flipped into the upper
    # ones, for from a chain of "or" the compiler makes another one that is longer.
    rest = one
    if HIGH_BITS > 0:
        rest = one ^ packed_field(high, index, HIGH_BITS, PLACE + LOW_BITS)
    bits = (words & (((1 << LOW_BITS) - 1) << PLACE)) | rest.to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def spread_runs(of_runs, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """A number of each run `[ROWS, RUNS]` for each of its words: `[ROWS, 4 * RUNS]`."""
    return tl.reshape(tl.broadcast_to(of_runs[:, :, None], (ROWS, RUNS, 4)), (ROWS, RUNS * 4))


@triton.jit
def in_column_order(fields, ROWS: tl.constexpr, RUNS: tl.constexpr, IN_WORD: tl.constexpr):
    """The columns of decoded words in their order, `[ROWS, RUNS * run]`: field i of word v of a run is column 4 i + v.
    Threads keep what they have."""
    half: tl.constexpr = IN_WORD // 2
    if IN_WORD == 8:
        first = tl.join(tl.join(fields[0], fields[4]), tl.join(fields[2], fields[6]))
        second = tl.join(tl.join(fields[1], fields[5]), tl.join(fields[3], fields[7]))
    else:
        first = tl.join(fields[0], fields[half])
        second = tl.join(fields[1], fields[half + 1])
    by_word = tl.reshape(tl.join(first, second), (ROWS, RUNS, 4, IN_WORD))
    return tl.reshape(tl.permute(by_word, (0, 1, 3, 2)), (ROWS, RUNS * 4 * IN_WORD))


def plane_arguments(weight: Planes) -> tuple[torch.Tensor, ...]:
    """The kernels' pointers; of planes that are not there, to anything."""
    low = weight.low
    return tuple(
        low if tensor is None else tensor
        for tensor in (
            low, weight.high, weight.scales, weight.super_scales, weight.offsets, weight.super_offsets, weight.table
        )
    )  # fmt: skip


def form_arguments(weight: Planes) -> dict[str, Any]:
    form = weight.form
    return {
        "columns": form.columns,
        "LOW_BITS": form.low_bits,
        "HIGH_BITS": form.high_bits,
        "GROUP": form.group_size,
        "SUPER": form.super_size,
        "OFFSET": form.offset,
        "ZERO": form.zero,
        "KIND": form.kind,
    }
