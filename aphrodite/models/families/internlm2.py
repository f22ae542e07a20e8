"""InternLM 2 and 2.5 (arXiv 2403.17297): Llama's decoder under names of its own, with q, k and v in one tensor whose
rows go by KV head. transformers has no code for it; the layout is that of the model's published code."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import GGUF_NAMES, NameTable, Storage
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_NAMES = NameTable(
    top={"embed": "model.tok_embeddings", "norm": "model.norm", "head": "output"},
    layer_prefix="model.layers.{}.",
    layer={
        "attn_norm": "attention_norm",
        "q": "attention.wqkv",
        "k": "attention.wqkv",
        "v": "attention.wqkv",
        "o": "attention.wo",
        "mlp_norm": "ffn_norm",
        "gate": "feed_forward.w1",
        "up": "feed_forward.w3",
        "down": "feed_forward.w2",
    },
)


def _from_config(config: ConfigReader) -> ModelSpec:
    bias = config.read("bias", bool, False)
    return decoder_from_config(config, family="internlm2", qkv_bias=bias, output_bias=bias)


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return decoder_from_gguf(config, tensors, family="internlm2")


INTERNLM2 = Family(
    name="internlm2",
    title="InternLM 2, 2.5",
    architectures=("InternLM2ForCausalLM",),
    from_config=_from_config,
    gguf_architecture="internlm2",
    from_gguf=_from_gguf,
    hf=Storage(names=_NAMES, grouped_qkv=True),
    gguf=Storage(names=GGUF_NAMES, interleaved=True),
)
