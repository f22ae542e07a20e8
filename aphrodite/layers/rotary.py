"""Rotary position embedding: frequencies and cos/sin tables, without torch.

Rotary embedding is arXiv 2104.09864; YaRN is arXiv 2309.00071; linear interpolation arXiv 2306.15595;
LongRoPE is arXiv 2402.13753; "dynamic NTK" and "llama3" follow the definitions that checkpoints name by these words in
config.json.
Every executor reads the same tables, so positions mean the same thing on every device.
"""

from __future__ import annotations

import math

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.models.spec import ModelSpec, RotarySpec

_POSITIONS = 32_768  # of a table that are formed at a time, for in float64 they take several times its memory


def inverse_frequencies(rotary: RotarySpec, max_len: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of dimensions, and the factor that multiplies cos and sin.

    Only "dynamic" and "longrope" look at `max_len`, the longest context that will be served: the base is stretched
    once for that length, or the long divisors are taken, if it exceeds the original context. (The original recipes
    go by the current length, which would make keys already cached disagree with later queries and a request's tokens
    depend on how its prompt was cut into chunks.)

    Returns:
        float64 `[dim / 2]` in radians per position, and the attention factor (1.0 except for YaRN and LongRoPE).

    Raises:
        ModelFormatError: the scaling lacks a value that it needs, or has an impossible one.
    """
    _check(rotary)
    attention_factor = 1.0
    match rotary.scaling:
        case "none":
            frequencies = _unscaled(rotary.theta, rotary.dim)
        case "linear":
            frequencies = _unscaled(rotary.theta, rotary.dim) / rotary.factor
        case "dynamic":
            frequencies = _unscaled(_dynamic_base(rotary, max_len), rotary.dim)
        case "llama3":
            frequencies = _llama3(rotary)
        case "yarn":
            frequencies = _yarn(rotary)
            attention_factor = _yarn_attention_factor(rotary)
        case "longrope":
            frequencies = _unscaled(rotary.theta, rotary.dim)
            attention_factor = rotary.attention_factor or 1.0
    short = rotary.scaling == "longrope" and max_len <= rotary.original_max_position
    divisors = rotary.short_divisors if short else rotary.freq_divisors
    if divisors:
        frequencies = frequencies / np.asarray(divisors, dtype=np.float64)
    return frequencies, attention_factor


def rotary_tables(rotary: RotarySpec, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for positions 0 .. `max_len` - 1, the attention factor folded in.

    Angles are formed in float64, so late positions keep their precision.

    Returns:
        (cos, sin), both float32 `[max_len, dim / 2]`.
    """
    frequencies, attention_factor = inverse_frequencies(rotary, max_len)
    cos, sin = (np.empty((max_len, len(frequencies)), np.float32) for _ in range(2))
    for first in range(0, max_len, _POSITIONS):
        piece = slice(first, min(first + _POSITIONS, max_len))
        angles = np.outer(np.arange(piece.start, piece.stop, dtype=np.float64), frequencies)
        cos[piece] = np.cos(angles) * attention_factor
        sin[piece] = np.sin(angles) * attention_factor
    return cos, sin


def query_scales(spec: ModelSpec, max_len: int) -> np.ndarray | None:
    """float32 `[max_len]`, what a query is multiplied by at each position; None where queries do not grow."""
    if not spec.temperature_scale:
        return None
    lengths = np.arange(max_len, dtype=np.float64) // spec.temperature_length
    scales: np.ndarray = (1.0 + spec.temperature_scale * np.log1p(lengths)).astype(np.float32)
    return scales


def _unscaled(theta: float, dim: int) -> np.ndarray:
    return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def _dynamic_base(rotary: RotarySpec, max_len: int) -> float:
    length = max(max_len, rotary.original_max_position)
    stretch = rotary.factor * length / rotary.original_max_position - (rotary.factor - 1.0)
    return float(rotary.theta * stretch ** (rotary.dim / (rotary.dim - 2)))


def _llama3(rotary: RotarySpec) -> np.ndarray:
    """Long waves are slowed down by `factor`, short ones kept, those between blended linearly."""
    frequencies = _unscaled(rotary.theta, rotary.dim)
    turns = rotary.original_max_position * frequencies / (2.0 * math.pi)  # within the original context
    kept = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / rotary.factor)


def _yarn(rotary: RotarySpec) -> np.ndarray:
    """Blend over the dimension index, between the dimensions that turn `beta_fast` and `beta_slow` times."""
    frequencies = _unscaled(rotary.theta, rotary.dim)
    low, high = (_dimension_of_turns(rotary, turns) for turns in (rotary.beta_fast, rotary.beta_slow))
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rotary.dim - 1.0)
    width = high - low if high != low else 0.001  # a step, without a division by zero
    slowed: np.ndarray = np.clip((np.arange(rotary.dim // 2) - low) / width, 0.0, 1.0)
    return frequencies * (1.0 - slowed + slowed / rotary.factor)


def _dimension_of_turns(rotary: RotarySpec, turns: float) -> float:
    """The (fractional) frequency index that makes `turns` full turns over the original context."""
    wavelength_ratio = rotary.original_max_position / (turns * 2.0 * math.pi)
    return rotary.dim * math.log(wavelength_ratio) / (2.0 * math.log(rotary.theta))


def _yarn_attention_factor(rotary: RotarySpec) -> float:
    if rotary.attention_factor is not None:
        return rotary.attention_factor
    return 0.1 * math.log(rotary.factor) + 1.0 if rotary.factor > 1.0 else 1.0


def _check(rotary: RotarySpec) -> None:
    def refuse(problem: str) -> ModelFormatError:
        return ModelFormatError(f"rotary embedding: {problem}; the checkpoint's configuration is incomplete or damaged")

    if rotary.dim < 2 or rotary.dim % 2:
        raise refuse(f"dimension must be even and positive, not {rotary.dim}")
    if not (math.isfinite(rotary.theta) and rotary.theta > 0.0):
        raise refuse(f"theta must be positive, not {rotary.theta}")
    if not (math.isfinite(rotary.factor) and rotary.factor > 0.0):
        raise refuse(f"scaling factor must be positive, not {rotary.factor}")
    if rotary.scaling in ("dynamic", "yarn", "llama3", "longrope") and rotary.original_max_position < 1:
        raise refuse(f'"{rotary.scaling}" scaling needs the original context length')
    if rotary.scaling == "dynamic" and rotary.dim == 2:
        raise refuse('"dynamic" scaling needs more than two dimensions')
    if rotary.scaling == "yarn" and (rotary.theta == 1.0 or min(rotary.beta_fast, rotary.beta_slow) <= 0.0):
        raise refuse('"yarn" scaling needs theta other than 1 and positive beta_fast and beta_slow')
    if rotary.scaling == "llama3" and rotary.high_freq_factor <= rotary.low_freq_factor:
        raise refuse('"llama3" scaling needs high_freq_factor above low_freq_factor')
    if rotary.scaling == "longrope" and not (rotary.freq_divisors and rotary.short_divisors):
        raise refuse('"longrope" scaling needs a long and a short factor for every frequency')
    for divisors in (rotary.freq_divisors, rotary.short_divisors):
        if divisors and len(divisors) != rotary.dim // 2:
            raise refuse(f"{len(divisors)} frequency divisors for {rotary.dim // 2} frequencies")
        if any(not math.isfinite(divisor) or divisor == 0.0 for divisor in divisors):
            raise refuse("a frequency divisor is zero or not finite")
