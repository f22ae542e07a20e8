"""Models that transformers computes, on a GPU with the Triton attention back end: tokens are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_engines import THREADS

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.messages import AddRequest
from aphrodite.errors import AphroditeError
from aphrodite.sampling.params import SamplingParams

transformers = pytest.importorskip("transformers")

PROMPTS = [[3 + (11 * i + 17 * j) % 200 for j in range(5 + 23 * i)] for i in range(6)]
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = {
    "GPTNeoX": SIZES,
    "Starcoder2": {**SIZES, "num_key_value_heads": 2, "sliding_window": 40},
    "Olmo": {**SIZES, "pad_token_id": 0},
}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**CASES[name])
    getattr(transformers, f"{name}ForCausalLM")(config).float().save_pretrained(folder)
    return folder


def answers(model: Path, **settings: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    built = build_engine(EngineConfig(model=str(model), kv_cache_memory=1 << 26, max_num_seqs=8, **settings), ())
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
    return found, built.info.kernels


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    tokens, kernels = answers(model, device="cuda", dtype="float32")
    assert kernels["attention"].startswith("triton paged")
    assert "transformers" in kernels["executor"]
    assert tokens == answers(model, device="cpu", dtype="float32", threads=THREADS)[0]


def test_half_precision_passes_the_comparison_and_answers(tmp_path: Path) -> None:
    tokens, _ = answers(save("Starcoder2", tmp_path), device="cuda", dtype="bfloat16", kv_cache_dtype="fp8")
    assert all(len(answer) == 24 for answer in tokens.values())


def test_settings_of_built_in_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AphroditeError, match="left to transformers"):
        answers(save("GPTNeoX", tmp_path), device="cuda", quantization="fp8")
