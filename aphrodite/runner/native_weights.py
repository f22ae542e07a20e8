"""A model's matrices as the native CPU library keeps them: tiles of the file's own bits, in one allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from aphrodite.kernels.cpu.library import NativeLibrary
from aphrodite.kernels.cpu.program import (
    Codes,
    GroupArrays,
    GroupKind,
    NativeMemory,
    TileKind,
    repack,
    repack_groups,
    tiles_bytes,
)
from aphrodite.quantization.layouts import CodebookGroups, Int4Groups, Int8Groups, NarrowGroups, consecutive_permutation
from aphrodite.quantization.packed import (
    AwqMatrix,
    BitsAndBytesMatrix,
    GptqMatrix,
    NoiseMatrix,
    PackedMatrix,
    PackedTensor,
    PackQuantizedMatrix,
    ScaledMatrix,
    e4m3_values,
)
from aphrodite.quantization.repack import layout_of
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor

DENSE = (QuantType.F32, QuantType.F16, QuantType.BF16)
_ALIGNMENT = 64
_STEP = 32  # columns


def tile_kind(raw: RawTensor, name: str) -> TileKind:
    """What a matrix, or a stack of them, is kept in: its own blocks, or groups of codes of AWQ, GPTQ and their like.

    Other packings, e5m2, groups of unequal sizes and those that are no multiple of 32 or do not divide the columns are
    expanded to the 16-bit type of the packing, as are rows that are looked up where inputs are in another order.

    Args:
        name: of the weight.
    """
    if isinstance(raw, StackedTensor):
        kinds = {tile_kind(part, name) for part in raw.parts}
        return kinds.pop() if len(kinds) == 1 else raw.qtype
    if isinstance(raw, PackedTensor):
        found = _group_kind(raw.matrix)
        if _is_scattered(raw) and (name == "embed.weight" or _column_order(raw) is None):
            return raw.qtype
        if found is not None and found.number >= 0 and found.group % _STEP == 0 == raw.shape[1] % found.group:
            return found
    return raw.qtype


def reads_floats(kind: TileKind) -> bool:
    """Whether products with the kind take float activations, whatever is chosen for the others."""
    return kind in DENSE if isinstance(kind, QuantType) else kind.codes is not Codes.INTEGERS


class TiledWeights:
    """Matrices in tiles, in the order in which a step reads them; those of a stack lie one behind the other.

    Attributes:
        kinds: what each is kept in, by name.
        type_names: of all, for people.
        column_orders: of weights whose groups of inputs are scattered (act-order), the input at each column of their
            tiles, `[columns]` or, of a stack, `[matrices, columns]`.
        row_orders: of gates and up projections before such a weight, likewise the row at each row of their tiles: what
            they make is then in the order in which it is read.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weights: Mapping[str, RawTensor],
        names: Sequence[str],
        progress: Callable[[int, int], None],
    ) -> None:
        self.kinds: dict[str, TileKind] = {}
        self.type_names: set[str] = set()
        self.column_orders: dict[str, np.ndarray] = {}
        self.row_orders: dict[str, np.ndarray] = {}
        self._places: dict[str, int] = {}
        size = 0
        for name in names:
            tensor = weights[name]
            *stack, rows, columns = tensor.shape
            kind = tile_kind(tensor, name)
            self._places[name], self.kinds[name] = size, kind
            self.type_names.add(kind.name if isinstance(kind, QuantType) else tensor.type_name)
            nbytes = math.prod(stack) * tiles_bytes(library, kind, rows, columns)
            size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            if isinstance(kind, GroupKind):
                self._note_orders(name, tensor)
        self.memory = NativeMemory(library, size)
        for name, kind in self.kinds.items():
            tensor, address = weights[name], self.address(name)
            for matrix in self._matrices(name, tensor):
                if isinstance(kind, QuantType):
                    repack(library, matrix, address)
                else:
                    repack_groups(library, kind, _group_arrays(matrix, kind), address)
                address += tiles_bytes(library, kind, matrix.shape[0], matrix.shape[1])
            progress(address - self.memory.address, self.memory.size)
        progress(self.memory.size, self.memory.size)

    def address(self, name: str) -> int:
        return self.memory.address + self._places[name]

    def _note_orders(self, name: str, tensor: RawTensor) -> None:
        """Of a weight that is kept in groups."""
        parts = tensor.parts if isinstance(tensor, StackedTensor) else [tensor]
        if not any(_is_scattered(part) for part in parts):
            return
        found = [order for part in parts if (order := _column_order(part)) is not None]
        order = np.stack(found) if isinstance(tensor, StackedTensor) else found[0]
        self.column_orders[name] = order
        if name.endswith("down.weight"):
            for part in ("gate", "up"):
                self.row_orders[name.removesuffix("down.weight") + f"{part}.weight"] = order

    def _matrices(self, name: str, tensor: RawTensor) -> Iterator[RawTensor]:
        """A matrix, or those of a stack, their rows in the order of the tiles."""
        order = self.row_orders.get(name)
        if len(tensor.shape) == 2:
            yield tensor if order is None else tensor.take_rows(order)
            return
        for index in range(tensor.shape[0]):
            part = tensor.part(index)
            yield part if order is None else part.take_rows(order[index])


