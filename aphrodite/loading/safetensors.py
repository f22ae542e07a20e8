"""Reading safetensors files through a memory map, without trusting any number in them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of header length, a JSON header that
gives every tensor's type, shape and byte range, then the bytes, without gaps or overlaps. Large
checkpoints spread over several files that `model.safetensors.index.json` lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import load_json_object, parse_json_object
from aphrodite.loading.files import map_file
from aphrodite.loading.report import listed
from aphrodite.quantization.types import QuantType, RawTensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
DENSE_TYPES = {"F32": QuantType.F32, "F16": QuantType.F16, "BF16": QuantType.BF16}
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of any type as it lies in a file.

    `dtype` is the format's name of the type, `data` the bytes, a view of the file's memory map.
    """

    source: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def type_name(self) -> str:
        """How it is stored, for people."""
        return self.dtype

    def dense(self) -> RawTensor:
        """The tensor for a parameter that is stored without quantization.

        Raises:
            ModelFormatError: its type is not one of F32, F16 and BF16.
        """
        qtype = DENSE_TYPES.get(self.dtype)
        if qtype is None:
            raise ModelFormatError(
                f"{self.source}: tensor {self.name!r} is stored as {self.dtype}, which is not supported; "
                f"use a checkpoint in {', '.join(DENSE_TYPES)}"
            )
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1
        return RawTensor(self.name, self.shape, qtype, self.data.reshape(rows, qtype.row_bytes(columns)))


def dense_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, RawTensor]:
    """Tensors for parameters that are stored without quantization.

    Raises:
        ModelFormatError: some are of other types than F32, F16 and BF16.
    """
    others = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DENSE_TYPES]
    if len(others) > 1:
        source = next(iter(tensors.values())).source.parent
        raise ModelFormatError(
            f"{source}: {len(others)} tensors are stored in types that are not supported: "
            f"{listed('of them', others)[0]}; use a checkpoint in {', '.join(DENSE_TYPES)}"
        )
    return {name: tensor.dense() for name, tensor in tensors.items()}


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # relative to the end of the header
    end: int


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, as views of its memory map. Reads only the header.

    Raises:
        ModelFormatError: damaged or truncated.
    """
    buffer = map_file(path)
    if len(buffer) < 8:
        raise _damaged(path, "it is shorter than 8 bytes")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise _damaged(path, f"it claims a header of {header_bytes} bytes in a file of {len(buffer)}")
    header = parse_json_object(buffer[8 : 8 + header_bytes], f"the header of {path}")
    data_start = 8 + header_bytes
    entries = [_entry(path, name, value) for name, value in header.items() if name != "__metadata__"]
    _check_layout(path, entries, len(buffer) - data_start)
    data = np.frombuffer(buffer, np.uint8)
    return {
        entry.name: StoredTensor(
            path, entry.name, entry.dtype, entry.shape, data[data_start + entry.start : data_start + entry.end]
        )
        for entry in entries
    }


def read_sharded_safetensors(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all files that an index lists.

    Raises:
        ModelFormatError: the index or a file is damaged or missing, or they disagree.
    """
    weight_map = _weight_map(index)
    names = _shard_names(index, weight_map)
    absent_files = [file for file in names if not (index.parent / file).exists()]
    if absent_files:
        raise ModelFormatError(f"{index}: {len(names)} files belong together; {listed('missing', absent_files)[0]}")
    tensors = read_shards(index, [index.parent / file for file in names])
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ModelFormatError(
            f"{index}: {len(absent)} listed tensors are not in their files, {absent[0]!r} among them; "
            "download the model again"
        )
    return tensors


def read_shards(source: Path, files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files together.

    Args:
        source: what says that they belong together, for errors.

    Raises:
        ModelFormatError: a file is damaged, or two have a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = read_safetensors(file)
        twice = next((name for name in shard if name in tensors), None)
        if twice is not None:
            raise ModelFormatError(f"{source}: tensor {twice!r} is in more than one file; download the model again")
        tensors.update(shard)
    return tensors


def whole_set(names: Iterable[str]) -> list[str]:
    """The files among `names` that are one model by their names alone, `model-00001-of-00002.safetensors` and so on, in
    order; none where they are no such set, are several, or a part is missing."""
    found = [match for name in sorted(names) if (match := _SHARD.fullmatch(name))]
    kinds = {(match[1], match[3]) for match in found}
    if len(kinds) != 1 or [int(match[2]) for match in found] != list(range(1, int(found[0][3]) + 1)):
        return []
    return [match[0] for match in found]


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, which all lie beside it.

    Raises:
        ModelFormatError: the index is damaged.
    """
    return _shard_names(index, _weight_map(index))


def _weight_map(index: Path) -> dict[str, object]:
    weight_map = load_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index}: weight_map should map tensor names to files; download the index again")
    return weight_map


def _shard_names(index: Path, weight_map: dict[str, object]) -> list[str]:
    names: list[str] = []
    for file in weight_map.values():
        # The index may have come from anywhere: it must not name files outside its folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise ModelFormatError(f"{index}: {str(file)[:200]!r} is not the name of a safetensors file beside it")
        names.append(file)
    return list(dict.fromkeys(names))


def _entry(path: Path, name: str, value: object) -> _Entry:
    if not isinstance(value, dict):
        raise _damaged(path, f"the header's entry for {name!r} is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown type {str(dtype)[:80]!r}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise _damaged(path, f"the shape of tensor {name!r} is not a list of up to {MAX_DIMS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _damaged(path, f"data_offsets of tensor {name!r} is not a pair of whole numbers")
    start, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (end - start) * 8:
        raise _damaged(path, f"tensor {name!r} needs {bits / 8:g} bytes, but its byte range is {start} to {end}")
    return _Entry(name, dtype, tuple(shape), start, end)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_layout(path: Path, entries: list[_Entry], available: int) -> None:
    """Byte ranges follow each other without gaps or overlaps and fill the file."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            problem = "overlaps another" if entry.start < position else "leaves a gap before it"
            raise _damaged(path, f"tensor {entry.name!r} {problem}")
        position = entry.end
    if position != available:
        raise _damaged(path, f"its tensors take {position} bytes, but {available} follow the header")


def _damaged(path: Path, problem: str) -> ModelFormatError:
    return ModelFormatError(f"cannot read {path}: {problem}; the file is damaged or incomplete: download it again")
