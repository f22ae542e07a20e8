"""Qwen3 on both CPU executors: logits and greedy answers of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch_executor_cases import Driver, executor_of, prompts, tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from aphrodite.kernels.cpu import library
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.native import NativeExecutor

STEPS = 32
SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True, **SIZES)


def native_executor(model: Any, folder: Path) -> NativeExecutor:
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    assert NativeExecutor.declines(checkpoint.spec, checkpoint.weights) is None
    executor = NativeExecutor(
        checkpoint.spec, checkpoint.weights, block_size=16, max_model_len=512, kv_dtype="float32", threads=2
    )
    executor.allocate_kv_cache(200)
    return executor


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_logits_and_greedy_tokens_equal_transformers(model: Any, kind: str, tmp_path: Path) -> None:
    if kind == "native" and library.load() is None:
        pytest.skip("the native library is not built")
    executor: Any = executor_of(model) if kind == "torch" else native_executor(model, tmp_path)
    driver = Driver(executor)
    for prompt in prompts(211, lengths=(5, 70)):
        with torch.no_grad():
            answer = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
            expected = model(answer).logits[0]
        request = driver.add(prompt, capacity=len(prompt) + STEPS)
        (logits,) = driver.step([(request, len(prompt))])
        for _ in range(STEPS):
            torch.testing.assert_close(logits[-1], expected[request.computed - 1], rtol=0, atol=1e-4)
            request.tokens.append(int(logits[-1].argmax()))
            (logits,) = driver.step([(request, 1)])
        assert request.tokens == answer[0].tolist()