def _is_scattered(raw: RawTensor) -> bool:
    """Whether inputs of a matrix that share a scale do not lie side by side."""
    matrix = raw.matrix if isinstance(raw, PackedTensor) else None
    return isinstance(matrix, GptqMatrix | PackQuantizedMatrix) and matrix.group_of is not None


def _column_order(raw: RawTensor) -> np.ndarray | None:
    """The inputs of a matrix in groups, group by group; None where groups have unequal sizes."""
    matrix = raw.matrix if isinstance(raw, PackedTensor) else None
    if not isinstance(matrix, GptqMatrix | PackQuantizedMatrix) or matrix.group_of is None:
        return np.arange(raw.shape[1], dtype=np.int32)
    return consecutive_permutation(matrix.group_of, raw.shape[1] // matrix.scale_groups)


def _group_kind(matrix: PackedMatrix) -> GroupKind | None:
    """How the codes of a packing are grouped; None where it is something else."""
    columns = matrix.shape[1]
    match matrix:
        case AwqMatrix():
            return GroupKind(4, matrix.scales.qtype, columns // matrix.scales.shape[0])
        case GptqMatrix() | PackQuantizedMatrix():
            return GroupKind(matrix.bits, matrix.scales.qtype, columns // matrix.scale_groups)
        case ScaledMatrix():
            group = columns if matrix.scales.shape[1] == 1 else matrix.tile[1]
            if matrix.table is e4m3_values():
                return GroupKind(8, QuantType.F32, group, Codes.FLOAT8)
            scales = matrix.scales.qtype if matrix.divisor == 1.0 else QuantType.F32
            return GroupKind(8, scales, group) if matrix.table is None else None
        case BitsAndBytesMatrix():
            return GroupKind(4, QuantType.F32 if matrix.nested is None else QuantType.F16, matrix.block, Codes.TABLE)
        case NoiseMatrix():
            return GroupKind(matrix.bits, QuantType.F16, matrix.group_size)
    return None


def _group_arrays(raw: RawTensor, kind: GroupKind) -> GroupArrays:
    """The matrix as `repack_groups` takes it; signed integers become unsigned, as do their zeros."""
    layout = layout_of(raw, torch.device("cpu"))
    match layout:
        case CodebookGroups():
            return GroupArrays(layout.codes.numpy(), _numbers(layout.scales, kind), table=layout.table.float().numpy())
        case Int8Groups() if layout.codes.dtype is torch.float8_e4m3fn:
            return GroupArrays(layout.codes.view(torch.uint8).numpy(), _numbers(layout.scales, kind))
        case NarrowGroups():
            codes = layout.numbers(slice(None))
        case Int4Groups() | Int8Groups():
            codes = layout.codes
        case _:
            raise TypeError(f"{raw.name} is {raw.type_name}, which has no groups of codes")
    zeros = layout.zeros
    if zeros is None:
        zeros = torch.zeros(layout.scales.shape, dtype=codes.dtype)
    return GroupArrays(_unsigned(codes), _numbers(layout.scales, kind), _unsigned(zeros))


def _numbers(scales: torch.Tensor, kind: GroupKind) -> np.ndarray:
    """Scales as float32, or as the bytes of their 16-bit type."""
    if kind.scales is QuantType.F32:
        return scales.float().numpy()
    return scales.view(torch.int16).numpy().view(np.uint16)


def _unsigned(integers: torch.Tensor) -> np.ndarray:
    array = integers.numpy()
    return array if array.dtype == np.uint8 else array.view(np.uint8) ^ np.uint8(0x80)
