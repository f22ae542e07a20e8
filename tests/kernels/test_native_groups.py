"""Products with groups of 4 and 8-bit integers, against float64."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from native_harness import Harness, available_isas, group_product_harness, step

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu.program import Activation, GroupKind, NativeMemory, repack_groups, tiles_bytes
from aphrodite.quantization.types import QuantType

ROWS, COLUMNS = 37, 384
TOLERANCE = {Activation.FLOAT32: 2e-6, Activation.INT16: 3e-4, Activation.INT8: 0.05}

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")


def _stored(bits: int, scales: QuantType, group: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Codes, scales and zeros as `repack_groups` takes them, and what they mean."""
    generator = np.random.default_rng(bits + group)
    codes = generator.integers(0, 1 << bits, (ROWS, COLUMNS), np.uint8)
    zeros = generator.integers(0, (1 << bits) + 1, (ROWS, COLUMNS // group)).clip(0, 255).astype(np.uint8)
    values = generator.uniform(0.5, 2.0, zeros.shape).astype(np.float32)
    if scales is QuantType.F16:
        stored = values.astype(np.float16).view(np.uint16)
        values = stored.view(np.float16).astype(np.float32)
    else:
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    meaning = (codes - zeros.astype(np.float64).repeat(group, axis=1)) * values.repeat(group, axis=1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    return (packed, stored, zeros), meaning


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


def test_groups_cost_what_their_numbers_do() -> None:
    loaded = library.load()
    assert loaded is not None
    for group in (32, 128):
        size = tiles_bytes(loaded, GroupKind(4, QuantType.F16, group), 64, 1024)
        assert size == 64 * 1024 // group * (group // 2 + 3)
    for wrong in (GroupKind(4, QuantType.F16, 48), GroupKind(4, QuantType.F32, 32), GroupKind(3, QuantType.F16, 32)):
        assert tiles_bytes(loaded, wrong, 64, 192) == 0
    assert tiles_bytes(loaded, GroupKind(4, QuantType.F16, 128), 64, 192) == 0


def test_what_does_not_belong_together_is_refused() -> None:
    loaded = library.load()
    assert loaded is not None
    kind = GroupKind(4, QuantType.F16, 64)
    (codes, scales, zeros), _ = _stored(4, QuantType.F16, 64)
    memory = NativeMemory(loaded, tiles_bytes(loaded, kind, ROWS, COLUMNS))
    damaged: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (codes[:, :100], scales, zeros),
        (codes, scales[:-1], zeros),
        (codes, scales, zeros[:, :-1]),
        (codes.view(np.int8), scales, zeros),
    ]
    for arrays in damaged:
        with pytest.raises(ValueError, match=r"no tiles|do not make|codes, scales and zeros are"):
            repack_groups(loaded, kind, *arrays, memory.address)
    assert ctypes.string_at(memory.address, 64) == bytes(64)
