"""The torch executor on the real SmolLM2-135M (Q4_1 GGUF) against transformers in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.torch_executor import TorchExecutor

PROMPTS = [
    # A chat: "Write the opening of a ghost story set in a lighthouse."
    [1, 4093, 198, 19161, 260, 6021, 282, 253, 15534, 1977, 932, 281, 253, 33059, 30, 2, 198, 1, 520, 9531, 198],
    # "Once upon a time, in a village by the sea,"
    [6403, 1980, 253, 655, 28, 281, 253, 6560, 411, 260, 3426, 28],
]
NEW_TOKENS = 24


def load(path: Path, dtype: torch.dtype) -> TorchExecutor:
    checkpoint = open_checkpoint(path)
    executor = TorchExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=16,
        max_model_len=2048,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    executor.allocate_kv_cache(16)
    return executor


def forward(executor: TorchExecutor, batch: Sequence[Sequence[int]], computed: Sequence[int]) -> list[torch.Tensor]:
    """Compute what is new of each sequence; sequence r owns the blocks r, r + 2, r + 4, … of the cache."""
    new = [range(done, len(tokens)) for tokens, done in zip(batch, computed, strict=True)]
    counts = [len(where) for where in new]
    tables = torch.tensor([[row + 2 * block for block in range(8)] for row in range(len(batch))], dtype=torch.int32)
    slots = [int(tables[row, p // 16]) * 16 + p % 16 for row, where in enumerate(new) for p in where]
    inputs = ForwardInputs(
        token_ids=torch.tensor([batch[row][p] for row, where in enumerate(new) for p in where], dtype=torch.int32),
        positions=torch.tensor([p for where in new for p in where], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32),
        context_lens=torch.tensor([len(tokens) for tokens in batch], dtype=torch.int32),
        block_tables=tables,
        logits_index=torch.arange(sum(counts), dtype=torch.int32),
    )
    return list(executor.forward(inputs).clone().split(counts))


@pytest.fixture(scope="module")
def continued(smollm2_oracle: Any) -> list[tuple[list[int], torch.Tensor]]:
    """For each prompt: with its greedy continuation, and transformers' logits at every position."""
    results = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = smollm2_oracle.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )
            results.append((ids[0].tolist(), smollm2_oracle(ids).logits[0]))
    return results


def test_reference_mode_gives_transformers_tokens_and_logits(
    smollm2_path: Path, continued: list[tuple[list[int], torch.Tensor]]
) -> None:
    executor = load(smollm2_path, torch.float32)
    batch = [list(prompt) for prompt in PROMPTS]
    computed = [0] * len(batch)
    for _ in range(NEW_TOKENS):
        logits = forward(executor, batch, computed)
        for row, (tokens, (_, expected)) in enumerate(zip(batch, continued, strict=True)):
            torch.testing.assert_close(logits[row], expected[computed[row] : len(tokens)], rtol=0, atol=1e-3)
            computed[row] = len(tokens)
            tokens.append(int(logits[row][-1].argmax()))
    assert batch == [ids for ids, _ in continued]
    assert executor.describe()["batch invariance"].startswith("yes")


def test_packed_4_bit_fallback_stays_near_the_reference(
    smollm2_path: Path, continued: list[tuple[list[int], torch.Tensor]]
) -> None:
    executor = load(smollm2_path, torch.bfloat16)
    assert "120 x packed 4-bit" in executor.describe()["linear layers"]
    got = torch.cat(forward(executor, [ids for ids, _ in continued], [0, 0]))
    expected = torch.cat([logits for _, logits in continued])
    assert (got - expected).abs().mean() < 0.2
    assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
