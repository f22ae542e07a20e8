"""GPT-OSS (arXiv 2508.10925): attention with a sink a head, windows in every other layer, biases, and experts whose
activation is bounded. Published weights of the experts are MXFP4; versions in 16 bits keep them transposed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, Storage
from aphrodite.models.families.common import (
    Family,
    decoder_from_config,
    decoder_from_gguf,
    gguf_windows,
    head_dim,
    windows_by_type,
)
from aphrodite.models.families.experts import moe_from_config, moe_from_gguf
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec, MoeSpec
from aphrodite.quantization.types import RawTensor

_PATTERN = 2
_THETA = 150_000.0
_HEAD_DIM, _WINDOW = 64, 128
_SLOPE, _LIMIT = 1.702, 7.0  # of the activation


def _gpt_oss(spec: ModelSpec, moe: MoeSpec) -> ModelSpec:
    moe = dataclasses.replace(moe, scoring="softmax_of_chosen", router_bias=True, expert_bias=True)
    return dataclasses.replace(spec, moe=moe, activation="swiglu_oai", attention_sinks=True)


def _from_config(config: ConfigReader) -> ModelSpec:
    for key, value in (("swiglu_limit", _LIMIT), ("swiglu_alpha", _SLOPE)):
        found = config.read(key, float, value)
        if found != value:
            raise config.wrong(key, f"{value:g} (others are not supported)", found)
    window = config.read("sliding_window", int, _WINDOW, low=1)
    bias = config.read("attention_bias", bool, True)
    spec = decoder_from_config(
        config,
        family="gpt_oss",
        windows=windows_by_type(config, window, _PATTERN),
        rotary=rotary_from_config(config, head_dim(config, _HEAD_DIM), default_theta=_THETA),
        default_head_dim=_HEAD_DIM,
        qkv_bias=bias,
        output_bias=bias,
    )
    return _gpt_oss(spec, moe_from_config(config))


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config,
        tensors,
        family="gpt_oss",
        windows=gguf_windows(config, _PATTERN),
        experts=True,
    )
    spec = dataclasses.replace(spec, rotary=dataclasses.replace(spec.rotary, truncate=False))  # has no key there
    return _gpt_oss(spec, moe_from_gguf(config, tensors))


_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
GPT_OSS = Family(
    name="gpt_oss",
    title="GPT-OSS 20B, 120B",
    architectures=("GptOssForCausalLM",),
    from_config=_from_config,
    gguf_architecture="gpt-oss",
    from_gguf=_from_gguf,
    hf=Storage(
        names=HF_NAMES.renamed(
            {
                "sinks.weight": "self_attn.sinks",
                "expert_gate.weight": _GATE_UP,
                "expert_up.weight": _GATE_UP,
                "expert_down.weight": _DOWN,
                "expert_gate.bias": _GATE_UP + "_bias",
                "expert_up.bias": _GATE_UP + "_bias",
                "expert_down.bias": _DOWN + "_bias",
            },
            router="mlp.router",
        ),
        alternating_experts=True,
        transposed_experts=True,
    ),
    gguf=Storage(names=GGUF_NAMES.renamed(mlp_norm="post_attention_norm")),
)
