"""Granite 3 and 4 without state spaces (IBM): Llama's decoder with four multipliers, dense or a mixture of experts.

x + m * f(norm(x)) is Llama's x' + f(norm(x')) of x' = x / m: a norm does not see the scale of its input, once its
epsilon is divided by m * m. So m becomes part of the embeddings' scale, and layers need no multiplier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, Storage
from aphrodite.models.families.common import MAX_WIDTH, Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.families.experts import moe_from_config, moe_from_gguf
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
    return _scaled_from_config(spec, config)


def _moe_from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(config, family="granitemoe", qkv_bias=bias, output_bias=bias)
    moe = moe_from_config(config, scoring="softmax_of_chosen")
    shared = config.read("shared_intermediate_size", int, 0, low=0, high=MAX_WIDTH)
    moe = dataclasses.replace(moe, shared_intermediate_size=shared)
    return _scaled_from_config(dataclasses.replace(spec, moe=moe), config)


def _hybrid_from_config(config: ConfigReader) -> ModelSpec:
    """Granite 4's configuration of those of its models that have attention in every layer."""
    kinds = config.strings("layer_types")
    if not kinds or any(kind not in ("attention", "full_attention") for kind in kinds):
        raise config.wrong("layer_types", "attention in every layer (state spaces are not supported)", kinds)
    width = config.read("shared_intermediate_size", int, low=1, high=MAX_WIDTH)
    if config.read("num_local_experts", int, 0):
        spec = _moe_from_config(config)
    else:
        spec = dataclasses.replace(_from_config(config), intermediate_size=width)
    if config.read("position_embedding_type", str, "nope") != "rope":
        spec = dataclasses.replace(spec, layer_rotaries=(None,) * spec.num_layers)
    return spec


def _scaled_from_config(spec: ModelSpec, config: ConfigReader) -> ModelSpec:
    return _scaled(
        spec,
        embedding=config.read("embedding_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        attention=config.read("attention_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        residual=config.read("residual_multiplier", float, 1.0, low=_LOW, high=_HIGH),
        logits=config.read("logits_scaling", float, 1.0, low=_LOW, high=_HIGH),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return _scaled_from_gguf(decoder_from_gguf(config, tensors, family="granite"), config)


def _moe_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="granitemoe", experts=True)
    moe = moe_from_gguf(config, tensors, scoring="softmax_of_chosen")
    return _scaled_from_gguf(dataclasses.replace(spec, moe=moe), config)


def _scaled_from_gguf(spec: ModelSpec, config: ConfigReader) -> ModelSpec:
    return _scaled(
        spec,
        embedding=config.read("embedding_scale", float, 1.0, low=_LOW, high=_HIGH),
        attention=config.read("attention.scale", float, spec.query_scale, low=_LOW, high=_HIGH),
        residual=config.read("residual_scale", float, 1.0, low=_LOW, high=_HIGH),
        logits=config.read("logit_scale", float, 1.0, low=_LOW, high=_HIGH),
    )


GRANITE = Family(
    name="granite",
    title="Granite 3 (dense)",
    architectures=("GraniteForCausalLM",),
    from_config=_from_config,
    gguf_architecture="granite",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
_MOE_NAMES = HF_NAMES.renamed(
    router="block_sparse_moe.router.layer",
    expert_gate="block_sparse_moe.input_linear",
    expert_up="block_sparse_moe.input_linear",
    expert_down="block_sparse_moe.output_linear",
    shared_gate="shared_mlp.input_linear",
    shared_up="shared_mlp.input_linear",
    shared_down="shared_mlp.output_linear",
)
GRANITE_MOE = Family(
    name="granitemoe",
    title="Granite 3 MoE",
    architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    from_config=_moe_from_config,
    gguf_architecture="granitemoe",
    from_gguf=_moe_from_gguf,
    hf=Storage(names=_MOE_NAMES),
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
GRANITE_HYBRID = Family(
    name="granitemoehybrid",
    title="Granite 4 with attention only (350M, 1B, Micro)",
    architectures=("GraniteMoeHybridForCausalLM",),
    from_config=_hybrid_from_config,
    from_gguf=_from_gguf,  # their files say "granite" or "granitemoe"
    hf=Storage(
        names=_MOE_NAMES.renamed(
            gate="shared_mlp.input_linear", up="shared_mlp.input_linear", down="shared_mlp.output_linear"
        )
    ),
)
