"""Families and weight formats on a GPU, from a checkpoint to logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_engines import REFERENCE
from safetensors.numpy import save_file

from aphrodite import platforms
from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import BuiltEngine, build_engine
from aphrodite.engine.messages import AddRequest
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.parameters import HF_NAMES
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.sampling.params import SamplingParams

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
PROMPTS = [[3 + (11 * i + 17 * j) % 900 for j in range(5 + 23 * i)] for i in range(8)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Random weights in a file: norms that are not all ones, and layers large enough to outweigh the embedding."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    weights = dummy_weights(open_checkpoint(tmp_path, load_format="dummy").spec, QuantType.F32)
    tensors = {HF_NAMES.checkpoint_name(name): dequantize(raw) for name, raw in weights.items()}
    generator = torch.Generator().manual_seed(0)
    for name, values in tensors.items():
        if "norm" in name:
            values += 0.3 * torch.randn(values.shape, generator=generator).numpy()
        elif "proj" in name:
            values *= 6
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def run(model: Path, params: SamplingParams, **settings: Any) -> tuple[BuiltEngine, list[RequestUpdate]]:
    """Answer all prompts together; updates in the order of the prompts."""
    chosen = {"device": "cuda", "kv_cache_memory": 1 << 28, "max_num_seqs": 16, **settings}
    built = build_engine(EngineConfig(model=str(model), **chosen), ())
    for number, prompt in enumerate(PROMPTS):
        built.core.add(AddRequest([str(number)], [0], prompt, params, 0, None))
    found: list[RequestUpdate] = []
    try:
        while built.core.has_work():
            found += built.core.step()
    finally:
        built.core.close()
        torch.cuda.empty_cache()
    assert not [update.error for update in found if update.error]
    return built, sorted(found, key=lambda update: update.request_id)


def test_qwen3_tokens_are_those_of_the_cpu(model: Path) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)

    def tokens(**settings: Any) -> dict[str, list[int]]:
        answers: dict[str, list[int]] = {}
        for update in run(model, params, dtype="float32", **settings)[1]:
            answers.setdefault(update.request_id, []).extend(update.token_ids)
        return answers

    assert tokens() == tokens(**REFERENCE)


@pytest.mark.skipif(platforms.current().fp8_dtype is None, reason="this GPU has no fp8 products")
def test_fp8_weights_are_half_as_large_and_stay_close(model: Path) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)

    def tops(**settings: Any) -> tuple[BuiltEngine, list[set[int]]]:
        built, updates = run(model, params, dtype="bfloat16", **settings)
        return built, [set(update.logprobs[0].top_ids) for update in updates if update.logprobs]

    exact, expected = tops()
    quantized, found = tops(quantization="fp8")
    matrices = exact.info.weight_bytes - 2 * 1000 * 256  # but for the embedding
    assert exact.info.weight_bytes - quantized.info.weight_bytes > 0.45 * matrices
    assert "fp8" in quantized.info.kernels["linear layers"]
    agreement = [len(ours & theirs) / len(theirs) for ours, theirs in zip(found, expected, strict=True)]
    assert sum(agreement) / len(agreement) > 0.6
