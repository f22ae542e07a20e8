"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219): Llama's decoder with q, k and v in one tensor, gate and up in another,
LongRoPE, and in Phi-4-mini a part of each head that does not turn."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, HF_NAMES, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf, head_dim, layer_count
from aphrodite.models.families.rotary import rotary_from_config
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def _from_config(config: ConfigReader) -> ModelSpec:
    window = config.read("sliding_window", int, None, low=1)
    return decoder_from_config(
        config,
        family="phi3",
        windows=(window,) * layer_count(config),
        rotary=rotary_from_config(config, head_dim(config), default_fraction=1.0),
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return decoder_from_gguf(config, tensors, family="phi3", partial_rotary=True)


PHI3 = Family(
    name="phi3",
    title="Phi-3, Phi-3.5, Phi-4",
    architectures=("Phi3ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="phi3",
    from_gguf=_from_gguf,
    hf=Storage(names=HF_NAMES.renamed(q=_QKV, k=_QKV, v=_QKV, gate=_GATE_UP, up=_GATE_UP)),
    gguf=Storage(names=GGUF_NAMES.renamed(q="attn_qkv", k="attn_qkv", v="attn_qkv", gate="ffn_up", up="ffn_up")),
)
