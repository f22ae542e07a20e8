"""Rotary embedding and its long-context scaling, as checkpoints describe it.

config.json holds `rope_theta` and `rope_scaling` (transformers up to 4) or `rope_parameters` with both
(transformers 5); GGUF holds `{arch}.rope.*` keys and, for llama3 scaling, a `rope_freqs` tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.spec import RotaryScaling, RotarySpec
from aphrodite.quantization.types import QuantType, RawTensor

DEFAULT_THETA = 10_000.0
MAX_POSITION = 1 << 27
_MAX_FACTOR = 1e6
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # of GGUF
_CONFIG_KINDS: dict[str, RotaryScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
    "mrope": "none",  # of models that see images; all its positions are the same within a text
}
_GGUF_KINDS: dict[str, RotaryScaling] = {"none": "none", "linear": "linear", "yarn": "yarn"}


class Rotary(NamedTuple):
    """A rotary embedding and the longest context it is made for."""

    spec: RotarySpec
    max_position: int


def rotary_from_config(
    config: ConfigReader,
    dim: int,
    *,
    layer_type: str = "full_attention",
    default_theta: float = DEFAULT_THETA,
    default_fraction: float | None = None,
) -> Rotary:
    """Rotary embedding of a config.json, and the context length with its scaling applied.

    `max_position_embeddings` is the length before scaling for "linear" and "dynamic", the length after
    it for "llama3" and "longrope"; for "yarn" checkpoints differ, so the longer reading counts.

    Args:
        dim: of a head.
        layer_type: whose rotary embedding it is, where `rope_parameters` tells kinds of layers apart.
        default_theta: where the key is absent.
        default_fraction: of a head that turns, where the key is absent; None means that the family turns whole heads.

    Raises:
        ModelFormatError: an unknown scaling, or a value that is missing, mistyped or out of bounds.
    """
    max_position = config.read("max_position_embeddings", int, 2048, low=1, high=MAX_POSITION)
    # transformers reads the old name first where both are present.
    section = config.section("rope_scaling") or config.section("rope_parameters")
    if section is not None and section.has(layer_type):
        section = section.section(layer_type)
    theta = config.read("rope_theta", float, default_theta, low=1.0, high=1e15)
    dim = _turning(config, section, dim, default_fraction)
    if section is None:
        return Rotary(RotarySpec(dim=dim, theta=theta), max_position)
    theta = section.read("rope_theta", float, theta, low=1.0, high=1e15)
    kind = section.choice("rope_type" if section.has("rope_type") else "type", _CONFIG_KINDS, "default")
    if kind != "none" and section.has("short_factor"):  # Phi-3's first files say "su" or "yarn"
        kind = "longrope"
    original = section.read("original_max_position_embeddings", int, max_position, low=1, high=MAX_POSITION)
    if kind == "none":
        return Rotary(RotarySpec(dim=dim, theta=theta), max_position)
    if kind == "yarn":
        return _yarn(section, dim=dim, theta=theta, original=original, max_position=max_position)
    if kind == "longrope":
        original = config.read("original_max_position_embeddings", int, original, low=1, high=MAX_POSITION)
        return _longrope(section, dim=dim, theta=theta, original=original, max_position=max_position)
    factor = section.read("factor", float, low=1.0, high=_MAX_FACTOR)
    if kind == "llama3":
        low = section.read("low_freq_factor", float, low=1e-6, high=_MAX_FACTOR)
        return Rotary(
            RotarySpec(
                dim=dim,
                theta=theta,
                scaling="llama3",
                factor=factor,
                original_max_position=original,
                low_freq_factor=low,
                high_freq_factor=section.read("high_freq_factor", float, low=low + 1e-6, high=_MAX_FACTOR),
            ),
            max_position,
        )
    spec = RotarySpec(dim=dim, theta=theta, scaling=kind, factor=factor, original_max_position=max_position)
    return Rotary(spec, _stretched(max_position, factor))


def _longrope(section: ConfigReader, *, dim: int, theta: float, original: int, max_position: int) -> Rotary:
    """LongRoPE (arXiv 2402.13753): a divisor for every frequency, others within the original context."""
    factor = section.read("factor", float, max_position / original, low=1e-3, high=_MAX_FACTOR)
    default = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
    spec = RotarySpec(
        dim=dim,
        theta=theta,
        scaling="longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=section.read("attention_factor", float, default, low=1e-3, high=1e3),
        freq_divisors=_factors(section, "long_factor", dim),
        short_divisors=_factors(section, "short_factor", dim),
    )
    return Rotary(spec, max_position)


def _factors(section: ConfigReader, key: str, dim: int) -> tuple[float, ...]:
    found = section.numbers(key, low=1e-6, high=_MAX_FACTOR)
    if len(found) != dim // 2:
        raise section.wrong(key, f"a list of {dim // 2} numbers, one a frequency", found)
    return tuple(found)


def _yarn(section: ConfigReader, *, dim: int, theta: float, original: int, max_position: int) -> Rotary:
    """YaRN (arXiv 2309.00071), with DeepSeek's `mscale` pair folded into the attention factor."""
    factor = section.read("factor", float, None, low=1.0, high=_MAX_FACTOR) or max(1.0, max_position / original)
    attention_factor = section.read("attention_factor", float, None, low=1e-3, high=1e3)
    mscale = section.read("mscale", float, None, low=0.0, high=1e3)
    mscale_all_dim = section.read("mscale_all_dim", float, None, low=0.0, high=1e3)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all_dim * math.log(factor) + 1.0)
    spec = RotarySpec(
        dim=dim,
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=section.read("beta_fast", float, 32.0, low=0.0, high=1e6) or 32.0,
        beta_slow=section.read("beta_slow", float, 1.0, low=0.0, high=1e6) or 1.0,
        truncate=section.read("truncate", bool, True),
        attention_factor=attention_factor,
    )
    return Rotary(spec, max(max_position, _stretched(original, factor)))


