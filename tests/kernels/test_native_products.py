"""Products of packed rows with tiles, against float64 on exactly dequantized weights."""

from __future__ import annotations

import numpy as np
import pytest
from k_blocks import MADE, set_units
from native_harness import (
    TILED,
    available_isas,
    columns_of,
    exact_values,
    product_harness,
    random_weight,
    raw_tensor,
    step,
)

from aphrodite.kernels.cpu.program import Activation
from aphrodite.quantization.types import QuantType, RawTensor

ROWS = 53  # no multiple of a tile
OF_256 = [qtype for qtype in MADE if qtype.block_size == 256]
STEPS = {Activation.INT16: 32512, Activation.INT8: 120}

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")


def _activations(rows: int, columns: int = 96) -> np.ndarray:
    """Blocks of very different size, one of them zero."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((rows, columns)).astype(np.float32)
    x *= np.exp(generator.uniform(-6, 6, (rows, columns // 32))).repeat(32, axis=1).astype(np.float32)
    x[0, :32] = 0
    return x


def _bound(x: np.ndarray, weight: np.ndarray, kind: Activation) -> np.ndarray:
    """Half a quantization step of each activation, plus float32 rounding of the sums."""
    exact = 2e-6 * np.abs(x) @ np.abs(weight).T + 1e-30
    if kind is Activation.FLOAT32:
        return exact
    largest = np.abs(x).reshape(len(x), -1, 32).max(axis=2).repeat(32, axis=1)
    half_steps = 0.5001 * largest / STEPS[kind]
    # The minimum of a block multiplies the sum of the quants, so its share of the error is that of a weight too.
    return (
        exact
        + half_steps @ np.abs(weight).T
        + 2e-6 * largest @ (np.abs(weight).max(axis=1, keepdims=True) + 0 * weight).T
    )


def _quantized(qtype: QuantType) -> bool:
    return qtype.block_size > 1


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("qtype", TILED, ids=lambda qtype: qtype.name)
def test_product_is_exact_up_to_the_activations_rounding(qtype: QuantType, kind: Activation, isa: str) -> None:
    if kind is not Activation.FLOAT32 and not _quantized(qtype):
        pytest.skip("dense weights take float activations")
    weight = random_weight(qtype, ROWS, columns_of(qtype), 2)
    x = _activations(ROWS, columns_of(qtype))
    harness = product_harness(x, weight, kind, isa)
    exact = exact_values(weight)
    for count in (1, 2, 3, 4, 8, 15, 29):
        ids = np.random.default_rng(count).integers(0, ROWS, count)
        got = harness.run(step([(ids, 0, range(count // 16 + 1))]))
        error = np.abs(got - x[ids].astype(np.float64) @ exact.T)
        assert (error <= _bound(x[ids], exact, kind)).all(), (error / _bound(x[ids], exact, kind)).max()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize(
    "qtype",
    [
        *(QuantType.Q4_1, QuantType.Q5_0, QuantType.Q8_0, QuantType.Q2_K, QuantType.Q5_K, QuantType.Q6_K),
        *(QuantType.IQ2_XXS, QuantType.IQ1_M, QuantType.IQ3_S),
    ],
    ids=lambda qtype: qtype.name,
)
def test_rows_do_not_depend_on_their_batch(qtype: QuantType, kind: Activation, isa: str) -> None:
    weight = random_weight(qtype, ROWS, columns_of(qtype), 3)
    harness = product_harness(_activations(ROWS, columns_of(qtype)), weight, kind, isa)
    together = harness.run(step([(range(ROWS), 0, range(4))]))
    for ids in (range(1), range(1, 3), range(3, 10), range(5, 20), range(52, 53)):
        assert np.array_equal(harness.run(step([(ids, 0, range(4))])), together[list(ids)])


@pytest.mark.parametrize("isa", available_isas())
def test_extreme_quants_do_not_overflow(isa: str) -> None:
    """Largest quants against largest activations of one sign, where 16-bit intermediates would saturate."""
    for qtype in (QuantType.Q4_0, QuantType.Q5_1, QuantType.Q8_0):
        for sign in (-1.0, 1.0):
            weight = raw_tensor(np.full((32, 32), sign) * np.linspace(0.99, 1, 32), qtype)
            x = np.full((32, 32), 3.0, np.float32)
            for kind in (Activation.INT16, Activation.INT8):
                got = product_harness(x, weight, kind, isa).run(step([([0], 0, [0])]))
                np.testing.assert_allclose(got, x[:1] @ exact_values(weight).T, rtol=1e-5)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", [Activation.INT16, Activation.INT8])
@pytest.mark.parametrize("qtype", [t for t in TILED if _quantized(t)], ids=lambda qtype: qtype.name)
def test_eight_extreme_rows_are_those_of_one(qtype: QuantType, kind: Activation, isa: str) -> None:
    """Quants and activations at the ends of their ranges, where what is added to what could overflow."""
    generator = np.random.default_rng(5)
    columns = columns_of(qtype)
    signs = generator.choice([-1.0, 1.0], (16, columns))
    weight = random_weight(qtype, 16, columns, 5) if qtype in MADE else raw_tensor(signs, qtype)
    x = 3 * generator.choice([-1.0, 1.0], (8, columns)).astype(np.float32)
    x[:2] = [[-3], [3]]
    harness = product_harness(x, weight, kind, isa)
    together = harness.run(step([(range(8), 0, range(8))]))
    np.testing.assert_allclose(together, x @ exact_values(weight).T, rtol=1e-5, atol=1e-3 * np.abs(together).max())
    for row in range(8):
        assert np.array_equal(harness.run(step([([row], 0, [0])])), together[[row]])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("fill", [0, 0xFF])
@pytest.mark.parametrize("qtype", OF_256, ids=lambda qtype: qtype.name)
def test_extreme_fields_do_not_overflow(qtype: QuantType, fill: int, isa: str) -> None:
    """Every scale, minimum and quant at an end of its range, against largest activations of one sign."""
    blocks = np.full((16, qtype.block_bytes), fill, np.uint8)
    set_units(qtype, blocks, 0.01, 0.01)
    weight = RawTensor("w", (16, 256), qtype, blocks)
    for value in (-3.0, 3.0):
        x = np.full((16, 256), value, np.float32)
        for kind in (Activation.INT16, Activation.INT8):
            got = product_harness(x, weight, kind, isa).run(step([([0], 0, [0])]))
            np.testing.assert_allclose(got, x[:1] @ exact_values(weight).T, rtol=1e-5)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_reach_their_own_row_only(bad: float, kind: Activation, isa: str) -> None:
    weight = raw_tensor(np.random.default_rng(4).standard_normal((ROWS, 96)), QuantType.Q4_1)
    x = _activations(ROWS)
    clean = product_harness(x, weight, kind, isa).run(step([(range(9), 0, [0])]))
    x[5, 40] = bad
    got = product_harness(x, weight, kind, isa).run(step([(range(9), 0, [0])]))
    assert not np.isfinite(got[5]).any()
    assert np.array_equal(np.delete(got, 5, 0), np.delete(clean, 5, 0))
