"""The GGUF reader against the gguf package, and against files that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphrodite.errors import ModelFormatError
from aphrodite.loading.gguf import GGUFStrings, read_gguf, read_gguf_metadata


def assert_equals_reference(path: Path) -> None:
    ours, reference = read_gguf(path), gguf.GGUFReader(path)
    expected = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(expected)
    for key, value in ours.metadata.items():
        found = list(value) if isinstance(value, np.ndarray | GGUFStrings) else value
        assert found == expected[key], key
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        raw = ours.tensors[tensor.name]
        assert raw.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert raw.qtype.name == tensor.tensor_type.name
        assert raw.data.tobytes() == tensor.data.tobytes()


def test_real_model_reads_like_the_gguf_package(real_model: Path) -> None:
    assert_equals_reference(real_model)


def test_every_value_kind_reads_like_the_gguf_package(small_gguf: Path) -> None:
    assert_equals_reference(small_gguf)
    assert read_gguf_metadata(small_gguf).keys() == read_gguf(small_gguf).metadata.keys()


def test_string_arrays_behave_as_sequences(small_gguf: Path) -> None:
    strings = read_gguf(small_gguf).metadata["test.strings"]
    assert isinstance(strings, GGUFStrings)
    assert len(strings) == 4
    assert strings[2] == "語"
    assert strings[:2] == ["a", ""]
    assert list(strings) == strings.tolist()


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def header(*, version: int = 3, tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def key(name: str, type_id: int, value: bytes) -> bytes:
    return gguf_string(name) + struct.pack("<I", type_id) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (32,), type_id: int = 0, offset: int = 0) -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


U64 = struct.Struct("<Q").pack
DAMAGED = {
    "empty": (b"", "empty"),
    "magic": (header(magic=b"GGML"), "not a GGUF file"),
    "short": (b"GGUF\x03", "ends inside"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (header(version=0x03000000), "big-endian"),
    "keys": (header(keys=2**63), "number of metadata keys"),
    "tensors": (header(tensors=2**63), "number of tensors"),
    "truncated key": (header(keys=1) + U64(4) + b"ab", "ends inside a metadata key"),
    "huge key": (header(keys=1) + U64(2**64 - 1), "length of a metadata key"),
    "key not text": (header(keys=1) + gguf_string(b"\xff\xfe"), "UTF-8"),
    "duplicate key": (header(keys=2) + key("k", 4, b"\1\0\0\0") * 2, "appears twice"),
    "value type": (header(keys=1) + key("k", 13, b"\0" * 8), "unknown value type 13"),
    "bool": (header(keys=1) + key("k", 7, b"\2"), "neither true nor false"),
    "huge string": (header(keys=1) + key("k", 8, U64(2**40)), "length of metadata 'k'"),
    "string not text": (header(keys=1) + key("k", 8, gguf_string(b"\xc3")), "UTF-8"),
    "array length": (header(keys=1) + key("k", 9, struct.pack("<IQ", 4, 2**62)), "ends inside metadata 'k'"),
    "strings": (header(keys=1) + key("k", 9, struct.pack("<IQ", 8, 2**62)), "claims"),
    "strings cut": (
        header(keys=1) + key("k", 9, struct.pack("<IQ", 8, 2) + U64(8) + b"\0" * 8),
        "ends inside metadata 'k'",
    ),
    "string in array": (header(keys=1) + key("k", 9, struct.pack("<IQ", 8, 1) + U64(2**64 - 1)), "ends inside"),
    "nested array": (header(keys=1) + key("k", 9, struct.pack("<IQ", 9, 1)), "array of arrays"),
    "alignment 0": (header(keys=1) + key("general.alignment", 4, struct.pack("<I", 0)), "power of two"),
    "alignment 48": (header(keys=1) + key("general.alignment", 4, struct.pack("<I", 48)), "power of two"),
    "alignment 2^31": (header(keys=1) + key("general.alignment", 4, struct.pack("<I", 2**31)), "power of two"),
    "alignment text": (header(keys=1) + key("general.alignment", 8, gguf_string("32")), "power of two"),
    "no dimensions": (header(tensors=1) + tensor(shape=()), "0 dimensions"),
    "dimensions": (header(tensors=1) + gguf_string("t") + struct.pack("<I", 2**32 - 1), "4294967295 dimensions"),
    "zero size": (header(tensors=1) + tensor(shape=(0, 4)), "impossible"),
    "columns": (header(tensors=1) + tensor(shape=(33,), type_id=8), "impossible for Q8_0"),
    "overflow": (header(tensors=1) + tensor(shape=(2**63, 2**63, 2, 2)), "but the file has"),
    "offset": (header(tensors=1) + tensor(offset=2**64 - 32), "but the file has"),
    "misaligned": (header(tensors=1) + tensor(offset=8) + b"\0" * 500, "not a multiple of 32"),
    "cut data": (header(tensors=1) + tensor() + b"\0" * 100, "but the file has"),
    "duplicate tensor": (header(tensors=2) + tensor() * 2 + b"\0" * 500, "appears twice"),
    "known other type": (header(tensors=1) + tensor(type_id=40), "NVFP4"),
    "unknown type": (header(tensors=1) + tensor(type_id=999), "unknown type 999"),
}


@pytest.mark.parametrize(("data", "problem"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFormatError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert problem in message
    assert str(path) in message
    assert "\n" not in message


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4000000000\n")
    with pytest.raises(ModelFormatError, match="a Git LFS pointer, not the file itself; run git lfs pull"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("type_id", "name"), [(31, "Q4_0_4_4"), (139, "ik_llama.cpp's type 139"), (77, "unknown type 77")]
)
def test_types_that_are_not_supported_are_named(tmp_path: Path, type_id: int, name: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(tensors=1) + tensor(type_id=type_id))
    with pytest.raises(ModelFormatError, match=f"tensor 't' is stored as {name}, which is not supported"):
        read_gguf(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"missing\.gguf: No such file"):
        read_gguf(tmp_path / "missing.gguf")


def test_an_undecodable_token_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "tokens.gguf"
    strings = struct.pack("<IQ", 8, 2) + gguf_string("ok") + gguf_string(b"\xf0\x9f")
    path.write_bytes(header(keys=1) + key("tokens", 9, strings))
    tokens = read_gguf_metadata(path)["tokens"]
    assert isinstance(tokens, GGUFStrings)
    with pytest.raises(ModelFormatError, match="'tokens': string 1 is not valid UTF-8"):
        tokens.tolist()


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_raise_only_format_errors(small_gguf: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(small_gguf.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    mutated = tmp_path / "mutated.gguf"
    mutated.write_bytes(content)
    message = ""
    try:
        file = read_gguf(mutated)
        for value in file.metadata.values():
            if isinstance(value, GGUFStrings):
                value.tolist()
        sum(int(raw.data.sum()) for raw in file.tensors.values())
    except ModelFormatError as error:
        message = str(error)
    assert "\n" not in message
