"""Command-R and R+ (Cohere): attention and feed-forward side by side, LayerNorm without bias, scaled logits, rotary
embedding of neighbouring dimensions; R+ normalises each head of q and k by a weight of its own. Command-R7B and
Command-A have windows, and no rotary embedding in the layers without."""

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
from aphrodite.models.families.rotary import MAX_POSITION, rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_HF = Storage(names=HF_NAMES, interleaved=True)
_GGUF = Storage(names=GGUF_NAMES, interleaved=True)
_PATTERN = 4
_LOGIT_SCALE = 0.0625
_THETA = 5e5


def _cohere(spec: ModelSpec, logit_scale: float) -> ModelSpec:
    return dataclasses.replace(
        spec, block="parallel", norm="layer", head_norm="each_head", float32_norms=True, logit_scale=logit_scale
    )


def _logit_scale(config: ConfigReader) -> float:
    return config.read("logit_scale", float, _LOGIT_SCALE, low=1e-6, high=1e6)


def _from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(
        config,
        family="cohere",
        rotary=rotary_from_config(config, head_dim(config), default_theta=_THETA),
        epsilon="layer_norm_eps",
        default_tied=True,
        qk_norm=config.read("use_qk_norm", bool, False),
        qkv_bias=bias,
        output_bias=bias,
    )
    # Command-R says here how long its texts may be, and under the ordinary key what was thought safe at first.
    longest = config.read("model_max_length", int, 0, low=0, high=MAX_POSITION)
    spec = dataclasses.replace(spec, max_position=max(spec.max_position, longest))
    return _cohere(spec, _logit_scale(config))


def _cohere2_from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(
        config,
        family="cohere2",
        windows=windows_by_type(config, config.read("sliding_window", int, 4096, low=1), _PATTERN),
        epsilon="layer_norm_eps",
        default_tied=True,
        qkv_bias=bias,
        output_bias=bias,
    )
    return _cohere(_rotary_in_windows(spec), _logit_scale(config))


def _rotary_in_windows(spec: ModelSpec) -> ModelSpec:
    rotaries = tuple(None if window is None else spec.rotary for window in spec.windows)
    return dataclasses.replace(spec, layer_rotaries=rotaries)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config,
        tensors,
        family="cohere",
        epsilon="attention.layer_norm_epsilon",
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    return _cohere(spec, _logit_scale(config))


def _cohere2_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config,
        tensors,
        family="cohere2",
        windows=gguf_windows(config, _PATTERN),
        epsilon="attention.layer_norm_epsilon",
    )
    return _cohere(_rotary_in_windows(spec), _logit_scale(config))


COHERE = Family(
    name="cohere",
    title="Command-R, Command-R+, Aya",
    architectures=("CohereForCausalLM",),
    from_config=_from_config,
    gguf_architecture="command-r",
    from_gguf=_from_gguf,
    hf=_HF,
    gguf=_GGUF,
)
COHERE2 = Family(
    name="cohere2",
    title="Command-R7B, Command-A",
    architectures=("Cohere2ForCausalLM",),
    wrapped_by=("Cohere2VisionForConditionalGeneration", "AyaVisionForConditionalGeneration"),
    from_config=_cohere2_from_config,
    gguf_architecture="cohere2",
    from_gguf=_cohere2_from_gguf,
    hf=_HF,
    gguf=_GGUF,
)
