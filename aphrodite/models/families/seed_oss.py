"""Seed-OSS: Llama's decoder with biases of q, k and v and heads of their own size."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_DEFAULT_HEAD_DIM = 128  # what transformers assumes when the key is absent


def _from_config(config: ConfigReader) -> ModelSpec:
    return decoder_from_config(
        config,
        family="seed_oss",
        default_head_dim=_DEFAULT_HEAD_DIM,
        qkv_bias=config.read("attention_bias", bool, True),
        output_bias=config.read("attention_out_bias", bool, False),
        mlp_bias=config.read("mlp_bias", bool, False),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return decoder_from_gguf(config, tensors, family="seed_oss")


SEED_OSS = Family(
    name="seed_oss",
    title="Seed-OSS",
    architectures=("SeedOssForCausalLM",),
    from_config=_from_config,
    gguf_architecture="seed_oss",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES.renamed(mlp_norm="post_attention_norm")),
)
