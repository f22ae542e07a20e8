"""Products with a weight in planes of bits (`quantization/planes.py`): act(norm(x) W^T + b) + residual.

All three kernels read a weight's planes once: 4.5 bits a value of Q4_K, 4.2 of 4 bits in groups of 128.

GEMV, 1 or 2 rows, on the vector units. A code is put into the mantissa of a float between 1 and 2, for half a rotation
and one logical operation, without a conversion; what the 1 and the zero add is taken back once a group, with sums of
the group's activations. That is 2.5 operations a weight of 4 bits and 1 a weight beside, where the card has 6 at its
full bandwidth. A block keeps its activations, normalised, in registers, and walks over
tiles of a few rows; the next tile is on its way while one is multiplied. RMSNorm is applied as in `linear.py`.

Skinny GEMM, up to 64 rows: a tile is decoded and multiplied by the matrix units, with activations of bfloat16 as tf32:
to round weights to bfloat16, too, would cost as much as rounding the result does (1.6e-3 of it).

Expansion to a dense matrix for more rows, which the vendor's library multiplies: `out * in` values of 2 bytes are
written and read again.

The words' order of columns makes every load of activations a vector of four.
"""

# ruff: noqa: RUF005  (Triton's tuples know no unpacking)
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import gated
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)
from aphrodite.kernels.triton.linear import Epilogue, _sum_of_splits, _workspace
from aphrodite.platforms import platform_of
from aphrodite.quantization.planes import RUN_WORDS, Planes, field_position

PACKED_GEMV_MAX_ROWS = 2
PACKED_SKINNY_MAX_ROWS = 64
_BITS_OF_ONE = 0x3F800000


class PackedGemvCut(NamedTuple):
    """How a GEMV is cut: weight rows a tile, columns a chunk, warps, blocks for each multiprocessor."""

    rows: int
    chunk: int
    warps: int
    blocks: int


