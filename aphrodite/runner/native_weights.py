"""A model's matrices as the native CPU library keeps them: tiles of the file's own bits, in one allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from aphrodite.kernels.cpu.library import NativeLibrary
from aphrodite.kernels.cpu.program import (
    GroupKind,
    NativeMemory,
    TileKind,
    repack,
    repack_groups,
    tiles_bytes,
)
from aphrodite.quantization.layouts import Int4Groups, Int8Groups
from aphrodite.quantization.packed import (
    AwqMatrix,
    GptqMatrix,
    NoiseMatrix,
    PackedMatrix,
    PackedTensor,
    PackQuantizedMatrix,
    ScaledMatrix,
)
from aphrodite.quantization.repack import layout_of
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor

DENSE = (QuantType.F32, QuantType.F16, QuantType.BF16)
_ALIGNMENT = 64
_STEP = 32  # columns


def tile_kind(raw: RawTensor) -> TileKind:
    """What a matrix, or a stack of them, is kept in: its own blocks, or groups of integers of AWQ, GPTQ and their like.

    Other packings, act-order, scales in float32 and groups that are no multiple of 32 are expanded to the 16-bit type
    of the packing.
    """
    if isinstance(raw, StackedTensor):
        kinds = {tile_kind(part) for part in raw.parts}
        return kinds.pop() if len(kinds) == 1 else raw.qtype
    if isinstance(raw, PackedTensor):
        found = _group_kind(raw.matrix)
        if found is not None and found.number >= 0 and found.group % _STEP == 0:
            return found
    return raw.qtype


class TiledWeights:
    """Matrices in tiles, in the order in which a step reads them; those of a stack lie one behind the other."""

    def __init__(
        self,
        library: NativeLibrary,
        weights: Mapping[str, RawTensor],
        names: Sequence[str],
        progress: Callable[[int, int], None],
    ) -> None:
        self.kinds: dict[str, TileKind] = {}
        self.type_names: set[str] = set()
        self._places: dict[str, int] = {}
        size = 0
        for name in names:
            tensor = weights[name]
            *stack, rows, columns = tensor.shape
            kind = tile_kind(tensor)
            self._places[name], self.kinds[name] = size, kind
            self.type_names.add(kind.name if isinstance(kind, QuantType) else tensor.type_name)
            nbytes = math.prod(stack) * tiles_bytes(library, kind, rows, columns)
            size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = NativeMemory(library, size)
        for name, kind in self.kinds.items():
            tensor, address = weights[name], self.address(name)
            for matrix in [tensor] if len(tensor.shape) == 2 else map(tensor.part, range(tensor.shape[0])):
                if isinstance(kind, QuantType):
                    repack(library, matrix, address)
                else:
                    repack_groups(library, kind, *_integers(matrix), address)
                address += tiles_bytes(library, kind, matrix.shape[0], matrix.shape[1])
            progress(address - self.memory.address, self.memory.size)
        progress(self.memory.size, self.memory.size)

    def address(self, name: str) -> int:
        return self.memory.address + self._places[name]


def _group_kind(matrix: PackedMatrix) -> GroupKind | None:
    """How the integers of a packing are grouped; None where it is something else or its columns are permuted."""
    columns = matrix.shape[1]
    match matrix:
        case AwqMatrix():
            return GroupKind(4, matrix.scales.qtype, columns // matrix.scales.shape[0])
        case GptqMatrix() | PackQuantizedMatrix() if matrix.group_of is None:
            return GroupKind(matrix.bits, matrix.scales.qtype, columns // matrix.scale_groups)
        case ScaledMatrix() if matrix.table is None and matrix.divisor == 1.0:
            group = columns if matrix.scales.shape[1] == 1 else matrix.tile[1]
            return GroupKind(8, matrix.scales.qtype, group)
        case NoiseMatrix():
            return GroupKind(matrix.bits, QuantType.F16, matrix.group_size)
    return None


def _integers(raw: RawTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros as `repack_groups` takes them; signed integers become unsigned, as do their zeros."""
    layout = layout_of(raw, torch.device("cpu"))
    if not isinstance(layout, Int4Groups | Int8Groups):
        raise TypeError(f"{raw.name} is {raw.type_name}, which is no groups of integers")
    codes, zeros = layout.codes, layout.zeros
    if zeros is None:
        zeros = torch.zeros(layout.scales.shape, dtype=codes.dtype)
    return _unsigned(codes), layout.scales.view(torch.int16).numpy().view(np.uint16), _unsigned(zeros)


def _unsigned(integers: torch.Tensor) -> np.ndarray:
    array = integers.numpy()
    return array if array.dtype == np.uint8 else array.view(np.uint8) ^ np.uint8(0x80)
