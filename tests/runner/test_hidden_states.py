"""Hidden states of chosen token rows: each executor's equal transformers' `last_hidden_state`, beside its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_cases import Case
from foreign_cases import CASES as FOREIGN
from foreign_cases import ForeignCase
from torch_executor_cases import BLOCK_SIZE, Driver, prompts

from aphrodite.kernels.cpu import library
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.foreign import open_described
from aphrodite.models.foreign import ForeignLoader
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.runner.transformers_executor import TransformersExecutor

SIZE: dict[str, Any] = {"max_model_len": 512, "block_size": BLOCK_SIZE}
BLOCKS = {  # one of each order of norms and additions
    "pre_norm": Case("Llama", {"vocab_size": 211}),
    "sandwich": Case("Gemma2", {"vocab_size": 211, "query_pre_attn_scalar": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "post_norm": Case("Olmo2", {"vocab_size": 211}),
    "parallel": Case("Cohere", {"vocab_size": 211, "logit_scale": 0.5}),
}
CPU = torch.device("cpu")


def torch_executor(folder: Path) -> Any:
    opened = open_checkpoint(folder)
    return TorchExecutor(opened.spec, opened.weights, **SIZE, dtype=torch.float32, device=CPU)


def native_executor(folder: Path) -> Any:
    if library.load() is None:
        pytest.skip("the native library is not built")
    opened = open_checkpoint(folder)
    return NativeExecutor(opened.spec, opened.weights, **SIZE, activations="float32", kv_dtype="float32")


def transformers_executor(folder: Path) -> Any:
    loader = open_described(folder)
    assert isinstance(loader, ForeignLoader)
    return TransformersExecutor(loader, **SIZE, dtype=torch.float32, kv_dtype=torch.float32, device=CPU)


CASES: list[Any] = [
    *(pytest.param(case, torch_executor, id=f"torch {name}") for name, case in BLOCKS.items()),
    *(pytest.param(case, native_executor, id=f"native {name}") for name, case in BLOCKS.items()),
    *(pytest.param(FOREIGN[name], transformers_executor, id=f"transformers {name}") for name in ("gpt2", "opt")),
]


@pytest.mark.parametrize(("case", "make"), CASES)
def test_hidden_states_equal_transformers(
    case: Case | ForeignCase, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    case.model().save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    executor = make(tmp_path)
    executor.allocate_kv_cache(200)
    assert executor.hidden_declined is None
    driver = Driver(executor)
    first, second = (driver.add(tokens) for tokens in prompts(211, (40, 9)))
    driver.step([(first, 30)])
    inputs = driver.inputs([(first, 10), (second, 9)])
    index = torch.tensor([0, 9, 12, 18], dtype=torch.int32)
    with torch.no_grad():
        states = [model(torch.tensor([request.tokens])).last_hidden_state[0] for request in (first, second)]
    expected = torch.stack([states[0][30], states[0][39], states[1][2], states[1][8]])
    for wanted in ([], [9, 18]):
        chosen = inputs._replace(logits_index=torch.tensor(wanted, dtype=torch.int32))
        logits, hidden = executor.forward_hidden(chosen, index)
        assert hidden.dtype == torch.float32
        torch.testing.assert_close(hidden, expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(logits, executor.forward(chosen), rtol=0, atol=1e-5)
        assert logits.shape == (len(wanted), 211)
