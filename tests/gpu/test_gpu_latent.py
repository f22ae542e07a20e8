"""Latent attention on the GPU: DeepSeek's sizes against expanded keys and values in float64, and a whole model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_engines import REFERENCE
from safetensors.numpy import save_file

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton"))

from latent_case import FP8, lengths_of, make_latent_case

from aphrodite.attention import latent_triton
from aphrodite.attention.latent_triton import TritonLatentAttention
from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.messages import AddRequest
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.parameters import HF_NAMES
from aphrodite.models.spec import MlaSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.sampling.params import SamplingParams

DEEPSEEK = MlaSpec(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
STEPS = {
    "one decode": [(1, 5000)],
    "decodes": [(1, 700), (1, 0), (1, 33), (1, 4100), (1, 1), (1, 0)],
    "prompts": [(300, 300), (1000, 1000)],
    "mixed": [(1, 900), (40, 2000), (700, 1500), (1, 17), (3, 3)],
}
ATOL = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 5e-2}  # of values up to 5


@pytest.mark.parametrize("heads", [16, 20, 128])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.bfloat16, FP8)],
    ids=["bf16", "fp16", "fp32", "fp8 cache"],
)
def test_steps(
    name: str, heads: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: torch.device
) -> None:
    if heads != 16 and dtype != torch.bfloat16:
        pytest.skip("one type is enough for other numbers of heads")
    check(STEPS[name], heads, dtype, cache_dtype, device)


@pytest.mark.parametrize("expanded", [False, True])
def test_both_ways_of_serving_prompts(expanded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_triton, "expands", lambda query, context, mla: (query > 1) & expanded)
    monkeypatch.setattr(latent_triton, "GROUP_POSITIONS", 2500)
    monkeypatch.setattr(latent_triton, "EXPANDED_BYTES", 5 << 20)
    check([*STEPS["mixed"], *STEPS["prompts"]], 16, torch.bfloat16, None, device)


def check(
    pairs: list[tuple[int, int]],
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    case = make_latent_case(pairs, DEEPSEEK, heads=heads, dtype=dtype, cache_dtype=cache_dtype, device=device)
    assert TritonLatentAttention.decline(case.shape) is None
    backend = TritonLatentAttention(case.shape, case.transform)
    decode_only = all(query == 1 for query, _ in pairs)
    lengths = None if decode_only else lengths_of(pairs)
    table = np.zeros(0, dtype=np.int32) if lengths is None else backend.stage_step(lengths)
    expected, _ = case.expected()
    cache = case.cache
    for _ in range(2):  # as two layers of a step do: the plan is left as it was found
        out = backend.begin_step(case.inputs(lengths, table), cache)(1, case.qkv.clone())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=ATOL[dtype])
        assert (out.double() - expected).norm() < ATOL[dtype] / 4 * expected.norm()


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "q_lora_rank": 96,
    "kv_lora_rank": 80,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 4096,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
PROMPTS = [[3 + (11 * i + 17 * j) % 900 for j in range(5 + 61 * i)] for i in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a file, as DeepSeek names them, larger where the embedding would outweigh them."""
    path = tmp_path_factory.mktemp("deepseek")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    raw = dummy_weights(open_checkpoint(path, load_format="dummy").spec, QuantType.F32)
    values = {name: dequantize(tensor).reshape(tensor.shape) for name, tensor in raw.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, weights in values.items():
        module = name.split(".")[-2]
        target = HF_NAMES.checkpoint_name(name)
        if module == "v_b":
            continue
        if module == "k_b":
            expanded = values[name.replace("k_b", "v_b")]
            tensors[target] = np.concatenate((weights.transpose(0, 2, 1), expanded), axis=1).reshape(
                -1, weights.shape[1]
            )
        elif "{expert}" in target:
            tensors |= {target.replace("{expert}", str(index)): part for index, part in enumerate(weights)}
        else:
            tensors[target] = weights
    scaled = {name: np.ascontiguousarray(t * (6 if "proj" in name else 1)) for name, t in tensors.items()}
    save_file(scaled, path / "model.safetensors")
    return path


def answers(model: Path, **settings: Any) -> dict[str, list[int]]:
    """Greedy answers to all prompts, served together."""
    built = build_engine(EngineConfig(model=str(model), **{"max_num_seqs": 16, "dtype": "float32", **settings}), ())
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        built.core.add(AddRequest([str(number)], [0], prompt, params, 0, None))
    found: dict[str, list[int]] = {}
    try:
        while built.core.has_work():
            for update in built.core.step():
                assert not update.error
                found.setdefault(update.request_id, []).extend(update.token_ids)
    finally:
        built.core.close()
        torch.cuda.empty_cache()
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    return answers(model, **REFERENCE, kv_cache_memory=1 << 28)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_memory": 1 << 28},
        {"kv_cache_memory": 1 << 28, "max_num_batched_tokens": 100, "enable_graphs": False},  # prompts in chunks
        {"kv_cache_memory": 1_600_000, "max_model_len": 512, "enable_graphs": False},  # preemption
    ],
    ids=["graphs", "chunks", "preemption"],
)
def test_tokens_are_those_of_the_cpu(
    settings: dict[str, Any], model: Path, expected: dict[str, list[int]], device: torch.device
) -> None:
    assert answers(model, device="cuda", **settings) == expected
