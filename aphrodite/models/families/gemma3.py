"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with norms of heads instead of bounds, five windowed layers to one that
sees all, and angles of their own in the windowed ones. Of models that see images, the text part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_STORAGE
from aphrodite.models.families.common import (
    Family,
    bound_or_none,
    decoder_from_config,
    decoder_from_gguf,
    gguf_windows,
    head_dim,
    windows_by_type,
)
from aphrodite.models.families.gemma2 import (
    DEFAULT_HEAD_DIM,
    HF_GEMMA,
    gemma,
    gguf_query_scale,
    query_scale,
    refuse_bidirectional,
)
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import RawTensor

_PATTERN = 6
_THETA, _WINDOW_THETA = 1e6, 1e4
_LAYERS_27B = 62
# What transformers assumes; files of models that see images leave out what does not differ.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


def _from_config(config: ConfigReader) -> ModelSpec:
    config = config.with_defaults(_DEFAULTS)
    refuse_bidirectional(config)
    attention_bias = config.read("attention_bias", bool, False)
    dim = head_dim(config, DEFAULT_HEAD_DIM)
    rotary = rotary_from_config(config, dim, default_theta=_THETA)
    spec = decoder_from_config(
        config,
        family="gemma3_text",
        windows=windows_by_type(config, config.read("sliding_window", int, 4096, low=1), _PATTERN),
        rotary=rotary,
        default_head_dim=DEFAULT_HEAD_DIM,
        default_activation="gelu_pytorch_tanh",
        default_tied=True,
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
    return dataclasses.replace(
        gemma(spec, query_scale(config)),
        max_position=config.read("max_position_embeddings", int),  # which is the length after its scaling
        layer_rotaries=_rotaries(spec, _window_rotary(config, dim)),
        attention_softcap=bound_or_none(config, "attn_logit_softcapping", 0.0),
        logit_softcap=bound_or_none(config, "final_logit_softcapping", 0.0),
    )


def _window_rotary(config: ConfigReader, dim: int) -> RotarySpec:
    """transformers 5 has a section for it, transformers 4 a key."""
    section = config.section("rope_parameters")
    if section is not None and section.has("sliding_attention"):
        return rotary_from_config(config, dim, layer_type="sliding_attention", default_theta=_WINDOW_THETA).spec
    return RotarySpec(dim=dim, theta=config.read("rope_local_base_freq", float, _WINDOW_THETA, low=1.0, high=1e15))


def _rotaries(spec: ModelSpec, windowed: RotarySpec) -> tuple[RotarySpec, ...]:
    return tuple(spec.rotary if window is None else windowed for window in spec.windows)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config,
        tensors,
        family="gemma3_text",
        windows=gguf_windows(config, _PATTERN),
        activation="gelu_tanh",
        qk_norm=True,
    )
    theta = config.read("rope.freq_base_swa", float, _WINDOW_THETA, low=1.0, high=1e15)
    return dataclasses.replace(
        gemma(spec, gguf_query_scale(spec, _LAYERS_27B)),
        layer_rotaries=_rotaries(spec, RotarySpec(dim=spec.rotary.dim, theta=theta)),
        logit_softcap=config.read("final_logit_softcapping", float, 0.0, low=0.0, high=1e6),
    )


GEMMA3 = Family(
    name="gemma3_text",  # as model_type
    title="Gemma 3 (text)",
    architectures=("Gemma3ForCausalLM",),
    wrapped_by=("Gemma3ForConditionalGeneration",),
    from_config=_from_config,
    gguf_architecture="gemma3",
    from_gguf=_from_gguf,
    hf=HF_GEMMA,
    gguf=GGUF_STORAGE,
)