class PackedSkinnyCut(NamedTuple):
    """How a skinny GEMM is cut: tile of the weight (rows, columns), splits of `in`, pipeline stages, warps."""

    rows: int
    chunk: int
    splits: int
    stages: int
    warps: int


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
def packed_skinny_cut(out_features: int, in_features: int, rows: int, hip: bool = False) -> PackedSkinnyCut:
    """The cut for a weight `[out, in]` and up to 64 activation rows; on AMD's processors for 64 KiB.

    Tiles of 64 rows and 128 columns are what Hopper's matrix units take from registers.
    """
    splits = max(1, min(512 // ceil_div(out_features, 64), in_features // 512))
    return PackedSkinnyCut(64, 128, splits, 2 if hip or rows > 16 else 3, 4)


_position = triton.constexpr_function(field_position)


@triton.constexpr_function
def _place(index, LOW_BITS, HIGH_BITS):
    """Where a mantissa holds field `index`: at its top, and every other one four bits below, so that one rotation of a
    word brings two fields to their places."""
    return 23 - LOW_BITS - HIGH_BITS - (4 if LOW_BITS < 8 and index % 2 else 0)


@triton.jit
def _field(word, index: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr):
    """Field `index` of `BITS` bits, moved to bit `PLACE`; other bits are zero."""
    shift: tl.constexpr = PLACE - _position(index, BITS)
    if shift >= 0:
        moved = word << shift
    else:
        moved = word >> -shift
    return moved & (((1 << BITS) - 1) << PLACE)


@triton.jit
def _code(low, high, table, index: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, KIND: tl.constexpr):
    """Code `index` of each word as float32: 1 + code / 2^bits of integers, else what it stands for."""
    if KIND == "integer":
        bits = _field(low, index, LOW_BITS, 23 - LOW_BITS - HIGH_BITS) | 0x3F800000
        if HIGH_BITS > 0:
            bits |= _field(high, index, HIGH_BITS, 23 - HIGH_BITS)
        value = bits.to(tl.float32, bitcast=True)
    elif KIND == "table":
        value = tl.load(table + _field(low, index, LOW_BITS, 0))
    else:
        # A float8 in the place of a float32's exponent and mantissa; its bias is smaller.
        place: tl.constexpr = 20 if KIND == "e4m3" else 21
        factor: tl.constexpr = 2.0**120 if KIND == "e4m3" else 2.0**112
        byte = _field(low, index, 8, 0)
        bits = ((byte & 127) << place) | ((byte & 128) << 24)
        value = bits.to(tl.float32, bitcast=True) * factor
    return value


@triton.jit
def _load_plane(plane, rows, first, words: tl.constexpr, COUNT: tl.constexpr):
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
def _load_affine(
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
    """(factor, shift) `[rows, RUNS]` of span `span` of each run: a weight is factor * code - shift, for `_code`'s code
    or, with PLAIN, for the number that it is. Both are zero behind the last column."""
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
def _load_values(base, first, index: tl.constexpr, columns: tl.constexpr, RUN: tl.constexpr, COUNT: tl.constexpr):
    """Of a row of activations what field `index` of the words from `first` is multiplied by: float32 `[COUNT]`."""
    word = first + tl.arange(0, COUNT)
    column = (word // 4) * RUN + word % 4 + 4 * index
    if columns % (COUNT // 4 * RUN) == 0:
        return tl.load(base + column).to(tl.float32)
    return tl.load(base + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _store_gemv(
    total,
    bias,
    residual,
    out,
    row,
    out_stride,
    out_features,
    first,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of one activation row's `total` `[ROWS]`, and the store."""
    index = first + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)
    if ACTIVATION is None:
        width = out_features
        result = total
    else:
        width = out_features // 2
        index = first // 2 + tl.arange(0, ROWS // 2)
        gate, up = tl.split(tl.reshape(total, (ROWS // 2, 2)))
        result = gated(gate, up, ACTIVATION)
    inside = index < width
    at = row * out_stride + index
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


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
        tile = tile + (_load_plane(low, rows, chunk * CHUNK // IN_WORD, words, CHUNK // IN_WORD),)
        if HIGH_BITS > 0:
            tile = tile + (_load_plane(high, rows, chunk * CHUNK // IN_WORD, words, CHUNK // IN_WORD),)
        for span in tl.static_range(SPANS):
            tile = tile + _load_affine(
                scales, super_scales, offsets, super_offsets, rows, chunk * CHUNK // RUN, span, columns, RUN,
                RUN // SPANS, CHUNK // RUN, LOW_BITS + HIGH_BITS, GROUP, SUPER, OFFSET, ZERO, KIND, PLAIN=True,
            )  # fmt: skip
    return tile


@triton.jit
def _mantissa(low, high, one, index: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """Code `index` of each word in a float's mantissa: 1 + code * 2^(place - 23)."""
    PLACE: tl.constexpr = _place(index, LOW_BITS, HIGH_BITS)
    TURN: tl.constexpr = (PLACE - _position(index, LOW_BITS) + 32) % 32
    words = low.to(tl.uint32, bitcast=True)
    if TURN != 0:
        words = (words << TURN) | (words >> (32 - TURN))
    # `one` is an argument, for an instruction takes one constant and two registers; its bits are flipped into the upper
    # ones, for from a chain of "or" the compiler makes another one that is longer.
    rest = one
    if HIGH_BITS > 0:
        rest = one ^ _field(high, index, HIGH_BITS, PLACE + LOW_BITS)
    bits = (words & (((1 << LOW_BITS) - 1) << PLACE)) | rest.to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


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
                _load_values(norm_weight, field // IN_WORD * COUNT, field % IN_WORD, columns, RUN, COUNT),
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
                    prepared = _load_values(x + m * x_stride, chunk * COUNT, index, columns, RUN, COUNT)
                    if HAS_NORM:
                        squares += prepared * prepared
                        prepared = prepared * factors[chunk * IN_WORD + index]
                    summed += prepared
                    if KIND == "integer":
                        prepared = prepared * (1 << (23 - _place(index, LOW_BITS, HIGH_BITS)))
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
                    code = _mantissa(
                        current[part // SPANS * ENTRY],
                        current[part // SPANS * ENTRY + PLANES - 1],
                        one,
                        part % SPANS * (IN_WORD // SPANS) + within,
                        LOW_BITS,
                        HIGH_BITS,
                    )
                else:
                    code = _code(
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
            _store_gemv(
                total, bias, residual, out, m, out_stride, out_features, first_of_tile, ROWS, ACTIVATION, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip


@triton.jit
def _spread(of_runs, ROWS: tl.constexpr, RUNS: tl.constexpr):
    """A number of each run `[ROWS, RUNS]` for each of its words: `[ROWS, 4 * RUNS]`."""
    return tl.reshape(tl.broadcast_to(of_runs[:, :, None], (ROWS, RUNS, 4)), (ROWS, RUNS * 4))


@triton.jit
def _in_order(fields, ROWS: tl.constexpr, RUNS: tl.constexpr, IN_WORD: tl.constexpr):
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


@triton.jit
def _store_skinny(
    total,
    bias,
    residual,
    out,
    out_stride,
    M,
    out_features,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation and residual of `total` `[ROWS, COLUMNS]` (weight rows x activation rows), and the store."""
    index = first + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + index, mask=index < out_features, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is None:
        width = out_features
        result = total
    else:
        width = out_features // 2
        index = first // 2 + tl.arange(0, ROWS // 2)
        pairs = tl.permute(tl.reshape(total, (ROWS // 2, 2, COLUMNS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        result = gated(gate, up, ACTIVATION)
    token = tl.arange(0, COLUMNS)
    inside = (index < width)[:, None] & (token < M)[None, :]
    at = token[None, :] * out_stride + index[:, None]
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


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
    IN_WORD: tl.constexpr = 4 if LOW_BITS == 8 else 8
    RUN: tl.constexpr = 4 * IN_WORD
    SPANS: tl.constexpr = 2 if GROUP < RUN else 1
    SPAN: tl.constexpr = RUN // SPANS
    BITS: tl.constexpr = LOW_BITS + HIGH_BITS
    words: tl.constexpr = columns // IN_WORD
    COUNT: tl.constexpr = CHUNK // IN_WORD
    RUNS: tl.constexpr = CHUNK // RUN
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
        low_words = _load_plane(low, rows, step * COUNT, words, COUNT)
        high_words = low_words
        if HIGH_BITS > 0:
            high_words = _load_plane(high, rows, step * COUNT, words, COUNT)
        fields = ()  # type: Any
        for span in tl.static_range(SPANS):
            factor, shift = _load_affine(
                scales, super_scales, offsets, super_offsets, rows, step * RUNS, span, columns, RUN, SPAN, RUNS, BITS,
                GROUP, SUPER, OFFSET, ZERO, KIND, PLAIN=True,
            )  # fmt: skip
            # Of codes in a mantissa, by their place: those of even and of odd fields.
            affine = ()  # type: Any
            for parity in tl.static_range(2):
                raised = factor * (1 << (23 - _place(parity, LOW_BITS, HIGH_BITS))) if KIND == "integer" else factor
                offset = shift + raised if KIND == "integer" else shift
                affine = affine + (_spread(raised, ROWS, RUNS), _spread(offset, ROWS, RUNS))
            for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
                if KIND == "integer":
                    code = _mantissa(low_words, high_words, one, index, LOW_BITS, HIGH_BITS)
                else:
                    code = _code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
                fields = fields + ((code * affine[index % 2 * 2] - affine[index % 2 * 2 + 1]).to(TYPE),)
        weight = _in_order(fields, ROWS, RUNS, IN_WORD)
        column = step * CHUNK + tl.arange(0, CHUNK)
        pointers = x + tokens[None, :] * x_stride + column[:, None]
        if columns % CHUNK == 0:
            values = tl.load(pointers)
        else:
            values = tl.load(pointers, mask=(column < columns)[:, None], other=0.0)
        total = tl.dot(weight, values.to(TYPE), total, input_precision="tf32")
    if SPLITS == 1:
        _store_skinny(
            total, bias, residual, out, out_stride, M, out_features, first, ROWS, COLUMNS, ACTIVATION, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip
    else:
        last, total = _sum_of_splits(total, workspace, counters, ROWS, COLUMNS, SPLITS)
        if last:
            _store_skinny(
                total, bias, residual, out, out_stride, M, out_features, first, ROWS, COLUMNS, ACTIVATION, HAS_BIAS,
                HAS_RESIDUAL,
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
    low_words = _load_plane(low, rows, step * COUNT, words, COUNT)
    high_words = low_words
    if HIGH_BITS > 0:
        high_words = _load_plane(high, rows, step * COUNT, words, COUNT)
    if not HAS_NUMBERS:
        # The result's memory may still be read by an earlier kernel's product.
        wait_for_producer(PDL)
    fields = ()  # type: Any
    for span in tl.static_range(SPANS):
        factor, shift = _load_affine(
            scales, super_scales, offsets, super_offsets, rows, step * RUNS, span, columns, RUN, SPAN, RUNS, BITS,
            GROUP, SUPER, OFFSET, ZERO, KIND,
        )  # fmt: skip
        factor = _spread(factor, ROWS, RUNS)
        shift = _spread(shift, ROWS, RUNS)
        for index in tl.static_range(span * (IN_WORD // SPANS), (span + 1) * (IN_WORD // SPANS)):
            code = _code(low_words, high_words, table, index, LOW_BITS, HIGH_BITS, KIND)
            fields = fields + ((code * factor - shift).to(out.dtype.element_ty),)
    weight = _in_order(fields, ROWS, RUNS, IN_WORD)
    column = step * CHUNK + tl.arange(0, CHUNK)
    inside = (first_row + row < end_row)[:, None] & (column < columns)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], weight, mask=inside)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return platform_of(device).multiprocessors if device.type == "cuda" else 1


def _plane_arguments(weight: Planes) -> tuple[torch.Tensor, ...]:
    """The kernels' pointers; of planes that are not there, to anything."""
    low = weight.low
    return tuple(
        low if tensor is None else tensor
        for tensor in (
            low, weight.high, weight.scales, weight.super_scales, weight.offsets, weight.super_offsets, weight.table
        )
    )  # fmt: skip


def _form_arguments(weight: Planes) -> dict[str, Any]:
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
    cut = cut or packed_gemv_cut(form.columns, x.shape[0], form.low_bits + form.high_bits)
    tiles = ceil_div(weight.rows, cut.rows)
    passes = ceil_div(tiles, cut.blocks * _multiprocessors(x.device))
    norm_weight, eps = norm if norm is not None else (x, 0.0)
    pdl = pdl_supported(x.device)
    _packed_gemv_kernel[(ceil_div(tiles, passes),)](
        x,
        x.stride(0),
        norm_weight,
        eps,
        *_plane_arguments(weight),
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        weight.rows,
        passes,
        _BITS_OF_ONE,
        **_form_arguments(weight),
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


def packed_skinny(
    x: torch.Tensor,
    weight: Planes,
    out: torch.Tensor,
    epilogue: Epilogue = Epilogue(),
    cut: PackedSkinnyCut | None = None,
) -> None:
    """Writes act(x W^T + b) + residual for up to 64 rows of a 16-bit type; arguments as `packed_gemv`'s."""
    cut = cut or packed_skinny_cut(weight.rows, weight.form.columns, x.shape[0], torch.version.hip is not None)
    workspace, counters = _workspace(x.device) if cut.splits > 1 else (x, x)
    pdl = pdl_supported(x.device)
    _packed_skinny_kernel[(ceil_div(weight.rows, cut.rows), cut.splits)](
        x,
        x.stride(0),
        *_plane_arguments(weight),
        x if epilogue.bias is None else epilogue.bias,
        out,
        out,
        out.stride(0),
        workspace,
        counters,
        x.shape[0],
        weight.rows,
        _BITS_OF_ONE,
        **_form_arguments(weight),
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
        *_plane_arguments(weight),
        out if numbers is None else numbers,
        out,
        first,
        first + rows,
        **_form_arguments(weight),
        ROWS=4,
        CHUNK=chunk,
        HAS_NUMBERS=numbers is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
