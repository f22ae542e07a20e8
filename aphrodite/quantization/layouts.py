"""The canonical layouts of packed weights `[out, in]` that kernels take, whatever checkpoint they came from.

Each is lossless but for what its docstring says, and each has the same small set of methods, so that loading code
stacks, reorders and moves matrices without knowing which layout it holds. All tensors of a layout lie on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor

Rows: TypeAlias = "slice | torch.Tensor"
"""Rows of a matrix: a slice, or their numbers (int64)."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Groups:
    """4-bit codes with a scale and a zero for each group of inputs: (code - zero) * scale.

    AWQ, GPTQ and compressed-tensors W4A16 in groups of 128 take 1.01 times, in groups of 32 at most 1.06 times the
    memory of the checkpoint (zeros take a byte instead of 4 bits, or are not stored there at all).
    """

    codes: torch.Tensor  # [out, in / 2] uint8; the low nibble is the even column's
    scales: torch.Tensor  # [out, groups] float16, bfloat16 or float32
    zeros: torch.Tensor  # [out, groups] uint8, or a floating type where they are fractional
    group_size: int  # inputs, even, divides `in`
    permutation: torch.Tensor | None = None  # [in] int32: column j of the codes belongs to input permutation[j]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return _present(self.codes, self.scales, self.zeros, self.permutation)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take_rows(self, rows: Rows) -> Int4Groups:
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    def to(self, device: torch.device) -> Int4Groups:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
            permutation=_moved(self.permutation, device),
        )

    def stacks_with(self, other: PackedLayout) -> bool:
        """Whether the two can be one matrix, row upon row."""
        return (
            isinstance(other, Int4Groups)
            and self.group_size == other.group_size
            and (self.scales.dtype, self.zeros.dtype) == (other.scales.dtype, other.zeros.dtype)
            and same_permutation(self.permutation, other.permutation)
        )

    def dequantize(self) -> torch.Tensor:
        """float32 `[out, in]`, columns in the order of the inputs."""
        return _ungrouped(unpack_bits(self.codes, 4).float(), self.scales, self.zeros, self.permutation)


@dataclass(frozen=True, slots=True, eq=False)
class Int8Groups:
    """8-bit numbers with a scale for each group of inputs: (number - zero) * scale, or number * scale.

    Integers (GPTQ 8-bit, W8A16, W8A8, bitsandbytes' int8, Q8_0) and float8 (FP8 checkpoints). Costs what the
    checkpoint does; FP8 with a scale a 128 x 128 block 1.03 times, since each row has its own copy of the scale, and
    GPTQ's zeros nothing (a byte in both).
    """

    codes: torch.Tensor  # [out, in] int8, uint8, float8_e4m3fn or float8_e5m2
    scales: torch.Tensor  # [out, groups] float16, bfloat16 or float32
    zeros: torch.Tensor | None  # [out, groups] of the integers' type, None for no zeros
    group_size: int  # inputs, divides `in`
    permutation: torch.Tensor | None = None  # [in] int32, as for Int4Groups

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return _present(self.codes, self.scales, self.zeros, self.permutation)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take_rows(self, rows: Rows) -> Int8Groups:
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    def to(self, device: torch.device) -> Int8Groups:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=_moved(self.zeros, device),
            permutation=_moved(self.permutation, device),
        )

    def stacks_with(self, other: PackedLayout) -> bool:
        """Whether the two can be one matrix, row upon row."""
        return (
            isinstance(other, Int8Groups)
            and self.group_size == other.group_size
            and (self.codes.dtype, self.scales.dtype) == (other.codes.dtype, other.scales.dtype)
            and (self.zeros is None) == (other.zeros is None)
            and same_permutation(self.permutation, other.permutation)
        )

    def dequantize(self) -> torch.Tensor:
        """float32 `[out, in]`, columns in the order of the inputs."""
        return _ungrouped(self.codes.float(), self.scales, self.zeros, self.permutation)


@dataclass(frozen=True, slots=True, eq=False)
class NarrowGroups:
    """Codes of 2 or 3 bits with a scale and a zero for each group of inputs: (code - zero) * scale.

    GPTQ and W2A16. In groups of 64 or more it costs at most 1.06 times the checkpoint's memory, whose zeros are packed.
    """

    bits: int  # 2 or 3
    codes: torch.Tensor  # [out, in * bits / 8] uint8, a stream of bits, low ones first; `in` is a multiple of 8
    scales: torch.Tensor  # [out, groups] float16, bfloat16 or float32
    zeros: torch.Tensor  # [out, groups] uint8
    group_size: int  # inputs, divides `in`
    permutation: torch.Tensor | None = None  # [in] int32, as for Int4Groups

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return _present(self.codes, self.scales, self.zeros, self.permutation)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take_rows(self, rows: Rows) -> NarrowGroups:
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    def to(self, device: torch.device) -> NarrowGroups:
        codes, scales, zeros = (tensor.to(device) for tensor in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros, permutation=_moved(self.permutation, device))

    def stacks_with(self, other: PackedLayout) -> bool:
        """Whether the two can be one matrix, row upon row."""
        return (
            isinstance(other, NarrowGroups)
            and (self.bits, self.group_size) == (other.bits, other.group_size)
            and self.scales.dtype == other.scales.dtype
            and same_permutation(self.permutation, other.permutation)
        )

    def numbers(self, rows: slice) -> torch.Tensor:
        """Codes one a byte, uint8 `[rows, in]`."""
        return unpack_bits(self.codes[rows], self.bits)

    def dequantize(self) -> torch.Tensor:
        """float32 `[out, in]`, columns in the order of the inputs."""
        return _ungrouped(self.numbers(slice(None)).float(), self.scales, self.zeros, self.permutation)


