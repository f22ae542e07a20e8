"""What a model is, in the decoder's own terms: typed, frozen, derived once from config.json or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RotaryScaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary position embedding (arXiv 2104.09864), rotate-half pairing, with its long-context scaling.

    Fields that a scaling does not use keep their defaults.
    """

    dim: int
    theta: float = 10_000.0
    scaling: RotaryScaling = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 * ln(factor) + 1
    freq_divisors: tuple[float, ...] = ()  # per frequency, [dim / 2]; GGUF's rope_freqs tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape and kinds of a decoder-only transformer.

    `windows` has one entry a layer: how many latest positions (the current one included) a query of
    that layer sees, or None for all. With `qk_norm` every head of q and k is RMS-normalised before rotation, by one
    weight for all heads of q and one for those of k.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rotary: RotarySpec
    windows: tuple[int | None, ...]
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tied_head: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
