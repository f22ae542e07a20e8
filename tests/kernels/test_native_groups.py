"""Products with groups of 4 and 8-bit integers, against float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from native_harness import Harness, available_isas, group_product_harness, step

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu.program import (
    Activation,
    Codes,
    GroupArrays,
    GroupKind,
    NativeMemory,
    repack_groups,
    tiles_bytes,
)
from aphrodite.quantization.packed import e4m3_values
from aphrodite.quantization.types import QuantType

ROWS, COLUMNS = 37, 384
TOLERANCE = {Activation.FLOAT32: 2e-6, Activation.INT16: 3e-4, Activation.INT8: 0.05}

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")


def _stored(bits: int, scales: QuantType, group: int) -> tuple[GroupArrays, np.ndarray]:
    """Integers as `repack_groups` takes them, and what they mean."""
    generator = np.random.default_rng(bits + group)
    codes = generator.integers(0, 1 << bits, (ROWS, COLUMNS), np.uint8)
    zeros = generator.integers(0, (1 << bits) + 1, (ROWS, COLUMNS // group)).clip(0, 255).astype(np.uint8)
    stored, values = _scales(scales, zeros.shape)
    meaning = (codes - zeros.astype(np.float64).repeat(group, axis=1)) * values.repeat(group, axis=1)
    return GroupArrays(_packed(codes, bits), stored, zeros), meaning


def _scales(qtype: QuantType, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """As they are stored, and their values."""
    values = np.random.default_rng(7).uniform(0.5, 2.0, shape).astype(np.float32)
    if qtype is QuantType.F32:
        return values, values
    if qtype is QuantType.F16:
        stored = values.astype(np.float16).view(np.uint16)
        return stored, stored.view(np.float16).astype(np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize(
    ("bits", "scales", "group"),
    [
        (4, QuantType.F16, 32),
        (4, QuantType.F16, 128),
        (4, QuantType.BF16, 384),
        (8, QuantType.BF16, 384),
        (8, QuantType.F16, 64),
        (2, QuantType.F16, 64),
        (2, QuantType.BF16, 32),
        (3, QuantType.F16, 128),
        (3, QuantType.BF16, 384),
        (4, QuantType.F32, 64),
        (8, QuantType.F32, 384),
    ],
)
def test_products_are_those_of_the_definition(
    bits: int, scales: QuantType, group: int, kind: Activation, isa: str
) -> None:
    arrays, meaning = _stored(bits, scales, group)
    x = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    harness: Harness = group_product_harness(x, GroupKind(bits, scales, group), arrays, kind, isa)
    scale = np.abs(x).max() * np.abs(meaning).max() * COLUMNS**0.5
    for count in (1, 2, 5, 13):
        ids = np.random.default_rng(count).integers(0, ROWS, count).tolist()
        got = harness.run(step([(ids, 0, [0])]))
        assert np.abs(got - x[ids].astype(np.float64) @ meaning.T).max() < TOLERANCE[kind] * scale


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("scales", [QuantType.F16, QuantType.F32], ids=lambda qtype: qtype.name)
def test_codes_of_a_table_are_its_numbers(scales: QuantType, isa: str) -> None:
    generator = np.random.default_rng(9)
    table = generator.standard_normal(16).astype(np.float32)
    codes = generator.integers(0, 16, (ROWS, COLUMNS), np.uint8)
    stored, values = _scales(scales, (ROWS, COLUMNS // 64))
    arrays = GroupArrays(_packed(codes, 4), stored, table=table)
    _assert_floats(GroupKind(4, scales, 64, Codes.TABLE), arrays, table[codes] * values.repeat(64, axis=1), isa)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("group", [128, COLUMNS])
def test_floats_of_8_bits_are_those_of_the_specification(group: int, isa: str) -> None:
    codes = np.random.default_rng(10).integers(0, 256, (ROWS, COLUMNS), np.uint8)
    codes[codes & 127 == 127] = 0
    codes[0, :254] = np.delete(np.arange(256), [127, 255])
    stored, values = _scales(QuantType.F32, (ROWS, COLUMNS // group))
    meaning = e4m3_values()[codes] * values.repeat(group, axis=1)
    _assert_floats(GroupKind(8, QuantType.F32, group, Codes.FLOAT8), GroupArrays(codes, stored), meaning, isa)


def _assert_floats(kind: GroupKind, arrays: GroupArrays, meaning: np.ndarray, isa: str) -> None:
    """Products of any number of rows, which do not depend on it."""
    x = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    harness = group_product_harness(x, kind, arrays, Activation.FLOAT32, isa)
    together = harness.run(step([(range(ROWS), 0, range(3))]))
    bound = 2e-6 * np.abs(x) @ np.abs(meaning).T.astype(np.float64)
    assert (np.abs(together - x.astype(np.float64) @ meaning.T) <= bound).all()
    for ids in ([0], [3, 4], [30, 5, 9, 2]):
        assert np.array_equal(harness.run(step([(ids, 0, [0])])), together[ids])


def test_groups_cost_what_their_numbers_do() -> None:
    loaded = library.load()
    assert loaded is not None
    for group in (32, 128):
        size = tiles_bytes(loaded, GroupKind(4, QuantType.F16, group), 64, 1024)
        assert size == 64 * 1024 // group * (group // 2 + 3)
    assert tiles_bytes(loaded, GroupKind(2, QuantType.F16, 64), 64, 1024) == 64 * 1024 // 64 * (16 + 3)
    assert tiles_bytes(loaded, GroupKind(3, QuantType.F16, 128), 64, 1024) == 64 * 1024 // 128 * (48 + 3)
    assert tiles_bytes(loaded, GroupKind(8, QuantType.F32, 128, Codes.FLOAT8), 64, 1024) == 64 * 1024 // 128 * (128 + 4)
    table = tiles_bytes(loaded, GroupKind(4, QuantType.F16, 64, Codes.TABLE), 64, 1024)
    assert table == 64 * 1024 // 64 * (32 + 2) + 4 * 64
    for wrong in (GroupKind(4, QuantType.F16, 48), GroupKind(2, QuantType.F32, 32), GroupKind(6, QuantType.F16, 32)):
        assert tiles_bytes(loaded, wrong, 64, 192) == 0
    assert tiles_bytes(loaded, GroupKind(4, QuantType.F16, 128), 64, 192) == 0


def test_what_does_not_belong_together_is_refused() -> None:
    loaded = library.load()
    assert loaded is not None
    kind = GroupKind(4, QuantType.F16, 64)
    arrays, _ = _stored(4, QuantType.F16, 64)
    codes, scales, zeros, _ = arrays
    assert zeros is not None
    memory = NativeMemory(loaded, tiles_bytes(loaded, kind, ROWS, COLUMNS))
    damaged = [
        GroupArrays(codes[:, :100], scales, zeros),
        GroupArrays(codes, scales[:-1], zeros),
        GroupArrays(codes, scales, zeros[:, :-1]),
        GroupArrays(codes.view(np.int8), scales, zeros),
        GroupArrays(codes, scales, None),
        GroupArrays(codes, scales, zeros, np.zeros(16, np.float32)),
    ]
    for wrong in damaged:
        with pytest.raises(ValueError, match=r"no tiles|do not make|codes, scales, zeros and table are"):
            repack_groups(loaded, kind, wrong, memory.address)
    assert ctypes.string_at(memory.address, 64) == bytes(64)
