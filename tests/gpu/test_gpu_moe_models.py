"""Whole models with experts on the GPU: tokens in float32 are those of the reference on the CPU, in graphs and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_engines import REFERENCE
from safetensors.numpy import save_file

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.messages import AddRequest
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.parameters import EXPERT_PLACEHOLDER
from aphrodite.models.registry import FAMILIES
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.sampling.params import SamplingParams

COMMON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 96, **SMALL
    },
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "mlp_only_layers": [1], **SMALL},
}  # fmt: skip
MODELS["gpt_oss"] = {
    "architectures": ["GptOssForCausalLM"], "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 40,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 5e5,
        "truncate": False,
    },
}  # fmt: skip
PROMPTS = [[3 + (11 * i + 17 * j) % 900 for j in range(5 + 23 * i)] for i in range(8)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Random weights in a file, layers large enough to outweigh the embedding."""
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **MODELS[request.param]}))
    (family,) = (family for family in FAMILIES if family.name == request.param)
    weights = dummy_weights(open_checkpoint(tmp_path, load_format="dummy").spec, QuantType.F32)
    tensors: dict[str, np.ndarray] = {}
    for canonical, raw in weights.items():
        name, values = family.hf.names.checkpoint_name(canonical), dequantize(raw)
        if "norm" not in canonical and "embed" not in canonical:
            values = values * 6
        if EXPERT_PLACEHOLDER not in name:
            tensors[name] = values if name not in tensors else _alternating(tensors[name], values)
            continue
        for expert, own in enumerate(values):
            tensors[name.replace(EXPERT_PLACEHOLDER, str(expert))] = own
    if request.param == "gpt_oss":  # whose matrices of experts are transposed
        tensors = {
            name: np.ascontiguousarray(values.swapaxes(1, 2)) if values.ndim == 3 else values
            for name, values in tensors.items()
        }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def _alternating(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """`[experts, 2 * rows, ...]`: GPT-OSS's gate and up are one tensor."""
    return np.stack((gate, up), axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def tokens(model: Path, prompts: list[list[int]], **settings: Any) -> dict[str, list[int]]:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    chosen = {"device": "cuda", "dtype": "float32", "kv_cache_memory": 1 << 28, "max_num_seqs": 16, **settings}
    built = build_engine(EngineConfig(model=str(model), **chosen), ())
    for number, prompt in enumerate(prompts):
        built.core.add(AddRequest([str(number)], [0], prompt, params, 0, None))
    answers: dict[str, list[int]] = {}
    try:
        while built.core.has_work():
            for update in built.core.step():
                assert not update.error
                answers.setdefault(update.request_id, []).extend(update.token_ids)
    finally:
        built.core.close()
        torch.cuda.empty_cache()
    return answers


@pytest.mark.parametrize("count", [1, 8])
def test_tokens_are_those_of_the_cpu(model: Path, count: int) -> None:
    expected = tokens(model, PROMPTS[-count:], **REFERENCE)
    assert tokens(model, PROMPTS[-count:]) == expected
    assert tokens(model, PROMPTS[-count:], enable_graphs=False) == expected
