"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward only, and norms of q and k over their whole width.
OLMo 3 adds windows to three layers of four, which keep plain angles where the others' are scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import HF_NAMES, Storage
from aphrodite.models.families.common import (
    Family,
    decoder_from_config,
    decoder_from_gguf,
    gguf_windows,
    head_dim,
    windows_by_type,
)
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import RawTensor

_HF = Storage(
    names=HF_NAMES.renamed(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm")
)
_PATTERN = 4
_OLMO3_THETA = 5e5


def _olmo(spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, block="post_norm", qk_norm=True, head_norm="width")


def _from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("attention_bias", bool, False)
    return _olmo(decoder_from_config(config, family="olmo2", qkv_bias=bias, output_bias=bias))


def _olmo3_from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("attention_bias", bool, False)
    dim = head_dim(config)
    spec = decoder_from_config(
        config,
        family="olmo3",
        windows=windows_by_type(config, config.read("sliding_window", int, 4096, low=1), _PATTERN),
        rotary=rotary_from_config(config, dim, default_theta=_OLMO3_THETA),
        qkv_bias=bias,
        output_bias=bias,
    )
    return _olmo(_plain_in_windows(spec))


def _plain_in_windows(spec: ModelSpec) -> ModelSpec:
    plain = RotarySpec(dim=spec.rotary.dim, theta=spec.rotary.theta)
    rotaries = tuple(spec.rotary if window is None else plain for window in spec.windows)
    return dataclasses.replace(spec, layer_rotaries=rotaries if spec.rotary != plain else ())


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    windows = gguf_windows(config, _PATTERN)
    spec = decoder_from_gguf(config, tensors, family="olmo2", windows=windows)
    if spec.rotary.scaling == "yarn":  # of which the file holds transformers' attention_factor, that is all of it
        own = config.read("rope.scaling.attn_factor", float, None, low=1e-3, high=1e3)
        spec = dataclasses.replace(spec, rotary=dataclasses.replace(spec.rotary, attention_factor=own))
    return _olmo(_plain_in_windows(spec))


OLMO2 = Family(
    name="olmo2",
    title="OLMo 2",
    architectures=("Olmo2ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="olmo2",  # OLMo 3's files say so, too
    from_gguf=_from_gguf,
    hf=_HF,
)
OLMO3 = Family(
    name="olmo3",
    title="OLMo 3",
    architectures=("Olmo3ForCausalLM",),
    from_config=_olmo3_from_config,
    from_gguf=_from_gguf,
    hf=_HF,
)
