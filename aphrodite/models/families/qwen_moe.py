"""Qwen's mixtures of experts: Qwen1.5- and Qwen2-MoE (arXiv 2407.10671), whose shared expert is weighed by a gate, and
Qwen3-MoE (arXiv 2505.09388), which has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import HF_NAMES, HF_STORAGE, Storage
from aphrodite.models.families.common import (
    MAX_LAYERS,
    MAX_WIDTH,
    Family,
    decoder_from_config,
    decoder_from_gguf,
    layer_count,
)
from aphrodite.models.families.experts import moe_from_config, moe_from_gguf
from aphrodite.models.families.qwen2 import late_windows
from aphrodite.models.spec import ModelSpec, MoeSpec
from aphrodite.quantization.types import RawTensor

_SHARED = "mlp.shared_expert"


def _moe(config: ConfigReader) -> MoeSpec:
    num_layers = layer_count(config)
    step = config.read("decoder_sparse_step", int, 1, low=1, high=MAX_LAYERS)
    dense = set(config.integers("mlp_only_layers", low=0, high=num_layers - 1))
    dense |= {layer for layer in range(num_layers) if (layer + 1) % step}
    return moe_from_config(
        config,
        intermediate="moe_intermediate_size",
        normalize=config.read("norm_topk_prob", bool, False),
        dense_layers=tuple(sorted(dense)),
    )


def _qwen2_from_config(config: ConfigReader) -> ModelSpec:
    spec = decoder_from_config(
        config,
        family="qwen2_moe",
        windows=late_windows(config),
        qkv_bias=config.read("qkv_bias", bool, True),
    )
    shared = config.read("shared_expert_intermediate_size", int, low=1, high=MAX_WIDTH)
    moe = dataclasses.replace(_moe(config), shared_intermediate_size=shared, shared_gate=True)
    return dataclasses.replace(spec, moe=moe)


def _qwen2_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="qwen2_moe", experts=True)
    return dataclasses.replace(spec, moe=moe_from_gguf(config, tensors))


def _qwen3_from_config(config: ConfigReader) -> ModelSpec:
    attention_bias = config.read("attention_bias", bool, False)
    spec = decoder_from_config(
        config,
        family="qwen3_moe",
        windows=late_windows(config),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
    if config.read("model_type", str, "") == "qwen3_vl_moe_text":  # which always does
        config = config.with_defaults({"norm_topk_prob": True})
    return dataclasses.replace(spec, moe=_moe(config))


def _qwen3_from_gguf(config: ConfigReader, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    spec = decoder_from_gguf(config, tensors, family="qwen3_moe", qk_norm=True, experts=True)
    return dataclasses.replace(spec, moe=moe_from_gguf(config, tensors, normalize=True))


def _qwen3_storage(tensors: Mapping[str, RawTensor]) -> Storage:
    """Qwen 3 VL has all experts of a layer in two tensors: `[experts, in, out]` as published, `[experts, out, in]` as
    transformers may save them."""
    fused = next((name for name in tensors if name.endswith(_DOWN)), None)
    if fused is None:
        return HF_STORAGE
    router = tensors.get(fused.removesuffix(_DOWN) + "mlp.gate.weight")
    transposed = router is None or tensors[fused].shape[-1] == router.shape[-1]
    return Storage(names=HF_NAMES.renamed(_FUSED), transposed_experts=transposed)


_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_FUSED = {"expert_gate.weight": _GATE_UP, "expert_up.weight": _GATE_UP, "expert_down.weight": _DOWN}
QWEN2_MOE = Family(
    name="qwen2_moe",
    title="Qwen 1.5 MoE, Qwen 2 57B-A14B",
    architectures=("Qwen2MoeForCausalLM",),
    from_config=_qwen2_from_config,
    gguf_architecture="qwen2moe",
    from_gguf=_qwen2_from_gguf,
    hf=Storage(
        names=HF_NAMES.renamed(
            shared_gate=_SHARED + ".gate_proj",
            shared_up=_SHARED + ".up_proj",
            shared_down=_SHARED + ".down_proj",
            shared_router=_SHARED + "_gate",
        )
    ),
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    title="Qwen 3 30B-A3B, 235B-A22B",
    architectures=("Qwen3MoeForCausalLM",),
    from_config=_qwen3_from_config,
    wrapped_by=("Qwen3VLMoeForConditionalGeneration",),
    gguf_architecture="qwen3moe",
    gguf_wrapped_by=("qwen3vlmoe",),
    from_gguf=_qwen3_from_gguf,
    hf_of=_qwen3_storage,
)
