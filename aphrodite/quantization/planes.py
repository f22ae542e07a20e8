"""Packed weights as planes of bits, the one form that the general GPU kernels read.

A row's codes lie in words, each of which holds eight columns (of 8-bit codes four); bits beyond the fourth of a code
lie in a second plane. Four words are a run: field i of word v of a run is column 4 i + v of the run, so that a thread
that loads a run loads its activations in vectors of four. Fields of 4 and 8 bits lie in their order; those of 1 and 2
bits so that an even one is four bits above the odd one that follows it (`field_position`), for a kernel that shifts a
word moves two fields at once to where it wants them. Scales are one for a group of
columns, and of the K-quants an integer times that of a super-block.

GGUF's codebook types (IQ1, IQ2, IQ3) and TQ1_0 name eight consecutive columns by the number of a point of a grid. Their
planes have a number for each run of 32 columns: `grid_fields.py`.

The planes of a layout have the same bits in another order; only scales of 3 to 6 bits become bytes: Q4_K takes 1.03
times its file's memory, Q3_K, IQ3_S and IQ1_M 1.04, Q5_K, Q6_K and IQ4_XS at most 1.02, MXFP4 1.06, all others what the
layout takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from aphrodite.kernels.dispatch import Declined
from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS, GridKind, grid_table
from aphrodite.quantization.layouts import (
    CodebookGroups,
    GgufBlocks,
    Int4Groups,
    Int8Groups,
    NarrowGroups,
    PackedLayout,
    unpack_bits,
)

RUN_WORDS = 4
_PIECE_VALUES = 4 * 1024 * 1024  # repacked at a time, which bounds what lies beside the result
_FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_Grouped: TypeAlias = Int4Groups | Int8Groups | NarrowGroups | CodebookGroups
CodeKind: TypeAlias = Literal["integer", "table", "e4m3", "e5m2"] | GridKind
OffsetKind = Literal["none", "zeros", "offsets", "paired"]


class PlaneForm(NamedTuple):
    """What the planes of a matrix mean; kernels are compiled for it.

    Attributes:
        columns: of the matrix, a multiple of a run.
        low_bits: of a code in the first plane: 2, 4 or 8; of grids 1 or 2, as many as there are for a column.
        high_bits: of a code in the second plane: 0, 1 or 2; of grids 0.
        group_size: columns that share a scale, a multiple of 16 (of 8-bit codes: of any run).
        super_size: columns that share a super-scale, 0 for none.
        offset: what is subtracted: "zeros" from the code of a group, "offsets" from the scaled value; "paired": the
            scale's byte holds a scale (low nibble) and an offset.
        zero: subtracted from every code.
        kind: what a code means; of grids, which points there are and what has which bits.
    """

    columns: int
    low_bits: int
    high_bits: int
    group_size: int
    super_size: int
    offset: OffsetKind
    zero: int
    kind: CodeKind

    @property
    def columns_in_word(self) -> int:
        return 4 if self.low_bits == 8 else 8

    @property
    def run(self) -> int:
        """Columns of a run."""
        return RUN_WORDS * self.columns_in_word


def field_position(index: int, bits: int) -> int:
    """The lowest bit of field `index` in a word of fields of `bits` bits."""
    if bits >= 4:
        return bits * index
    pair = index // 2
    return bits * (pair % (4 // bits)) + 8 * (pair // (4 // bits)) + (0 if index % 2 else 4)


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """A matrix `[out, columns]` on a device."""

    form: PlaneForm
    low: torch.Tensor  # [out, words] int32, int16 where codes have 2 low bits; of grids `GridFields.low`
    high: torch.Tensor | None  # [out, words] uint8 (1 bit) or int16 (2 bits); of grids `GridFields.high`
    scales: torch.Tensor | None  # [out, groups] floating, or int8 beside super_scales; of grids `GridFields.scales`
    super_scales: torch.Tensor | None  # [out, super-blocks] float16
    offsets: torch.Tensor | None  # [out, groups]
    super_offsets: torch.Tensor | None  # [out, super-blocks] float16
    table: torch.Tensor | None  # [16] float32; of grids `grid_table`
    permutation: torch.Tensor | None  # [columns] int32, see layouts.Int4Groups

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In an order that is the same for every matrix of one form."""
        all_of_them = (
            self.low, self.high, self.scales, self.super_scales, self.offsets, self.super_offsets, self.table,
            self.permutation,
        )  # fmt: skip
        return tuple(tensor for tensor in all_of_them if tensor is not None)

    @property
    def rows(self) -> int:
        return self.low.shape[0]


def decline_planes(layout: PackedLayout) -> Declined | None:
    """Why `layout` has no form in planes; None if it has."""
    columns = layout.shape[1]
    if isinstance(layout, GgufBlocks):
        known = layout.qtype in BLOCK_FORMS or layout.qtype in GRID_FORMS
        return None if known else Declined(f"no kernel for {layout.qtype.name}")
    run = 16 if isinstance(layout, Int8Groups) else 32
    if columns % run:
        return Declined(f"needs a multiple of {run} inputs, not {columns}")
    if layout.group_size % run and layout.group_size != 16:
        return Declined(f"no kernel for groups of {layout.group_size}")
    return None


def planes_of(layout: PackedLayout) -> Planes:
    """`layout` in planes, on its device; `decline_planes` has been asked."""
    if isinstance(layout, GgufBlocks):
        return _of_points(layout) if layout.qtype in GRID_FORMS else _of_blocks(layout)
    form = _form_of(layout)
    table = layout.table.float() if isinstance(layout, CodebookGroups) else None
    low, high = _pack_planes(form, layout.shape[0], layout.codes.device, lambda rows: _codes_of(layout, rows))
    zeros = None if isinstance(layout, CodebookGroups) else layout.zeros
    permutation = None if isinstance(layout, CodebookGroups) else layout.permutation
    return Planes(form, low, high, layout.scales.contiguous(), None, zeros, None, table, permutation)


