"""Several models that share one GPU: each in its share, and no more of the memory taken than was expected."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aphrodite.model_list import offered_models
from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.several import open_pool
from aphrodite.settings import resolve

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
GIB = 1 << 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models that are only described; their weights are made up as they are loaded."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"w{number}" for number in range(32000 - 256))]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    return tmp_path


def serve(folder: Path, **flags: Any) -> None:
    """Ask both models in turn, and look at the memory."""
    settings = resolve(
        {"models_dir": str(folder), "load_format": "dummy", "device": "cuda", "chat_template": "chatml", **flags},
        environ={},
    )
    config = ServerConfig.from_settings(settings.server)
    free_before = torch.cuda.mem_get_info()[0]

    async def ask() -> None:
        async with open_pool(settings, config, offered_models(settings)) as pool:
            transport = httpx.ASGITransport(app=Application(pool, config))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as http:
                for name in ("a", "b", "a"):
                    body = {"model": name, "prompt": "The sea", "max_tokens": 8, "temperature": 0}
                    answer = await http.post("/v1/completions", json=body)
                    assert answer.status_code == 200, answer.text
                    loaded = [model for model in pool.models if model.loaded is not None]
                    expected = sum(model.loaded.memory for model in loaded if model.loaded is not None)
                    taken = free_before - torch.cuda.mem_get_info()[0]
                    print(f"{[model.name for model in loaded]}: {taken / GIB:.2f} of {expected / GIB:.2f} GiB expected")
                    assert taken <= expected
                    assert len(loaded) <= (settings.server.models_max or 2)
                assert len(loaded) == (settings.server.models_max or 2)

    asyncio.run(ask())


def test_two_models_share_the_memory(folder: Path) -> None:
    serve(folder, models_memory="12GiB")


def test_one_at_a_time_may_take_all_and_leaves_all(folder: Path) -> None:
    serve(folder, models_max=1, kv_cache_memory="8GiB")