def unpack_bits(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of 2, 3, 4 or 8 bits in a stream of bits, low ones first: uint8 `[rows, bytes]` -> `[rows, numbers]`.

    Numbers of 3 bits are eight in three bytes.
    """
    if bits == 8:
        return stream
    if bits == 4:  # without wider numbers on the way
        return torch.stack((stream & 15, stream >> 4), dim=-1).flatten(1)
    words = stream.unflatten(1, (-1, 3)).int() if bits == 3 else stream[..., None].int()
    joined = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16 if bits == 3 else words[..., 0]
    shifts = torch.arange(0, 24 if bits == 3 else 8, bits, dtype=torch.int32, device=stream.device)
    return (joined[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class CodebookGroups:
    """4-bit codes that stand for the 16 numbers of a table, with a scale for each group: table[code] * scale.

    bitsandbytes' NF4 and FP4. Scales that the checkpoint quantized once more are float16 here: 1.03 times its memory,
    and a rounding of 2^-12; those that it has in float32 stay so.
    """

    codes: torch.Tensor  # [out, in / 2] uint8; the low nibble is the even column's
    scales: torch.Tensor  # [out, groups] float16 or float32
    table: torch.Tensor  # [16] float32
    group_size: int  # inputs, even, divides `in`

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scales, self.table)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take_rows(self, rows: Rows) -> CodebookGroups:
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])

    def to(self, device: torch.device) -> CodebookGroups:
        codes, scales, table = (tensor.to(device) for tensor in self.tensors)
        return replace(self, codes=codes, scales=scales, table=table)

    def stacks_with(self, other: PackedLayout) -> bool:
        """Whether the two can be one matrix, row upon row."""
        return (
            isinstance(other, CodebookGroups)
            and self.group_size == other.group_size
            and self.scales.dtype == other.scales.dtype
            and torch.equal(self.table, other.table)
        )

    def dequantize(self) -> torch.Tensor:
        """float32 `[out, in]`."""
        return _ungrouped(self.table[unpack_bits(self.codes, 4).long()], self.scales, None, None)


@dataclass(frozen=True, slots=True, eq=False)
class GgufBlocks:
    """Rows of a GGUF tensor in blocks, byte for byte as in the file: costs exactly the file's memory."""

    data: torch.Tensor  # [out, row_bytes] uint8
    qtype: QuantType  # in blocks

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1] // self.qtype.block_bytes * self.qtype.block_size

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.data,)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def take_rows(self, rows: Rows) -> GgufBlocks:
        return replace(self, data=self.data[rows])

    def to(self, device: torch.device) -> GgufBlocks:
        return replace(self, data=self.data.to(device))

    def stacks_with(self, other: PackedLayout) -> bool:
        """Whether the two can be one matrix, row upon row."""
        return isinstance(other, GgufBlocks) and self.qtype is other.qtype

    def dequantize(self) -> torch.Tensor:
        """float32 `[out, in]`; expanded on the host."""
        values = dequantize(RawTensor("blocks", self.shape, self.qtype, self.data.cpu().numpy()))
        return torch.from_numpy(values).to(self.data.device)


PackedLayout: TypeAlias = Int4Groups | Int8Groups | NarrowGroups | CodebookGroups | GgufBlocks


def stack_layouts(parts: Sequence[PackedLayout]) -> list[PackedLayout]:
    """`parts` row upon row, in as few matrices as their layouts allow; neighbours join where they can."""
    stacked: list[list[PackedLayout]] = []
    for part in parts:
        if stacked and stacked[-1][0].stacks_with(part):
            stacked[-1].append(part)
        else:
            stacked.append([part])
    return [_joined(alike) for alike in stacked]


def consecutive_permutation(group_of: np.ndarray, group_size: int) -> np.ndarray | None:
    """The order of inputs in which groups are consecutive, int32 `[in]`; None where groups have unequal sizes.

    Args:
        group_of: `[in]`, the group of each input (act-order).
    """
    sizes = np.bincount(group_of)
    if len(sizes) * group_size != len(group_of) or bool((sizes != group_size).any()):
        return None
    return np.argsort(group_of, kind="stable").astype(np.int32)


def same_permutation(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two matrices take their inputs in the same order."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _joined(parts: Sequence[PackedLayout]) -> PackedLayout:
    first = parts[0]
    if len(parts) == 1:
        return first
    by_row = ("data",) if isinstance(first, GgufBlocks) else ("codes", "scales", "zeros")
    changes = {}
    for name in by_row:
        tensors = [getattr(part, name, None) for part in parts]
        if tensors[0] is not None:
            changes[name] = torch.cat(tensors)  # type: ignore[arg-type]  # all or none of alike layouts have it
    return replace(first, **changes)  # type: ignore[arg-type]  # fields of its own


def _ungrouped(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, permutation: torch.Tensor | None
) -> torch.Tensor:
    """(value - zero) * scale, columns back in the order of the inputs; `values` float32 `[out, in]` is overwritten."""
    groups = values.view(*scales.shape, -1)
    if zeros is not None:
        groups -= zeros.float()[..., None]
    groups *= scales.float()[..., None]
    if permutation is None:
        return values
    ordered = torch.empty_like(values)
    ordered[:, permutation.long()] = values
    return ordered


def _present(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
