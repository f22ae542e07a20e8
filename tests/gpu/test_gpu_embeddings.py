"""Embeddings on a GPU: those of the CPU, in chunks and beside answers, which stay what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from aphrodite.config import EngineConfig
from aphrodite.core.plan import Pooling
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.parameters import HF_NAMES
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.sampling.params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
}
POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")
PROMPTS = [[3 + (7 * i + 13 * j) % 900 for j in range(length)] for i, length in enumerate((1, 16, 40, 700))]
STORY = SamplingParams(max_tokens=24, temperature=1.1, ignore_eos=True, seed=7)


@pytest.fixture
def make_core(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = dummy_weights(open_checkpoint(tmp_path, load_format="dummy").spec, QuantType.F32)
    save_file(
        {HF_NAMES.checkpoint_name(name): dequantize(raw) for name, raw in weights.items()},
        tmp_path / "model.safetensors",
    )
    cores: list[EngineCore] = []

    def make(**settings: Any) -> EngineCore:
        chosen = {"dtype": "float32", "kv_cache_memory": 1 << 28, "max_num_seqs": 16, **settings}
        cores.append(build_engine(EngineConfig(model=str(tmp_path), **chosen), ()).core)
        return cores[-1]

    yield make
    for core in cores:
        core.close()
    torch.cuda.empty_cache()


def serve(core: EngineCore, *, embed: bool = True) -> tuple[dict[str, np.ndarray], list[int]]:
    """Embeddings of all prompts, and the tokens of an answer that is written meanwhile."""
    core.add(AddRequest(["story"], [7], PROMPTS[2], STORY, 0, None))
    if embed:
        for pooling in POOLINGS:
            for number, prompt in enumerate(PROMPTS):
                core.add(
                    AddRequest([f"{pooling} {number}"], [0], prompt, SamplingParams(max_tokens=0), 0, None, pooling)
                )
    embeddings: dict[str, np.ndarray] = {}
    tokens: list[int] = []
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens += update.token_ids
            if update.embedding is not None:
                embeddings[update.request_id] = np.frombuffer(update.embedding, np.float32)
    return embeddings, tokens


def test_embeddings_are_those_of_the_cpu(make_core: Any) -> None:
    """In chunks, in one start: that of an engine on a GPU is what takes long here."""
    expected, story = serve(make_core(device="cpu", executor="torch"))
    core = make_core(device="cuda", max_num_batched_tokens=96, max_num_seqs=8)
    found, tokens = serve(core)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-3, err_msg=name)
        assert found[name] @ values / np.linalg.norm(found[name]) / np.linalg.norm(values) > 1 - 1e-6
    assert tokens == story == serve(core, embed=False)[1]
