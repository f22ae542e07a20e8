"""StableLM (arXiv 2402.17834): LayerNorm, a quarter of each head turns; StableLM 2 12B (arXiv 2402.17834) computes
attention and feed-forward side by side and normalises each head of q and k by a weight of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import HEAD_PLACEHOLDER, HF_NAMES, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf, head_dim
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_TURNING, _EPSILON = 0.25, 1e-5  # what transformers assumes


def _stablelm(spec: ModelSpec, *, parallel: bool) -> ModelSpec:
    return dataclasses.replace(
        spec, block="parallel" if parallel else "pre_norm", norm="layer", norm_bias=True, head_norm="each_head"
    )


def _from_config(config: ConfigReader) -> ModelSpec:
    config = config.with_defaults(  # the first files (stablelm_epoch) have these under other names
        {
            "layer_norm_eps": config.read("norm_eps", float, _EPSILON, low=0.0, high=1.0),
            "partial_rotary_factor": config.read("rope_pct", float, _TURNING, low=0.0, high=1.0),
        }
    )
    spec = decoder_from_config(
        config,
        family="stablelm",
        rotary=rotary_from_config(config, head_dim(config), default_fraction=_TURNING),
        epsilon="layer_norm_eps",
        qk_norm=config.read("qk_layernorm", bool, False),
        qkv_bias=config.read("use_qkv_bias", bool, False),
    )
    return _stablelm(spec, parallel=config.read("use_parallel_residual", bool, False))


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config,
        tensors,
        family="stablelm",
        epsilon="attention.layer_norm_epsilon",
        partial_rotary=True,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    return _stablelm(spec, parallel="blk.0.ffn_norm.weight" not in tensors)


STABLELM = Family(
    name="stablelm",
    title="StableLM, StableLM 2",
    architectures=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    from_config=_from_config,
    gguf_architecture="stablelm",
    from_gguf=_from_gguf,
    hf=Storage(
        names=HF_NAMES.renamed(
            q_norm=f"self_attn.q_layernorm.norms.{HEAD_PLACEHOLDER}",
            k_norm=f"self_attn.k_layernorm.norms.{HEAD_PLACEHOLDER}",
        )
    ),
)