def _turning(config: ConfigReader, section: ConfigReader | None, dim: int, default_fraction: float | None) -> int:
    """How many of a head's `dim` dimensions turn."""
    reader = section if section is not None and section.has("partial_rotary_factor") else config
    if default_fraction is None:
        fraction = reader.read("partial_rotary_factor", float, 1.0)
        if fraction != 1.0:
            raise reader.wrong("partial_rotary_factor", "1 (this family rotates whole heads)", fraction)
        return dim
    fraction = reader.read("partial_rotary_factor", float, default_fraction, low=0.0, high=1.0)
    turning = int(dim * fraction)
    if turning < 2 or turning % 2:
        raise reader.wrong("partial_rotary_factor", f"a fraction that takes an even part of {dim} dimensions", fraction)
    return turning


def rotary_from_gguf(
    config: ConfigReader, tensors: Mapping[str, RawTensor], dim: int, *, partial: bool = False
) -> Rotary:
    """Rotary embedding of GGUF metadata; `config` reads the architecture's own keys.

    Args:
        dim: of a head.
        partial: a part of a head may turn.

    Raises:
        ModelFormatError: an unknown scaling, or a value that is missing, mistyped or out of bounds.
    """
    context = config.read("context_length", int, low=1, high=MAX_POSITION)
    rotated = config.read("rope.dimension_count", int, dim, low=2, high=1 << 20)
    if rotated != dim and not (partial and rotated < dim and rotated % 2 == 0):
        expected = f"{dim} (this family rotates whole heads)" if not partial else f"an even part of {dim}"
        raise config.wrong("rope.dimension_count", expected, rotated)
    dim = rotated
    if "rope_factors_long.weight" in tensors:
        return _gguf_longrope(config, tensors, dim, context)
    kind = config.choice("rope.scaling.type", _GGUF_KINDS, "none")
    factor = config.read("rope.scaling.factor", float, 0.0, low=0.0, high=_MAX_FACTOR)
    old_factor = config.read("rope.scale_linear", float, 0.0, low=0.0, high=_MAX_FACTOR)
    if old_factor and not config.has("rope.scaling.type"):
        kind, factor = "linear", factor or old_factor
    factor = factor or 1.0  # llama.cpp reads 0 as "not scaled"
    if kind == "none":
        factor = 1.0
    original = config.read("rope.scaling.original_context_length", int, context, low=1, high=MAX_POSITION)
    spec = RotarySpec(
        dim=dim,
        theta=config.read("rope.freq_base", float, DEFAULT_THETA, low=1.0, high=1e15),
        scaling=kind,
        factor=factor,
        original_max_position=original if kind != "none" else 0,
        beta_fast=config.read("rope.scaling.yarn_beta_fast", float, 32.0, low=1e-6, high=1e6),
        beta_slow=config.read("rope.scaling.yarn_beta_slow", float, 1.0, low=1e-6, high=1e6),
        attention_factor=_gguf_attention_factor(config, factor) if kind == "yarn" else None,
        freq_divisors=_freq_divisors(config, tensors, "rope_freqs.weight", dim),
    )
    return Rotary(spec, max(context, _stretched(original, factor)) if kind == "yarn" else context)


def _gguf_attention_factor(config: ConfigReader, factor: float) -> float | None:
    """What YaRN multiplies queries and keys by; None is the paper's factor.

    `yarn_attn_factor` is the `attention_factor` of the config.json that was converted, thus all of it (a 1 there stems
    from another key, and llama.cpp takes the paper's); `attn_factor` is one beside the paper's.
    """
    extrapolation = config.read("rope.scaling.yarn_ext_factor", float, 1.0)
    if extrapolation != 1.0:
        raise config.wrong("rope.scaling.yarn_ext_factor", "1", extrapolation)
    whole = config.read("rope.scaling.yarn_attn_factor", float, 1.0, low=1e-3, high=1e3)
    own = config.read("rope.scaling.attn_factor", float, None, low=1e-3, high=1e3)
    if whole != 1.0:
        return whole
    return None if own is None else own * (0.1 * math.log(factor) + 1.0)


def _gguf_longrope(config: ConfigReader, tensors: Mapping[str, RawTensor], dim: int, context: int) -> Rotary:
    original = config.read("rope.scaling.original_context_length", int, context, low=1, high=MAX_POSITION)
    spec = RotarySpec(
        dim=dim,
        theta=config.read("rope.freq_base", float, DEFAULT_THETA, low=1.0, high=1e15),
        scaling="longrope",
        factor=context / original,
        original_max_position=original,
        attention_factor=config.read("rope.scaling.attn_factor", float, 1.0, low=1e-3, high=1e3),
        freq_divisors=_freq_divisors(config, tensors, "rope_factors_long.weight", dim),
        short_divisors=_freq_divisors(config, tensors, "rope_factors_short.weight", dim),
    )
    return Rotary(spec, context)


def _freq_divisors(config: ConfigReader, tensors: Mapping[str, RawTensor], name: str, dim: int) -> tuple[float, ...]:
    raw = tensors.get(name)
    if raw is None:
        return ()
    if raw.qtype is not QuantType.F32 or raw.shape != (dim // 2,):
        raise config.wrong(f"tensor {name}", f"F32 of {dim // 2}", f"{raw.qtype.name} {list(raw.shape)}")
    divisors = np.ascontiguousarray(raw.data).view("<f4")[0]
    if not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise config.wrong(f"tensor {name}", "positive and finite", "not")
    return tuple(divisors.tolist())


def _stretched(length: int, factor: float) -> int:
    return min(int(length * factor), MAX_POSITION)
