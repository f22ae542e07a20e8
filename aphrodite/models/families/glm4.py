"""GLM-4 (arXiv 2406.12793): half of each head turns, in neighbouring dimensions; gate and up are one tensor. The models
of 2025 (GLM-4-0414) have norms on both sides of attention and feed-forward, those of 2024 only before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, NameTable, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf, head_dim
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_TURNING = 0.5  # what transformers assumes
_HEAD_DIM = 128
_HF_NAMES = HF_NAMES.renamed(gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
_GGUF_NAMES = GGUF_NAMES.renamed(gate="ffn_up", up="ffn_up")


def _read(config: ConfigReader, family: str) -> ModelSpec:
    return decoder_from_config(
        config,
        family=family,
        rotary=rotary_from_config(config, head_dim(config, _HEAD_DIM), default_fraction=_TURNING),
        default_head_dim=_HEAD_DIM,
        qkv_bias=config.read("attention_bias", bool, True),
    )


def _glm_from_config(config: ConfigReader) -> ModelSpec:
    return _read(config, "glm")


def _glm4_from_config(config: ConfigReader) -> ModelSpec:
    return dataclasses.replace(_read(config, "glm4"), block="sandwich")


def _glm_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="glm", partial_rotary=True)
    return dataclasses.replace(spec, qkv_bias="blk.0.attn_qkv.bias" in tensors)


def _glm4_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="glm4", partial_rotary=True)
    return dataclasses.replace(spec, block="sandwich")


def _interleaved(names: NameTable) -> Storage:
    return Storage(names=names, interleaved=True)


GLM = Family(
    name="glm",
    title="GLM-4 (2024)",
    architectures=("GlmForCausalLM",),
    from_config=_glm_from_config,
    gguf_architecture="chatglm",
    from_gguf=_glm_from_gguf,
    hf=_interleaved(_HF_NAMES),
    gguf=_interleaved(_GGUF_NAMES.renamed(q="attn_qkv", k="attn_qkv", v="attn_qkv")),
)
GLM4 = Family(
    name="glm4",
    title="GLM-4-0414, GLM-Z1",
    architectures=("Glm4ForCausalLM",),
    wrapped_by=("Glm4vForConditionalGeneration",),
    from_config=_glm4_from_config,
    gguf_architecture="glm4",
    from_gguf=_glm4_from_gguf,
    hf=_interleaved(_HF_NAMES.renamed(attn_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm")),
    gguf=_interleaved(_GGUF_NAMES),
)
