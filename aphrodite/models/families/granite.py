"""Granite 3 and 4 dense (IBM): Llama's decoder with four multipliers.

x + m * f(norm(x)) is Llama's x' + f(norm(x')) of x' = x / m: a norm does not see the scale of its input, once its
epsilon is divided by m * m. So m becomes part of the embeddings' scale, and layers need no multiplier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_LOW, _HIGH = 1e-6, 1e6


def _scaled(spec: ModelSpec, *, embedding: float, attention: float, residual: float, logits: float) -> ModelSpec:
    """`logits` divides them."""
    return dataclasses.replace(
        spec,
        embedding_scale=embedding / residual,
        attention_scale=attention,
        norm_eps=spec.norm_eps / residual**2,
        logit_scale=1.0 / logits,
    )


def _from_config(config: ConfigReader) -> ModelSpec:
    attention_bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(
        config,
        family="granite",
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.read("mlp_bias", bool, False),
    )
    return _scaled(
        spec,
        embedding=config.read("embedding_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        attention=config.read("attention_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        residual=config.read("residual_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        logits=config.read("logits_scaling", float, 1.0, low=_LOW, high=_HIGH),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="granite")
    return _scaled(
        spec,
        embedding=config.read("embedding_scale", float, 1.0, low=_LOW, high=_HIGH),
        attention=config.read("attention.scale", float, spec.query_scale, low=_LOW, high=_HIGH),
        residual=config.read("residual_scale", float, 1.0, low=_LOW, high=_HIGH),
        logits=config.read("logit_scale", float, 1.0, low=_LOW, high=_HIGH),
    )


GRANITE = Family(
    name="granite",
    title="Granite 3, 4 (dense)",
    architectures=("GraniteForCausalLM",),
    from_config=_from_config,
    gguf_architecture="granite",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
