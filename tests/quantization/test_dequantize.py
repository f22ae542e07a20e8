"""Dequantization of every storage type against the gguf package, bit for bit."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor

ROWS, COLUMNS = 7, 96


QUANTIZABLE = [qtype for qtype in QuantType if qtype.block_size <= 32 and qtype is not QuantType.IQ4_NL]
# float16 and, doubled, float32: zeros, subnormals, the smallest normal, 1, the largest, infinities, not a number.
EXTREMES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFFFF)


def reference(raw: RawTensor) -> np.ndarray:
    if raw.qtype is QuantType.Q8_K:  # which the gguf package names but does not dequantize
        blocks = raw.data.reshape(-1, raw.qtype.block_bytes)
        fields = [struct.unpack("<f256b", block.tobytes()[:260]) for block in blocks]
        return np.array([[np.float32(d) * np.float32(q) for q in quants] for d, *quants in fields]).reshape(raw.shape)
    kind = gguf.GGMLQuantizationType[raw.qtype.name]
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return raw.data.view("<f4" if raw.qtype is QuantType.F32 else "<f2").astype(np.float32).reshape(raw.shape)
    return gguf.quants.dequantize(raw.data, kind).reshape(raw.shape)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    finite = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~finite)
    assert np.array_equal(found.view(np.uint32)[finite], expected.view(np.uint32)[finite])


@pytest.mark.parametrize("qtype", list(QuantType))
def test_types_are_those_of_the_gguf_package(qtype: QuantType) -> None:
    kind = gguf.GGMLQuantizationType[qtype.name]
    assert qtype.gguf_id == kind.value
    assert (qtype.block_size, qtype.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("qtype", QUANTIZABLE)
def test_quantized_values_equal_the_gguf_package(qtype: QuantType) -> None:
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[qtype.name])
    raw = RawTensor("t", values.shape, qtype, np.ascontiguousarray(data).view(np.uint8).reshape(ROWS, -1))
    found = dequantize(raw)
    assert_same_bits(found, reference(raw))
    assert np.abs(found - values).max() < 0.6


@pytest.mark.parametrize("qtype", list(QuantType))
def test_any_bytes_equal_the_gguf_package(qtype: QuantType) -> None:
    """Every point of the codebooks, and more values than are expanded at a time."""
    columns, rows = (2048, 4) if qtype is QuantType.Q8_K else (2048, 150)
    data = np.random.default_rng(2).integers(0, 256, size=(rows, qtype.row_bytes(columns)), dtype=np.uint8)
    raw = RawTensor("t", (rows, columns), qtype, data)
    with np.errstate(all="ignore"):
        assert_same_bits(dequantize(raw), reference(raw))


@pytest.mark.parametrize("qtype", list(QuantType))
def test_extreme_scales_equal_the_gguf_package(qtype: QuantType) -> None:
    """Each extreme number at every place of a block, so in every field."""
    places = range(max(1, qtype.block_bytes - 1))
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, size=(len(EXTREMES), len(places), qtype.block_bytes), dtype=np.uint8)
    for index, extreme in enumerate(EXTREMES):
        for place in places:
            blocks[index, place, place : place + 2] = (extreme & 0xFF, extreme >> 8)
    if qtype is QuantType.Q8_K:
        blocks = blocks[:, :4]  # its only scale
    data = blocks.reshape(-1, qtype.block_bytes)
    raw = RawTensor("t", (len(data), qtype.block_size), qtype, data)
    with np.errstate(all="ignore"):
        assert_same_bits(dequantize(raw), reference(raw))


def test_reordered_rows_dequantize_to_reordered_values() -> None:
    data = np.random.default_rng(3).integers(0, 60, size=(ROWS, QuantType.Q5_1.row_bytes(COLUMNS)), dtype=np.uint8)
    raw = RawTensor("t", (ROWS, COLUMNS), QuantType.Q5_1, data)
    order = np.random.default_rng(4).permutation(ROWS)
    assert np.array_equal(dequantize(raw.take_rows(order)), dequantize(raw)[order])


def test_leading_dimensions_and_vectors_keep_their_shape() -> None:
    data = np.arange(2 * 3 * 34, dtype=np.uint8).reshape(6, 34)
    assert dequantize(RawTensor("t", (2, 3, 32), QuantType.Q8_0, data)).shape == (2, 3, 32)
    vector = np.array([1.5, -2.0], "<f2").view(np.uint8).reshape(1, 4)
    assert dequantize(RawTensor("t", (2,), QuantType.F16, vector)).tolist() == [1.5, -2.0]
