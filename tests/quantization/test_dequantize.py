"""Dequantization against the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor

ROWS, COLUMNS = 7, 96


def reference(raw: RawTensor) -> np.ndarray:
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
def test_quantized_values_equal_the_gguf_package(qtype: QuantType) -> None:
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[qtype.name])
    raw = RawTensor("t", values.shape, qtype, np.ascontiguousarray(data).view(np.uint8).reshape(ROWS, -1))
    found = dequantize(raw)
    assert_same_bits(found, reference(raw))
    assert np.abs(found - values).max() < 0.5


@pytest.mark.parametrize("qtype", list(QuantType))
def test_any_bytes_equal_the_gguf_package(qtype: QuantType) -> None:
    """Every scale, subnormal and negative ones included, and every quant."""
    columns = 32 * 64
    data = np.random.default_rng(2).integers(0, 256, size=(64, qtype.row_bytes(columns)), dtype=np.uint8)
    raw = RawTensor("t", (64, columns), qtype, data)
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
