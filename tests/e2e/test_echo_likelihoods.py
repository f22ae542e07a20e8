"""The likelihood of texts over HTTP, as lm-eval's `local-completions` asks for it, against transformers in float32."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from aphrodite.config import EngineConfig
from aphrodite.engine.async_engine import AsyncEngine
from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.model_pool import ModelPool

# The questions that tests/clients/drive_lm_eval.py has lm-eval itself ask.
TASK = Path(__file__).parents[1] / "clients" / "lm_eval_task" / "endings.jsonl"


@pytest.fixture
async def http(smollm2_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    settings: dict[str, Any] = {"dtype": "float32", "executor": "torch", "kv_cache_memory": 256 << 20}
    engine = await AsyncEngine.start(EngineConfig(model=str(smollm2_path), **settings))
    try:
        config = ServerConfig()
        transport = httpx.ASGITransport(Application(ModelPool.of_engine(engine, config), config))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            yield client
    finally:
        await engine.close()


async def test_an_echo_scores_texts_as_transformers_does(http: httpx.AsyncClient, smollm2_oracle: Any) -> None:
    questions = [json.loads(line) for line in TASK.read_text("utf-8").splitlines()[3::4]]
    texts = [question["beginning"] + ending for question in questions for ending in question["endings"]]
    prompts = [(await http.post("/tokenize", json={"prompt": text})).json()["tokens"] for text in texts]
    expected = [reference(smollm2_oracle, prompt) for prompt in prompts]
    for new_tokens, sent in ((1, prompts), (0, texts)):
        body = {"prompt": sent, "max_tokens": new_tokens, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(texts)))
        for choice, text, wanted in zip(choices, texts, expected, strict=True):
            first, *scored = choice["logprobs"]["token_logprobs"]
            assert first is None
            assert choice["text"].startswith(text)
            assert len(scored) == len(wanted) + new_tokens
            difference = torch.tensor(scored[: len(wanted)]) - wanted
            assert difference.abs().max() < 1e-3, text
            assert abs(difference.sum()) < 1e-3, text
            # The likeliest token is the alternative, so that lm-eval can tell whether an answer is the greedy one.
            for token_logprob, top in zip(scored, choice["logprobs"]["top_logprobs"][1:], strict=True):
                assert max(top.values()) >= token_logprob


def reference(oracle: Any, prompt: list[int]) -> torch.Tensor:
    """The log-probability of each token after the first."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logprobs = oracle(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]
