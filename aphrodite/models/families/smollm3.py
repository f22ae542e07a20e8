"""SmolLM 3: Llama's decoder in which every fourth layer has no rotary embedding (arXiv 2501.18795)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, Storage
from aphrodite.models.families.common import (
    Family,
    decoder_from_config,
    decoder_from_gguf,
    head_dim,
    layer_count,
    windows_by_type,
)
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_INTERVAL = 4
_THETA = 2e6


def _from_config(config: ConfigReader) -> ModelSpec:
    num_layers = layer_count(config)
    attention_bias = config.read("attention_bias", bool, False)
    turning = [bool(turns) for turns in config.integers("no_rope_layers", low=0, high=1)]
    if not turning:
        turning = _all_but_every(config.read("no_rope_layer_interval", int, _INTERVAL, low=1), num_layers)
    if len(turning) < num_layers:
        raise config.wrong("no_rope_layers", f"a list of {num_layers}, one a layer", turning)
    spec = decoder_from_config(
        config,
        family="smollm3",
        windows=_windows(config, turning, num_layers),
        rotary=rotary_from_config(config, head_dim(config), default_theta=_THETA),
        default_tied=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=config.read("mlp_bias", bool, False),
    )
    return _without_rotary(spec, turning)


def _windows(config: ConfigReader, turning: Sequence[bool], num_layers: int) -> tuple[int | None, ...]:
    window = config.read("sliding_window", int, None, low=1) if config.read("use_sliding_window", bool, False) else None
    if config.strings("layer_types"):
        return windows_by_type(config, window, num_layers)
    return tuple(None if turns else window for turns in turning[:num_layers])


def _all_but_every(interval: int, num_layers: int) -> list[bool]:
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _without_rotary(spec: ModelSpec, turning: Sequence[bool]) -> ModelSpec:
    rotaries = tuple(spec.rotary if turns else None for turns in turning[: spec.num_layers])
    return dataclasses.replace(spec, layer_rotaries=rotaries)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="smollm3")
    return _without_rotary(spec, _all_but_every(_INTERVAL, spec.num_layers))


SMOLLM3 = Family(
    name="smollm3",
    title="SmolLM 3",
    architectures=("SmolLM3ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="smollm3",
    from_gguf=_from_gguf,
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