def _form_of(layout: _Grouped) -> PlaneForm:
    columns, group_size = layout.shape[1], layout.group_size
    if isinstance(layout, CodebookGroups):
        return PlaneForm(columns, 4, 0, group_size, 0, "none", 0, "table")
    if isinstance(layout, NarrowGroups):
        return PlaneForm(columns, 2, layout.bits - 2, group_size, 0, "zeros", 0, "integer")
    offset: OffsetKind = "none" if layout.zeros is None else "zeros"
    if isinstance(layout, Int4Groups):
        return PlaneForm(columns, 4, 0, group_size, 0, offset, 0, "integer")
    float8 = _FLOAT8.get(layout.codes.dtype)
    if float8 is not None:
        return PlaneForm(columns, 8, 0, group_size, 0, "none", 0, "e4m3" if float8 == "e4m3" else "e5m2")
    return PlaneForm(columns, 8, 0, group_size, 0, offset, 128 if layout.codes.dtype == torch.int8 else 0, "integer")


def _codes_of(layout: _Grouped, rows: slice) -> torch.Tensor:
    """uint8 `[rows, columns]`; signed integers are shifted by 128, which the form's zero takes back."""
    if isinstance(layout, NarrowGroups):
        return layout.numbers(rows)
    codes = layout.codes[rows]
    if not isinstance(layout, Int8Groups):
        return unpack_bits(codes, 4)
    return codes.view(torch.uint8) ^ 128 if codes.dtype == torch.int8 else codes.view(torch.uint8)


def _of_blocks(layout: GgufBlocks) -> Planes:
    block = BLOCK_FORMS[layout.qtype]
    rows, columns = layout.shape
    data, device = layout.data, layout.data.device
    probe = block.unpack(data[:1, : layout.qtype.block_bytes])
    paired = probe.super_offset is not None and probe.offsets is None
    offset: OffsetKind = "paired" if paired else "none" if probe.offsets is None else "offsets"
    form = PlaneForm(
        columns=columns,
        low_bits=block.low_bits,
        high_bits=block.high_bits,
        group_size=block.group_size,
        super_size=0 if probe.super_scale is None else layout.qtype.block_size,
        offset=offset,
        zero=block.zero,
        kind="integer" if block.table is None else "table",
    )
    blocks = columns // layout.qtype.block_size
    fields = [
        None if field is None else torch.empty((rows, blocks * field.shape[1]), dtype=field.dtype, device=device)
        for field in probe[1:]
    ]

    def codes_of(piece: slice) -> torch.Tensor:
        found = block.unpack(data[piece].reshape(-1, layout.qtype.block_bytes))
        for target, source in zip(fields, found[1:], strict=True):
            if target is not None and source is not None:
                target[piece] = source.reshape(-1, target.shape[1])
        return found.codes.view(-1, columns)

    low, high = _pack_planes(form, rows, device, codes_of)
    scales, super_scales, offsets, super_offsets = fields
    if scales is None:
        raise TypeError(f"{layout.qtype.name} has no scales")
    table = None if block.table is None else torch.from_numpy(block.table).to(device)
    return Planes(form, low, high, scales, super_scales, offsets, super_offsets, table, None)


def _of_points(layout: GgufBlocks) -> Planes:
    grid, kind = GRID_FORMS[layout.qtype], layout.qtype
    rows, columns = layout.shape
    data, device = layout.data, layout.data.device
    fields = [
        None
        if field is None
        else torch.empty((rows, columns // kind.block_size * field.shape[1]), dtype=field.dtype, device=device)
        for field in grid.unpack(data[:1, : kind.block_bytes])
    ]
    step = max(1, _PIECE_VALUES // columns)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        for target, source in zip(fields, grid.unpack(data[piece].reshape(-1, kind.block_bytes)), strict=True):
            if target is not None and source is not None:
                target[piece] = source.reshape(-1, target.shape[1])
    low, high, scales, super_scales = fields
    if low is None:
        raise TypeError(f"{kind.name} has no points")
    low_bits = low.itemsize // RUN_WORDS
    form = PlaneForm(columns, low_bits, 0, grid.group_size, kind.block_size, "none", 0, grid.kind)
    return Planes(form, low, high, scales, super_scales, None, None, grid_table(grid.kind, device), None)


def _pack_planes(
    form: PlaneForm, rows: int, device: torch.device, codes_of: Callable[[slice], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both planes of `codes_of(rows)`, uint8 `[rows, columns]`."""
    words = form.columns // form.columns_in_word
    low = torch.empty((rows, words), dtype=torch.int16 if form.low_bits == 2 else torch.int32, device=device)
    high = None
    if form.high_bits:
        high = torch.empty((rows, words), dtype=torch.uint8 if form.high_bits == 1 else torch.int16, device=device)
    step = max(1, _PIECE_VALUES // form.columns)
    for first in range(0, rows, step):
        piece = slice(first, min(first + step, rows))
        codes = codes_of(piece).view(piece.stop - first, -1, form.columns_in_word, RUN_WORDS)
        low[piece] = _joined(codes & ((1 << form.low_bits) - 1), form.low_bits).to(low.dtype)
        if high is not None:
            high[piece] = _joined(codes >> form.low_bits, form.high_bits).to(high.dtype)
    return low, high


def _joined(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of `fields` `[rows, runs, columns in a word, 4]`: int32 `[rows, words]`."""
    word = fields[:, :, 0].int() << field_position(0, bits)
    for index in range(1, fields.shape[2]):
        word |= fields[:, :, index].int() << field_position(index, bits)
    return word.flatten(1)
