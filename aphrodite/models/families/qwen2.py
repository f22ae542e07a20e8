"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's decoder with biases on q, k and v, and windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.common import (
    COMMON_DEFAULTS,
    Family,
    decoder_from_config,
    decoder_from_gguf,
    layer_count,
)
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor


def _from_config(config: ConfigReader) -> ModelSpec:
    return decoder_from_config(config, family="qwen2", qkv_bias=True, windows=late_windows(config))


def late_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Windows of a config.json that may give them to layers from `max_window_layers` on, or layer by layer."""
    num_layers = layer_count(config)
    if not config.read("use_sliding_window", bool, False):
        return (None,) * num_layers
    window = config.read("sliding_window", int, 4096, low=1)
    kinds = config.strings("layer_types")
    if kinds:
        if len(kinds) != num_layers:
            raise config.wrong("layer_types", f"a list of {num_layers}, one a layer", kinds)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.read("max_window_layers", int, 28, low=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return decoder_from_gguf(config, tensors, family="qwen2")


QWEN2 = Family(
    name="qwen2",
    title="Qwen 1.5, 2, 2.5; QwQ",
    architectures=("Qwen2ForCausalLM",),
    from_config=_from_config,
    wrapped_by=(
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
    ),
    text_defaults={
        **COMMON_DEFAULTS,
        "intermediate_size": 22_016,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
    },
    gguf_architecture="qwen2",
    gguf_wrapped_by=("qwen2vl",),
    from_gguf=_from_gguf,
)
