"""Mixtral (arXiv 2401.04088): Mistral's decoder with eight experts a layer. Its GGUF files say "llama"."""

from __future__ import annotations

import dataclasses

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import HF_NAMES, Storage
from aphrodite.models.families.common import Family, decoder_from_config, layer_count
from aphrodite.models.families.experts import moe_from_config
from aphrodite.models.families.llama import LLAMA
from aphrodite.models.spec import ModelSpec

_MODULE = "block_sparse_moe."


def _from_config(config: ConfigReader) -> ModelSpec:
    window = config.read("sliding_window", int, None, low=1)
    spec = decoder_from_config(config, family="mixtral", windows=(window,) * layer_count(config))
    return dataclasses.replace(spec, moe=moe_from_config(config, normalize=True))


MIXTRAL = Family(
    name="mixtral",
    title="Mixtral 8x7B, 8x22B",
    architectures=("MixtralForCausalLM",),
    from_config=_from_config,
    from_gguf=LLAMA.from_gguf,
    hf=Storage(
        names=HF_NAMES.renamed(
            router=_MODULE + "gate",
            expert_gate=_MODULE + "experts.{expert}.w1",
            expert_up=_MODULE + "experts.{expert}.w3",
            expert_down=_MODULE + "experts.{expert}.w2",
        )
    ),
)
