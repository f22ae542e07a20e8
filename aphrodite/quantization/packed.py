"""Weights in the packings of quantized safetensors checkpoints, expanded to float32 when their rows are read.

Each class is one packing: it holds views of the checkpoint's tensors and gives rows of the matrix `[out, in]` that
they stand for. Arithmetic is float32. Nothing is read before rows are asked for.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aphrodite.kernels.dispatch import log_once
from aphrodite.quantization.dense_types import encode_dense, numbers_of, to_float32
from aphrodite.quantization.types import QuantType, RawTensor

Rows = np.ndarray | slice
"""Rows of a matrix: their numbers, or a slice with a start and an end."""

_PIECE_VALUES = 4 * 1024 * 1024  # expanded at a time where a whole matrix is asked for
# Output column c of eight lies in this nibble of an AWQ word (gemm layout).
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


class PackedMatrix(Protocol):
    """A matrix in the packing of a method."""

    @property
    def method(self) -> str:
        """For people: `AWQ 4-bit`."""

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""

    @property
    def nbytes(self) -> int:
        """As it is stored, scales and the like included."""

    def expand(self, rows: Rows) -> np.ndarray:
        """float32 `[rows, in]`."""


class PackedTensor(RawTensor):
    """Rows of a `PackedMatrix` as a tensor of a checkpoint.

    `qtype` is the type in which the method's own kernels compute. `data` is the matrix in that type, made anew on each
    access, for whoever holds stored types only; `expand` gives the values without that rounding.
    """

    __slots__ = ("matrix", "rows")

    matrix: PackedMatrix
    rows: np.ndarray

    def __init__(self, name: str, qtype: QuantType, matrix: PackedMatrix, rows: np.ndarray | None = None) -> None:
        """`rows` are the numbers of the rows that the tensor has, in order; None for all."""
        rows = np.arange(matrix.shape[0]) if rows is None else rows
        values = {"name": name, "shape": (len(rows), matrix.shape[1]), "qtype": qtype, "matrix": matrix, "rows": rows}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def type_name(self) -> str:
        return self.matrix.method

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes * self.shape[0] // self.matrix.shape[0]

    @property
    def data(self) -> np.ndarray:
        factor = self.qtype.block_bytes * self.shape[0] * self.shape[1] / self.nbytes
        log_once(
            logging.WARNING,
            f"{self.type_name} weights: expanded to {self.qtype.name} in about {factor:.0f} times the memory, rounded",
        )
        data = np.empty((self.shape[0], self.qtype.row_bytes(self.shape[1])), np.uint8)
        step = max(1, _PIECE_VALUES // self.shape[1])
        for first in range(0, self.shape[0], step):
            piece = self.take_rows(slice(first, first + step)).expand()
            data[first : first + step] = encode_dense(piece, self.qtype).reshape(len(piece), -1)
        return data

    def take_rows(self, rows: Rows) -> PackedTensor:
        return PackedTensor(self.name, self.qtype, self.matrix, self.rows[rows])

    def expand(self) -> np.ndarray:
        """float32 of `shape`."""
        rows, count = self.rows, len(self.rows)
        if count and rows[-1] - rows[0] == count - 1 and bool((np.diff(rows) == 1).all()):
            return self.matrix.expand(slice(int(rows[0]), int(rows[0]) + count))
        return self.matrix.expand(rows)


@dataclass(frozen=True, slots=True, eq=False)
class AwqMatrix:
    """AWQ, gemm layout: (code - zero) * scale with 4-bit codes, groups along the input.

    A word holds eight output columns of one input, in the order 0, 2, 4, 6, 1, 3, 5, 7 from its low end.
    """

    codes: np.ndarray  # [in, out / 8] uint32
    zeros: np.ndarray  # [groups, out / 8] uint32
    scales: RawTensor  # [groups, out]

    method = "AWQ 4-bit"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1] * 8, self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.zeros.nbytes + self.scales.nbytes

    def expand(self, rows: Rows) -> np.ndarray:
        scale = to_float32(numbers_of(self.scales)[:, rows], self.scales.qtype).T
        return _affine(_awq_nibbles(self.codes, rows), _awq_nibbles(self.zeros, rows), scale, None)


@dataclass(frozen=True, slots=True, eq=False)
class GptqMatrix:
    """GPTQ: (code - zero) * scale, groups along the input, which `group_of` may scatter (act-order).

    Codes of one output form a stream of bits along the input, zeros of one group one along the output.
    """

    bits: int  # 2, 3, 4 or 8
    codes: np.ndarray  # [in * bits / 32, out] uint32
    zeros: np.ndarray  # [groups, out * bits / 32] uint32
    zero_offset: int  # added to stored zeros, modulo 2^bits: 1 in version 1, 0 in version 2
    scales: RawTensor  # [groups, out]
    group_of: np.ndarray | None  # [in], group of each input; None for consecutive groups of one size

    @property
    def method(self) -> str:
        return f"GPTQ {self.bits}-bit"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.codes.shape[0] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        order = self.group_of.nbytes if self.group_of is not None else 0
        return self.codes.nbytes + self.zeros.nbytes + self.scales.nbytes + order

    @property
    def scale_groups(self) -> int:
        return self.scales.shape[0]

    def expand(self, rows: Rows) -> np.ndarray:
        codes = unpack_stream(np.ascontiguousarray(self.codes[:, rows].T), self.bits)
        stored = unpack_stream(self.zeros, self.bits)[:, rows].T
        zero = stored + np.uint8(self.zero_offset) & np.uint8((1 << self.bits) - 1)
        scale = to_float32(numbers_of(self.scales)[:, rows], self.scales.qtype).T
        return _affine(codes, zero, scale, self.group_of)


@dataclass(frozen=True, slots=True, eq=False)
class PackQuantizedMatrix:
    """compressed-tensors' pack-quantized: (code - zero) * scale, codes along the input in words of 32 bits.

    Stored codes and zeros are those of signed integers plus 2^(bits - 1); without zeros it is symmetric.
    """

    bits: int  # 2, 4 or 8
    columns: int  # of the matrix; words may be padded
    codes: np.ndarray  # [out, words] uint32
    scales: RawTensor  # [out or 1, groups]
    zeros: np.ndarray | None  # [out * bits / 32, groups] uint32, packed along the output; [1, 1] beside one scale
    group_of: np.ndarray | None  # [in]

    @property
    def method(self) -> str:
        return f"W{self.bits}A16"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        others = sum(array.nbytes for array in (self.zeros, self.group_of) if array is not None)
        return self.codes.nbytes + self.scales.nbytes + others

    @property
    def scale_groups(self) -> int:
        return self.scales.shape[1]

    def expand(self, rows: Rows) -> np.ndarray:
        codes = unpack_stream(np.ascontiguousarray(self.codes[rows]), self.bits)[:, : self.columns]
        scales = to_float32(numbers_of(self.scales), self.scales.qtype)
        scale = scales[rows] if len(scales) > 1 else np.broadcast_to(scales, (len(codes), scales.shape[1]))
        zero = np.full((1, 1), 1 << (self.bits - 1), np.uint8)
        if self.zeros is not None:
            numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            if len(scales) == 1:
                numbers = np.zeros_like(numbers)
            per_word = 32 // self.bits
            shift = (numbers % per_word * self.bits).astype(np.uint32)[:, None]
            zero = self.zeros[numbers // per_word] >> shift & np.uint32((1 << self.bits) - 1)
        return _affine(codes, np.broadcast_to(zero, scale.shape), scale, self.group_of)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledMatrix:
    """8-bit numbers with a scale for each tile of the matrix: number * scale (less a zero first, for integers).

    A grid of scales `[1, 1]` is per tensor, `[out, 1]` per channel, `[out, groups]` per group; with tiles of
    128 x 128, per block.
    """

    method: str
    values: np.ndarray  # [out, in] int8, or uint8 codes for `table`
    table: np.ndarray | None  # [256] float32, what the codes stand for
    scales: RawTensor  # [ceil(out / tile rows), ceil(in / tile columns)]
    tile: tuple[int, int]
    divisor: float = 1.0  # of the scales
    zeros: np.ndarray | None = None  # int8, as the scales

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (self.zeros.nbytes if self.zeros is not None else 0)

    def expand(self, rows: Rows) -> np.ndarray:
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        values = self.values[rows]
        out: np.ndarray = self.table[values] if self.table is not None else values.astype(np.float32)
        grid = to_float32(numbers_of(self.scales), self.scales.qtype)
        if self.divisor != 1.0:
            grid = grid / np.float32(self.divisor)
        if self.zeros is not None:
            out -= self._spread(self.zeros.astype(np.float32), numbers)
        out *= self._spread(grid, numbers)
        return out

    def _spread(self, grid: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The grid's number for each value of `rows`, or for each row where a row has one."""
        spread: np.ndarray = grid[rows // self.tile[0]]
        if grid.shape[1] > 1:
            spread = np.repeat(spread, self.tile[1], axis=1)[:, : self.shape[1]]
        return spread


@dataclass(frozen=True, slots=True, eq=False)
class BitsAndBytesMatrix:
    """bitsandbytes' 4-bit: codebook[code] * absmax of its block; values lie row by row, high nibbles first.

    With double quantization the absmax is itself nested_codebook[code] * nested_absmax of its block, plus an offset.
    """

    method: str
    shape: tuple[int, int]
    codes: np.ndarray  # [out * in / 2] uint8
    codebook: np.ndarray  # [16] float32
    block: int  # values that share an absmax
    absmax: np.ndarray  # [blocks] float32, or uint8 with double quantization
    nested: NestedScales | None

    @property
    def nbytes(self) -> int:
        nested = self.nested.absmax.nbytes + self.nested.codebook.nbytes if self.nested is not None else 0
        return self.codes.nbytes + self.codebook.nbytes + self.absmax.nbytes + nested

    def expand(self, rows: Rows) -> np.ndarray:
        if not isinstance(rows, slice):
            return np.concatenate([self.expand(slice(row, row + 1)) for row in rows.tolist()])
        columns = self.shape[1]
        first, last = rows.start * columns, rows.stop * columns
        # Whole blocks around the values, for neither bytes nor blocks need to begin with a row.
        begin = first // self.block
        end = -(-last // self.block)
        codes = self.codes[begin * self.block // 2 : -(-min(end * self.block, self.shape[0] * columns) // 2)]
        values = self.codebook[np.stack((codes >> np.uint8(4), codes & np.uint8(0x0F)), axis=-1).reshape(-1)]
        values *= np.repeat(self._scales(begin, end), self.block)[: len(values)]
        start = begin * self.block
        return values[first - start : last - start].reshape(-1, columns)

    def _scales(self, begin: int, end: int) -> np.ndarray:
        stored: np.ndarray = self.absmax[begin:end]
        if self.nested is None:
            return stored
        outer = self.nested.absmax[np.arange(begin, end) // self.nested.block]
        scales: np.ndarray = self.nested.codebook[stored] * outer + np.float32(self.nested.offset)
        return scales


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """The scales of bitsandbytes' quantized scales."""

    codebook: np.ndarray  # [256] float32
    absmax: np.ndarray  # [outer blocks] float32
    block: int
    offset: float


@dataclass(frozen=True, slots=True, eq=False)
class NoiseMatrix:
    """Random codes of 4 or 8 bits in groups, which no checkpoint holds; a device makes some of its own.

    The values are uniform around zero.
    """

    method: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    standard_deviation: float
    seed: int

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        groups = columns // self.group_size
        return rows * (columns * self.bits + groups * (16 + self.bits)) // 8  # 16-bit scales and packed zeros

    def expand(self, rows: Rows) -> np.ndarray:
        numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        codes = np.empty((len(numbers), self.shape[1]), np.float32)
        for place, row in enumerate(numbers):
            codes[place] = np.random.default_rng((self.seed, row)).integers(1 << self.bits, size=self.shape[1])
        return (codes - np.float32(1 << self.bits - 1)) * np.float32(self.scale)

    @property
    def scale(self) -> float:
        """Of every group: codes are uniform."""
        return self.standard_deviation * 12**0.5 / (1 << self.bits)


@functools.cache
def e4m3_values() -> np.ndarray:
    """What each byte means as float8 e4m3fn (OCP 8-bit floating point, arXiv 2209.05433): float32 `[256]`."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10)
    values = np.where(exponent > 0, normal, fraction * 2.0**-9) * np.where(codes < 128, 1.0, -1.0)
    values[codes & 127 == 127] = np.nan
    return values.astype(np.float32)


@functools.cache
def e5m2_values() -> np.ndarray:
    """What each byte means as float8 e5m2, a float16 without its low byte: float32 `[256]`."""
    return (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)


def unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of 2, 3, 4 or 8 bits that lie in a stream of bits, low bits first.

    Args:
        words: `[rows, words]` uint32, contiguous.

    Returns:
        uint8 `[rows, words * 32 / bits]`.
    """
    stream = words.astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return stream
    if bits == 3:
        triples = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(words), -1, 3)
        joined: np.ndarray = triples[..., 0] | triples[..., 1] << np.uint8(1) | triples[..., 2] << np.uint8(2)
        return joined
    numbers = np.empty((*stream.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):
        np.bitwise_and(stream >> np.uint8(bits * place), np.uint8((1 << bits) - 1), out=numbers[..., place])
    return numbers.reshape(len(words), -1)


def _awq_nibbles(words: np.ndarray, rows: Rows) -> np.ndarray:
    """Rows of the matrix whose transpose `words` `[rows of words, out / 8]` hold: uint8 `[rows, rows of words]`."""
    chosen = slice(rows.start // 8, -(-rows.stop // 8)) if isinstance(rows, slice) else slice(None)
    transposed = np.ascontiguousarray(words[:, chosen].T)
    numbers = np.empty((len(transposed), 8, len(words)), np.uint8)
    for column, nibble in enumerate(AWQ_NIBBLES):
        numbers[:, column] = transposed >> np.uint32(4 * nibble) & np.uint32(0x0F)
    flat = numbers.reshape(-1, len(words))
    return flat[rows.start % 8 :][: rows.stop - rows.start] if isinstance(rows, slice) else flat[rows]


def _affine(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray, group_of: np.ndarray | None) -> np.ndarray:
    """(codes - zero) * scale, float32 `[rows, in]`.

    Args:
        codes: `[rows, in]` unsigned.
        zero, scale: `[rows, groups]`.
        group_of: `[in]`; None for consecutive groups of one size.
    """
    values = codes.astype(np.float32, order="C")
    zero = zero.astype(np.float32)
    if group_of is not None:
        values -= np.take(zero, group_of, axis=1)
        values *= np.take(scale, group_of, axis=1)
        return values
    groups = values.reshape(*scale.shape, -1)
    groups -= zero[..., None]
    groups *= scale[..., None]
    return values
