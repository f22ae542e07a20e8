"""Rotary tables against transformers' definitions."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aphrodite.errors import ModelFormatError
from aphrodite.layers.rotary import inverse_frequencies, rotary_tables
from aphrodite.models.spec import RotarySpec

# transformers works in float32: about eight units in its last place.
TOLERANCE = {"rtol": 1e-6, "atol": 0.0}


def reference(theta: float, dim: int, max_position: int, seq_len: int | None = None, **rope: Any) -> tuple[Any, float]:
    config = LlamaConfig(
        hidden_size=dim * 4,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=max_position,
        rope_parameters={"rope_theta": theta, **rope},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq_len)
    return frequencies.double().numpy(), factor


def test_unscaled_frequencies_follow_the_paper() -> None:
    frequencies, factor = inverse_frequencies(RotarySpec(dim=8, theta=10_000.0), 16)
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, 0.001], rtol=1e-15)
    assert frequencies.dtype == np.float64
    assert factor == 1.0


@pytest.mark.parametrize("dim", [64, 128])
def test_linear_equals_transformers(dim: int) -> None:
    frequencies, factor = inverse_frequencies(RotarySpec(dim=dim, theta=5e5, scaling="linear", factor=3.0), 100)
    expected, expected_factor = reference(5e5, dim, 100, rope_type="linear", factor=3.0)
    np.testing.assert_allclose(frequencies, expected, **TOLERANCE)
    assert factor == expected_factor


@pytest.mark.parametrize("max_len", [100, 2048, 2049, 7000])
def test_dynamic_equals_transformers_at_the_longest_length(max_len: int) -> None:
    rotary = RotarySpec(dim=64, scaling="dynamic", factor=4.0, original_max_position=2048)
    frequencies, _ = inverse_frequencies(rotary, max_len)
    expected, _ = reference(10_000.0, 64, 2048, seq_len=max_len, rope_type="dynamic", factor=4.0)
    np.testing.assert_allclose(frequencies, expected, **TOLERANCE)


def test_dynamic_is_unscaled_within_the_original_context() -> None:
    rotary = RotarySpec(dim=64, scaling="dynamic", factor=4.0, original_max_position=2048)
    frequencies, _ = inverse_frequencies(rotary, 2048)
    unscaled, _ = inverse_frequencies(RotarySpec(dim=64), 2048)
    np.testing.assert_allclose(frequencies, unscaled, rtol=1e-15)


@pytest.mark.parametrize(
    ("theta", "dim", "original", "values"),
    [
        (10_000.0, 128, 4096, {"factor": 16.0}),
        (1e6, 128, 32768, {"factor": 4.0, "beta_fast": 24.0, "beta_slow": 2.0}),
        (10_000.0, 64, 64, {"factor": 1.0}),
        (10_000.0, 8, 64, {"factor": 2.0, "attention_factor": 1.25}),
        (1e6, 64, 2048, {"factor": 8.0, "beta_fast": 1.0, "beta_slow": 1.0}),
    ],
)
def test_yarn_equals_transformers(theta: float, dim: int, original: int, values: dict[str, float]) -> None:
    rotary = RotarySpec(dim=dim, theta=theta, scaling="yarn", original_max_position=original, **values)
    frequencies, factor = inverse_frequencies(rotary, 1000)
    expected, expected_factor = reference(
        theta, dim, original * 16, rope_type="yarn", original_max_position_embeddings=original, **values
    )
    np.testing.assert_allclose(frequencies, expected, **TOLERANCE)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("values", [(8.0, 1.0, 4.0), (32.0, 1.0, 4.0), (2.0, 0.5, 16.0)])
def test_llama3_equals_transformers(values: tuple[float, float, float]) -> None:
    scale, low, high = values
    rotary = RotarySpec(
        dim=128,
        theta=500_000.0,
        scaling="llama3",
        factor=scale,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=8192,
    )
    frequencies, factor = inverse_frequencies(rotary, 1000)
    expected, expected_factor = reference(
        500_000.0,
        128,
        131072,
        rope_type="llama3",
        factor=scale,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=8192,
    )
    # Blending subtracts nearly equal numbers in transformers' float32.
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    assert factor == expected_factor


def test_frequency_divisors_divide() -> None:
    divisors = (1.0, 2.0, 4.0, 8.0)
    plain, _ = inverse_frequencies(RotarySpec(dim=8), 16)
    divided, _ = inverse_frequencies(RotarySpec(dim=8, freq_divisors=divisors), 16)
    np.testing.assert_allclose(divided * divisors, plain, rtol=1e-15)


def test_tables_hold_angles_of_every_position_times_the_attention_factor() -> None:
    rotary = RotarySpec(dim=8, scaling="yarn", factor=4.0, original_max_position=512)
    cos, sin = rotary_tables(rotary, 3000)
    frequencies, factor = inverse_frequencies(rotary, 3000)
    assert cos.shape == sin.shape == (3000, 4)
    assert cos.dtype == sin.dtype == np.float32
    assert factor > 1.0
    np.testing.assert_allclose(cos[2999], factor * np.cos(2999 * frequencies), atol=1e-7)
    np.testing.assert_allclose(sin[2999], factor * np.sin(2999 * frequencies), atol=1e-7)
    np.testing.assert_allclose(cos[0], factor, rtol=1e-7)


@pytest.mark.parametrize(
    "rotary",
    [
        RotarySpec(dim=7),
        RotarySpec(dim=8, theta=float("nan")),
        RotarySpec(dim=8, scaling="linear", factor=0.0),
        RotarySpec(dim=8, scaling="dynamic", factor=2.0),
        RotarySpec(dim=8, scaling="yarn", factor=2.0),
        RotarySpec(dim=8, scaling="llama3", original_max_position=64, low_freq_factor=4.0),
        RotarySpec(dim=8, freq_divisors=(1.0,)),
        RotarySpec(dim=8, freq_divisors=(1.0, 0.0, 1.0, 1.0)),
    ],
)
def test_impossible_values_are_refused(rotary: RotarySpec) -> None:
    with pytest.raises(ModelFormatError, match="rotary embedding"):
        inverse_frequencies(rotary, 16)


def test_long_tables_take_little_memory_beside_themselves() -> None:
    rotary = RotarySpec(dim=16)
    length = 300_000
    tracemalloc.start()
    try:
        cos, sin = rotary_tables(rotary, length)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * (cos.nbytes + sin.nbytes)
    angles = (length - 1) * inverse_frequencies(rotary, length)[0]
    np.testing.assert_array_equal(cos[-1], np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin[-1], np.sin(angles).astype(np.float32))
