"""Llama (arXiv 2302.13971) and what shares its decoder: SmolLM2, Yi, Vicuna and most fine-tunes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import EXPERT_PLACEHOLDER, GGUF_NAMES, Storage
from aphrodite.models.families.common import COMMON_DEFAULTS, Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.families.experts import has_experts_apart, moe_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor


def _from_config(config: ConfigReader) -> ModelSpec:
    attention_bias = config.read("attention_bias", bool, False)
    return decoder_from_config(
        config,
        family="llama",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.read("mlp_bias", bool, False),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="llama", experts=True)
    if not config.read("expert_count", int, 0):
        return spec
    return dataclasses.replace(spec, family="mixtral", moe=moe_from_gguf(config, tensors, normalize=True))


def _gguf_storage(tensors: Mapping[str, RawTensor]) -> Storage:
    if not has_experts_apart(tensors):
        return _GGUF
    names = {f"expert_{part}": f"ffn_{part}.{EXPERT_PLACEHOLDER}" for part in ("gate", "up", "down")}
    return Storage(names=GGUF_NAMES.renamed(names), interleaved=True)


_GGUF = Storage(names=GGUF_NAMES, interleaved=True)
LLAMA = Family(
    name="llama",
    title="Llama 2 to 3.3, SmolLM 1 and 2, Yi, Falcon 3, DeepSeek LLM, Vicuna",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    wrapped_by=("LlavaForConditionalGeneration", "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    text_defaults={**COMMON_DEFAULTS, "intermediate_size": 11_008, "vocab_size": 32_000},
    from_config=_from_config,
    gguf_architecture="llama",
    from_gguf=_from_gguf,
    gguf=_GGUF,
    gguf_of=_gguf_storage,
)
