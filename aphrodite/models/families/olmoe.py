"""OLMoE (arXiv 2409.02060): Llama's decoder with norms of q and k over their whole width and many small experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.families.experts import moe_from_config, moe_from_gguf
from aphrodite.models.spec import ModelSpec, MoeSpec
from aphrodite.quantization.types import RawTensor


def _olmoe(spec: ModelSpec, moe: MoeSpec) -> ModelSpec:
    return dataclasses.replace(spec, moe=moe, qk_norm=True, head_norm="width")


def _from_config(config: ConfigReader) -> ModelSpec:
    clip = config.read("clip_qkv", float, None)
    if clip is not None:
        raise config.wrong("clip_qkv", "null (bounds of queries, keys and values are not supported)", clip)
    bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(config, family="olmoe", qkv_bias=bias, output_bias=bias)
    normalize = config.read("norm_topk_prob", bool, False)
    return _olmoe(spec, moe_from_config(config, normalize=normalize))


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="olmoe", experts=True)
    return _olmoe(spec, moe_from_gguf(config, tensors))


OLMOE = Family(
    name="olmoe",
    title="OLMoE",
    architectures=("OlmoeForCausalLM",),
    from_config=_from_config,
    gguf_architecture="olmoe",
    from_gguf=_from_gguf,
)
