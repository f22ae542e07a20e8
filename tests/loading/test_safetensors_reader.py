"""The safetensors reader against the library that defines the format, and against files that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from aphrodite.errors import ModelFormatError
from aphrodite.loading.safetensors import read_safetensors, read_sharded_safetensors


def test_tensors_equal_what_was_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    saved = {
        "matrix": rng.normal(size=(3, 5)).astype(np.float32),
        "cube": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "vector": rng.normal(size=7).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "t.safetensors"
    save_file(saved, path, metadata={"format": "pt"})
    found = read_safetensors(path)
    assert set(found) == set(saved)
    for name, values in saved.items():
        assert found[name].shape == values.shape
        assert found[name].data.tobytes() == values.tobytes()
        dense = found[name].dense()
        assert dense.qtype.name == {"float32": "F32", "float16": "F16"}[values.dtype.name]
        assert dense.data.tobytes() == values.tobytes()


def file_of(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": (b"", "empty"),
    "short": (b"\0\0\0", "shorter than 8"),
    "header size": (file_of({}, size=2**63), "claims a header"),
    "cut header": (file_of({"a": tensor()}, size=500), "claims a header"),
    "not json": (file_of(b"{]"), "not valid JSON"),
    "not text": (file_of(b"\xff\xfe"), "not valid JSON"),
    "deep": (file_of(b"[" * 100_000), "nested"),
    "digits": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "list": (file_of([]), "should hold a JSON object"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "appears twice"),
    "entry": (file_of({"a": 1}), "not an object"),
    "dtype": (file_of({"a": tensor(dtype="F7")}, b"\0" * 8), "unknown type 'F7'"),
    "dtype kind": (file_of({"a": tensor(dtype=[])}, b"\0" * 8), "unknown type"),
    "shape": (file_of({"a": tensor(shape="2")}, b"\0" * 8), "shape of tensor 'a'"),
    "negative": (file_of({"a": tensor(shape=[-1, -2])}, b"\0" * 8), "shape of tensor 'a'"),
    "bool": (file_of({"a": tensor(shape=[True, 2])}, b"\0" * 8), "shape of tensor 'a'"),
    "dimensions": (file_of({"a": tensor(shape=[1] * 9)}, b"\0" * 8), "shape of tensor 'a'"),
    "overflow": (file_of({"a": tensor(shape=[2**61, 2**61])}, b"\0" * 8), "needs"),
    "offsets": (file_of({"a": tensor(offsets=[0])}, b"\0" * 8), "data_offsets"),
    "float offsets": (file_of({"a": tensor(offsets=[0.0, 8.0])}, b"\0" * 8), "data_offsets"),
    "backwards": (file_of({"a": tensor(offsets=[8, 0])}, b"\0" * 8), "needs"),
    "range": (file_of({"a": tensor(offsets=[0, 7])}, b"\0" * 8), "needs 8 bytes"),
    "cut": (file_of({"a": tensor()}, b"\0" * 4), "take 8 bytes, but 4 follow"),
    "rest": (file_of({"a": tensor()}, b"\0" * 12), "take 8 bytes, but 12 follow"),
    "gap": (file_of({"a": tensor(offsets=[4, 12])}, b"\0" * 12), "leaves a gap"),
    "overlap": (file_of({"a": tensor(), "b": tensor(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
}


@pytest.mark.parametrize(("data", "problem"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError) as caught:
        read_safetensors(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parameter_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": np.zeros(3, np.int64)}, path)
    with pytest.raises(ModelFormatError, match="'a' is stored as I64"):
        read_safetensors(path)["a"].dense()


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_raise_only_format_errors(tmp_path: Path, data: st.DataObject) -> None:
    header = {"a": tensor(), "bc": tensor("F16", [2, 3], [8, 20]), "__metadata__": {"x": "y"}}
    content = bytearray(file_of(header, bytes(20)))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.sampled_from(b'0123456789{}[]",:') | st.integers(0, 255))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content)
    message = ""
    try:
        for raw in read_safetensors(path).values():
            assert raw.data.size == raw.data.nbytes
            assert raw.dense().nbytes == raw.data.nbytes
    except ModelFormatError as error:
        message = str(error)
    assert "\n" not in message


INDEXES: dict[str, tuple[object, str]] = {
    "no map": ({}, "weight_map"),
    "map kind": ({"weight_map": []}, "weight_map"),
    "outside": ({"weight_map": {"a": "../x.safetensors"}}, "not the name of a safetensors file beside it"),
    "absolute": ({"weight_map": {"a": "/x.safetensors"}}, "not the name of a safetensors file beside it"),
    "pickle": ({"weight_map": {"a": "x.bin"}}, "not the name of a safetensors file beside it"),
    "number": ({"weight_map": {"a": 3}}, "not the name of a safetensors file beside it"),
    "list": ({"weight_map": {"a": ["x"]}}, "not the name of a safetensors file beside it"),
    "absent files": (
        {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "w.safetensors"}},
        "3 files belong together; missing: y.safetensors, w.safetensors",
    ),
    "absent tensor": ({"weight_map": {"b": "x.safetensors"}}, "1 listed tensors are not in their files, 'b'"),
    "twice": ({"weight_map": {"a": "x.safetensors", "b": "z.safetensors"}}, "in more than one file"),
}


@pytest.mark.parametrize(("index", "problem"), INDEXES.values(), ids=INDEXES.keys())
def test_wrong_indexes_are_refused(tmp_path: Path, index: object, problem: str) -> None:
    for name in ("x", "z"):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelFormatError) as caught:
        read_sharded_safetensors(path)
    assert problem in str(caught.value)
