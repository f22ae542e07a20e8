"""Storage types of checkpoint tensors and the tensor as it lies in the file.

Block layouts are those of the GGUF specification (ggml); dense types are little-endian.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


class QuantType(enum.Enum):
    """A storage type: (GGUF type number, values per block, bytes per block)."""

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)

    def __init__(self, gguf_id: int, block_size: int, block_bytes: int) -> None:
        self.gguf_id = gguf_id
        self.block_size = block_size
        self.block_bytes = block_bytes

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values; the caller has checked divisibility."""
        return columns // self.block_size * self.block_bytes


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A checkpoint tensor in its file's bytes, usually a view of a memory map.

    `shape` is row-major and logical, `[out, in]` for a linear weight. `data` is uint8
    `[product(shape[:-1]), row_bytes]`.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QuantType
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def type_name(self) -> str:
        """How it is stored, for people."""
        return self.qtype.name

    def take_rows(self, rows: np.ndarray | slice) -> RawTensor:
        """Some rows of a matrix, or all in another order; lossless, since blocks lie along the columns."""
        data = self.data[rows]
        return RawTensor(self.name, (len(data) // math.prod(self.shape[1:-1]), *self.shape[1:]), self.qtype, data)

    def regrouped(self, shape: tuple[int, ...], rows: np.ndarray | slice) -> RawTensor:
        """Some rows, by their number whatever the dimensions, as a tensor of `shape`; copied when they are read."""
        if isinstance(rows, slice):
            return RawTensor(self.name, shape, self.qtype, self.data[rows])
        return ComputedTensor(self.name, shape, self.qtype, self.data.__getitem__, rows)

    def part(self, index: int) -> RawTensor:
        """One of the tensors `shape[1:]` that are stacked in this one."""
        count = math.prod(self.shape[1:-1])
        return RawTensor(self.name, self.shape[1:], self.qtype, self.data[index * count : (index + 1) * count])


class StackedTensor(RawTensor):
    """Tensors of one shape that a checkpoint keeps apart, one an expert; put together only where `data` is read."""

    __slots__ = ("parts",)

    parts: tuple[RawTensor, ...]

    def __init__(self, name: str, parts: Sequence[RawTensor]) -> None:
        first = parts[0]
        values = {"name": name, "shape": (len(parts), *first.shape), "qtype": first.qtype, "parts": tuple(parts)}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def data(self) -> np.ndarray:
        return np.concatenate([part.data for part in self.parts])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def type_name(self) -> str:
        return self.parts[0].type_name

    def part(self, index: int) -> RawTensor:
        return self.parts[index]


class ComputedTensor(RawTensor):
    """A tensor whose rows are made of what the checkpoint holds when they are read.

    Args:
        read: numbers of rows, of all but the last dimension together -> their bytes, uint8 `[count, row_bytes]`.
        rows: which of its rows this tensor has, in order; None for all.
    """

    __slots__ = ("_read", "_rows")

    _read: Callable[[np.ndarray], np.ndarray]
    _rows: np.ndarray

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        qtype: QuantType,
        read: Callable[[np.ndarray], np.ndarray],
        rows: np.ndarray | None = None,
    ) -> None:
        rows = np.arange(math.prod(shape[:-1])) if rows is None else rows
        values = {"name": name, "shape": shape, "qtype": qtype, "_read": read, "_rows": rows}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def data(self) -> np.ndarray:
        return self._read(self._rows)

    @property
    def nbytes(self) -> int:
        return len(self._rows) * self.qtype.row_bytes(self.shape[-1])

    def take_rows(self, rows: np.ndarray | slice) -> ComputedTensor:
        taken = self._rows[rows]
        shape = (len(taken) // math.prod(self.shape[1:-1]), *self.shape[1:])
        return ComputedTensor(self.name, shape, self.qtype, self._read, taken)

    def part(self, index: int) -> ComputedTensor:
        count = math.prod(self.shape[1:-1])
        return self.regrouped(self.shape[1:], slice(index * count, (index + 1) * count))

    def regrouped(self, shape: tuple[int, ...], rows: np.ndarray | slice) -> ComputedTensor:
        """Some rows, by their number whatever the dimensions, as a tensor of `shape`."""
        return ComputedTensor(self.name, shape, self.qtype, self._read, self._rows[rows])


def transposed(raw: RawTensor) -> ComputedTensor:
    """A dense stack of matrices `[count, in, out]` as `[count, out, in]`, transposed where it is read."""
    count, columns, rows = raw.shape

    def read(numbers: np.ndarray) -> np.ndarray:
        stored = raw.data.view(f"<u{raw.qtype.block_bytes}").reshape(count, columns, rows)
        matrices, within = np.divmod(numbers, rows)
        out = np.empty((len(numbers), columns), stored.dtype)
        for matrix in np.unique(matrices):
            chosen = matrices == matrix
            out[chosen] = stored[matrix][:, within[chosen]].T
        return out.view(np.uint8)

    return ComputedTensor(raw.name, (count, rows, columns), raw.qtype, read)


class NoiseTensor(RawTensor):
    """A tensor that no checkpoint holds: normal noise, whose bytes are made when the host first reads `data`.

    A device may make noise of its own instead, from `standard_deviation` and `seed`, so that nothing has to be
    written, converted and sent.
    """

    __slots__ = ("_bytes", "_make", "seed", "standard_deviation")

    standard_deviation: float
    seed: int
    _make: Callable[[], np.ndarray]
    _bytes: np.ndarray | None

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        qtype: QuantType,
        *,
        standard_deviation: float,
        seed: int,
        make: Callable[[], np.ndarray],
    ) -> None:
        """`make` returns what `data` shall be."""
        values = {"name": name, "shape": shape, "qtype": qtype, "seed": seed, "_make": make, "_bytes": None}
        for key, value in {**values, "standard_deviation": standard_deviation}.items():
            object.__setattr__(self, key, value)

    @property
    def data(self) -> np.ndarray:
        if self._bytes is None:
            object.__setattr__(self, "_bytes", self._make())
        return self._bytes  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.qtype.row_bytes(self.shape[-1])
