"""Qwen3, dense (arXiv 2505.09388): Llama's decoder with a norm of each head of q and k and heads of their own size."""

from __future__ import annotations

from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.models.families.common import Family, decoder_from_config, decoder_from_gguf
from aphrodite.models.families.qwen2 import late_windows
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor

_DEFAULT_HEAD_DIM = 128  # what transformers assumes when the key is absent, whatever hidden size and heads are


def _from_config(config: ConfigReader) -> ModelSpec:
    attention_bias = config.read("attention_bias", bool, False)
    return decoder_from_config(
        config,
        family="qwen3",
        windows=late_windows(config),
        default_head_dim=_DEFAULT_HEAD_DIM,
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def _from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    return decoder_from_gguf(config, tensors, family="qwen3", qk_norm=True)


QWEN3 = Family(
    name="qwen3",
    title="Qwen 3 (dense)",
    architectures=("Qwen3ForCausalLM",),
    from_config=_from_config,
    wrapped_by=("Qwen3VLForConditionalGeneration",),
    gguf_architecture="qwen3",
    gguf_wrapped_by=("qwen3vl",),
    from_gguf=_from_gguf,
)
