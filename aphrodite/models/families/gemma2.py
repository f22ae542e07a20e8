"""Gemma 2 (arXiv 2408.00118): norms on both sides of attention and feed-forward, bounded scores and logits, a sliding
window in every other layer, scaled embeddings, and norms whose weights are stored less one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_STORAGE, HF_NAMES, Storage
from aphrodite.models.families.common import (
    Family,
    bound_or_none,
    decoder_from_config,
    decoder_from_gguf,
    gguf_windows,
    windows_by_type,
)
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

HF_GEMMA = Storage(
    names=HF_NAMES.renamed(
        attn_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    norm_offset=1.0,
)
DEFAULT_HEAD_DIM = 256
_PATTERN = 2
_LAYERS_27B = 46  # llama.cpp tells by them which model scales scores by the width of a head in the hidden size


def gemma(spec: ModelSpec, attention_scale: float) -> ModelSpec:
    """What Gemma 2 and 3 have in common beyond the ordinary shape."""
    return dataclasses.replace(
        spec,
        block="sandwich",
        float32_norms=True,  # 1 + w has more bits than w
        embedding_scale=math.sqrt(spec.hidden_size),
        attention_scale=attention_scale,
    )


def query_scale(config: ConfigReader) -> float:
    """1 / sqrt(query_pre_attn_scalar) of a config.json."""
    return 1.0 / math.sqrt(config.read("query_pre_attn_scalar", float, float(DEFAULT_HEAD_DIM), low=1.0, high=1e6))


def gguf_query_scale(spec: ModelSpec, layers_27b: int) -> float:
    """GGUF does not hold the scale; that of the 27B models is by the hidden size, that of others by the head's."""
    width = spec.hidden_size / spec.num_heads if spec.num_layers == layers_27b else spec.head_dim
    return float(width**-0.5)


def refuse_bidirectional(config: ConfigReader) -> None:
    """Embedding models of the family attend to later tokens, which a decoder does not.

    Raises:
        ModelFormatError: the configuration asks for it.
    """
    if config.read("use_bidirectional_attention", bool, False):
        raise config.wrong("use_bidirectional_attention", "false (this is an embedding model)", True)


def _from_config(config: ConfigReader) -> ModelSpec:
    refuse_bidirectional(config)
    attention_bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(
        config,
        family="gemma2",
        windows=windows_by_type(config, config.read("sliding_window", int, 4096, low=1), _PATTERN),
        default_head_dim=DEFAULT_HEAD_DIM,
        default_activation="gelu_pytorch_tanh",
        default_tied=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
    return dataclasses.replace(
        gemma(spec, query_scale(config)),
        attention_softcap=bound_or_none(config, "attn_logit_softcapping", 50.0),
        logit_softcap=bound_or_none(config, "final_logit_softcapping", 30.0),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(
        config, tensors, family="gemma2", windows=gguf_windows(config, _PATTERN), activation="gelu_tanh"
    )
    return dataclasses.replace(
        gemma(spec, gguf_query_scale(spec, _LAYERS_27B)),
        attention_softcap=config.read("attn_logit_softcapping", float, 50.0, low=1e-3, high=1e6),
        logit_softcap=config.read("final_logit_softcapping", float, 30.0, low=1e-3, high=1e6),
    )


GEMMA2 = Family(
    name="gemma2",
    title="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="gemma2",
    from_gguf=_from_gguf,
    hf=HF_GEMMA,
    gguf=GGUF_STORAGE,
)
