"""Reading GGUF files (v2 and v3, little-endian) through a memory map, without trusting any number in them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Header, then `n_kv` metadata entries,
then `n_tensors` tensor descriptions, then, aligned, the tensors' bytes. Metadata arrays (a vocabulary has
tens of thousands of strings) are only measured when the file is opened and decoded when first read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.files import map_file
from aphrodite.quantization.types import QuantType, RawTensor

MAGIC = b"GGUF"
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF value type number -> numpy type of its little-endian bytes.
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_QUANT_TYPES = {qtype.gguf_id: qtype for qtype in QuantType}
# Names of ggml's other tensor types, so that a refusal can say what the file holds.
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 31: "Q4_0_4_4",
    32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_FIRST_OF_FORK = 96  # ik_llama.cpp numbers its own types from here on


class GGUFStrings(Sequence[str]):
    """An array of strings in GGUF metadata, decoded as a whole on first access."""

    __slots__ = ("_buffer", "_count", "_end", "_items", "_source", "_start")

    def __init__(self, buffer: mmap.mmap, start: int, end: int, count: int, source: str) -> None:
        self._buffer, self._start, self._end, self._count = buffer, start, end, count
        self._source = source  # file and key, for errors
        self._items: list[str] | None = None

    def tolist(self) -> list[str]:
        """All strings. The list is shared: do not change it.

        Raises:
            ModelFormatError: a string is not UTF-8.
        """
        if self._items is None:
            self._items = self._decode()
        return self._items

    def _decode(self) -> list[str]:
        data = self._buffer[self._start : self._end]
        items: list[str] = []
        unpack, position = _U64.unpack_from, 0
        try:
            for _ in range(self._count):
                start = position + 8
                position = start + unpack(data, position)[0]
                items.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise ModelFormatError(
                f"{self._source}: string {len(items)} is not valid UTF-8 ({error.reason}); "
                "the file is damaged or was converted wrongly: download or convert it again"
            ) from None
        return items

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.tolist()[index]

    def __repr__(self) -> str:
        return f"GGUFStrings({self._count} strings)"


GGUFValue: TypeAlias = bool | int | float | str | np.ndarray | GGUFStrings
"""A metadata value; arrays of numbers are read-only numpy views, arrays of strings `GGUFStrings`."""


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file: metadata and tensors, both views of its memory map."""

    path: Path
    version: int
    metadata: Mapping[str, GGUFValue]
    tensors: Mapping[str, RawTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file. Reads only its header; tensors stay in the file until touched.

    Raises:
        ModelFormatError: not a GGUF file, damaged, truncated, or with tensors of an unsupported type.
    """
    header = _Header(path)
    metadata = header.read_metadata()
    return GGUFFile(path, header.version, metadata, header.read_tensors(metadata))


def read_gguf_metadata(path: Path) -> Mapping[str, GGUFValue]:
    """Only the metadata of a GGUF file, whatever its tensors are.

    Raises:
        ModelFormatError: not a GGUF file, damaged or truncated.
    """
    return _Header(path).read_metadata()


class _Header:
    """A cursor over the header of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = map_file(path)
        self._size = len(self._buffer)
        self._position = 0
        if self._take(4, "the magic number") != MAGIC:
            raise ModelFormatError(f"{path} is not a GGUF file: it does not start with the letters GGUF")
        self.version = self._check_version(self._u32())
        self._num_tensors = self._bounded(self._u64(), MAX_TENSORS, "number of tensors")
        self._num_keys = self._bounded(self._u64(), MAX_KEYS, "number of metadata keys")

    def read_metadata(self) -> dict[str, GGUFValue]:
        metadata: dict[str, GGUFValue] = {}
        for _ in range(self._num_keys):
            key = self._string(MAX_KEY_BYTES, "a metadata key")
            if key in metadata:
                raise self._damaged(f"metadata key {key[:80]!r} appears twice")
            metadata[key] = self._value(key, self._u32())
        return metadata

    def read_tensors(self, metadata: Mapping[str, GGUFValue]) -> dict[str, RawTensor]:
        """Tensor descriptions, which follow the metadata."""
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
        found = [self._tensor_info() for _ in range(self._num_tensors)]
        self._check_types([(name, type_id) for name, _, type_id, _ in found])
        data_start = -(-self._position // alignment) * alignment
        data = np.frombuffer(self._buffer, np.uint8)
        tensors: dict[str, RawTensor] = {}
        for name, shape, type_id, offset in found:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise self._damaged(f"tensor {name!r} starts at {offset}, which is not a multiple of {alignment}")
            tensors[name] = self._tensor(name, shape, _QUANT_TYPES[type_id], data, data_start + offset)
        return tensors

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(MAX_NAME_BYTES, "a tensor name")
        dims = self._u32()
        if not 1 <= dims <= MAX_DIMS:
            raise self._damaged(f"tensor {name!r} has {dims} dimensions, not 1 to {MAX_DIMS}")
        # The file lists the contiguous dimension first.
        shape = struct.unpack(f"<{dims}Q", self._take(8 * dims, "a tensor shape"))[::-1]
        return name, shape, self._u32(), self._u64()

    def _check_types(self, found: Sequence[tuple[str, int]]) -> None:
        """
        Raises:
            ModelFormatError: tensors are of types that are not supported; it names the first and counts the others.
        """
        others = [(name, type_id) for name, type_id in found if type_id not in _QUANT_TYPES]
        if not others:
            return
        name, type_id = others[0]
        known = _OTHER_TYPES.get(type_id)
        if known is None and _FIRST_OF_FORK < type_id < 1 << 9:
            known = f"ik_llama.cpp's type {type_id}"
        more = f" ({len(others)} of {len(found)} tensors are of such types)" if len(others) > 1 else ""
        raise ModelFormatError(
            f"{self._path}: tensor {name!r} is stored as {known or f'unknown type {type_id}'}, which is not "
            f"supported{more}; use a file with {', '.join(qtype.name for qtype in QuantType)}"
        )

    def _tensor(self, name: str, shape: tuple[int, ...], qtype: QuantType, data: np.ndarray, start: int) -> RawTensor:
        if min(shape) < 1 or shape[-1] % qtype.block_size:
            raise self._damaged(f"tensor {name!r} has shape {list(shape)}, impossible for {qtype.name}")
        rows, row_bytes = math.prod(shape[:-1]), qtype.row_bytes(shape[-1])
        end = start + rows * row_bytes
        if end > self._size:
            raise self._damaged(f"tensor {name!r} ends at byte {end}, but the file has {self._size}")
        return RawTensor(name, shape, qtype, data[start:end].reshape(rows, row_bytes))

    def _value(self, key: str, type_id: int) -> GGUFValue:
        if type_id == _STRING:
            return self._string(MAX_STRING_BYTES, f"metadata {key!r}")
        if type_id == _ARRAY:
            return self._array(key, self._u32(), self._u64())
        numbers = self._numbers(key, type_id, 1)
        value: bool | int | float = numbers[0].item()
        return value

    def _array(self, key: str, type_id: int, count: int) -> np.ndarray | GGUFStrings:
        if type_id == _STRING:
            return self._strings(key, count)
        if type_id == _ARRAY:
            raise self._damaged(f"metadata {key!r} is an array of arrays, which no known model uses")
        return self._numbers(key, type_id, count)

    def _numbers(self, key: str, type_id: int, count: int) -> np.ndarray:
        dtype = _NUMBERS.get(type_id)
        if dtype is None:
            raise self._damaged(f"metadata {key!r} has unknown value type {type_id}")
        start = self._position
        self._skip(count * dtype.itemsize, f"metadata {key!r}")
        if type_id == _BOOL and np.frombuffer(self._buffer, np.uint8, count, start).max(initial=0) > 1:
            raise self._damaged(f"metadata {key!r} is neither true nor false")
        numbers: np.ndarray = np.frombuffer(self._buffer, dtype, count, start)
        return numbers

    def _strings(self, key: str, count: int) -> GGUFStrings:
        if count * 8 > self._size - self._position:
            raise self._damaged(f"metadata {key!r} claims {count} strings, more than the file can hold")
        buffer, limit, unpack = self._buffer, self._size - 8, _U64.unpack_from
        start = position = self._position
        for _ in range(count):
            if position > limit:
                raise self._damaged(f"it ends inside metadata {key!r}")
            position += 8 + unpack(buffer, position)[0]
        self._skip(position - start, f"metadata {key!r}")
        return GGUFStrings(buffer, start, position, count, f"{self._path}: metadata {key!r}")

    def _string(self, limit: int, what: str) -> str:
        length = self._bounded(self._u64(), limit, f"length of {what}")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not valid UTF-8 ({error.reason})") from None

    def _u32(self) -> int:
        value: int = _U32.unpack(self._take(4, "the header"))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack(self._take(8, "the header"))[0]
        return value

    def _take(self, count: int, what: str) -> bytes:
        start = self._position
        self._skip(count, what)
        return self._buffer[start : self._position]

    def _skip(self, count: int, what: str) -> None:
        if self._position + count > self._size:
            raise self._damaged(f"it ends inside {what}")
        self._position += count

    def _bounded(self, value: int, limit: int, what: str) -> int:
        if value > limit:
            raise self._damaged(f"{what} is {value}, above the limit of {limit}")
        return value

    def _check_version(self, version: int) -> int:
        if version in (2, 3):
            return version
        if version in (0x02000000, 0x03000000):
            reason = "it is big-endian; convert it to little-endian (gguf-convert-endian)"
        else:
            reason = f"it has GGUF version {version}, but versions 2 and 3 are supported; convert the model again"
        raise ModelFormatError(f"cannot read {self._path}: {reason}")

    def _damaged(self, problem: str) -> ModelFormatError:
        return ModelFormatError(
            f"cannot read {self._path}: {problem}; the file is damaged or incomplete: download it again"
        )
