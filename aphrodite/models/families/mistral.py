"""Mistral (arXiv 2310.06825): Llama's decoder, at first with a sliding window. GGUF files of Ministral 3, whose queries
grow with their position behind the original context, say "mistral3", those of the others "llama"."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, Storage
from aphrodite.models.families.common import (
    COMMON_DEFAULTS,
    Family,
    decoder_from_config,
    decoder_from_gguf,
    layer_count,
)
from aphrodite.models.families.llama import LLAMA
from aphrodite.models.families.rotary import MAX_POSITION
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_DEFAULT_WINDOW = 4096  # what transformers assumes when the key is absent; null means none


def _from_config(config: ConfigReader) -> ModelSpec:
    newer = config.read("model_type", str, "") == "ministral3"
    window = config.read("sliding_window", int, None, low=1)
    if not newer and not config.has("sliding_window"):
        window = _DEFAULT_WINDOW
    spec = decoder_from_config(config, family="mistral", windows=(window,) * layer_count(config))
    grown = growing_queries(config, spec)
    return dataclasses.replace(grown, family="ministral3") if grown.temperature_scale else spec


def growing_queries(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """`spec` with queries that grow with their position, where a config.json's rotary embedding says so."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    scale = section.read("llama_4_scaling_beta", float, 0.0, low=0.0, high=1e3) if section is not None else 0.0
    if section is None or scale == 0.0:
        return spec
    length = section.read("original_max_position_embeddings", int, low=1, high=MAX_POSITION)
    return dataclasses.replace(spec, temperature_scale=scale, temperature_length=length)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="ministral3")
    if spec.rotary.scaling == "yarn":
        all_dims = config.read("rope.scaling.yarn_log_multiplier", float, 0.0, low=0.0, high=1e3)
        growth = 0.1 * math.log(max(spec.rotary.factor, 1.0))
        rotary = dataclasses.replace(spec.rotary, attention_factor=(1.0 + growth) / (1.0 + all_dims * growth))
        spec = dataclasses.replace(spec, rotary=rotary)
    return dataclasses.replace(
        spec,
        temperature_scale=config.read("attention.temperature_scale", float, 0.0, low=0.0, high=1e3),
        temperature_length=spec.rotary.original_max_position or spec.max_position,
    )


MISTRAL = Family(
    name="mistral",
    title="Mistral 7B, Nemo, Small, Large; Ministral 8B",
    architectures=("MistralForCausalLM",),
    wrapped_by=("Mistral3ForConditionalGeneration", "LlavaNextForConditionalGeneration"),
    text_defaults={
        **COMMON_DEFAULTS,
        "intermediate_size": 14_336,
        "vocab_size": 32_000,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    from_config=_from_config,
    from_gguf=LLAMA.from_gguf,
)
MINISTRAL3 = Family(
    name="ministral3",
    title="Ministral 3",
    architectures=("Ministral3ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="mistral3",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
