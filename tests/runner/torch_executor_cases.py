"""Random tiny checkpoints saved by transformers, executors that opened them as a user would, and a driver."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.torch_executor import TorchExecutor

BLOCK_SIZE = 16


def tiny_model(model_class: Any, config_class: Any, **options: Any) -> Any:
    """A float32 model whose random weights are large enough for sharp attention and varied logits."""
    sizes: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "attn_implementation": "eager",
    }
    torch.manual_seed(5)
    model = model_class(config_class(**{**sizes, **options})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def executor_of(
    model: Any, *, max_model_len: int = 512, num_blocks: int = 200, dtype: torch.dtype = torch.float32
) -> TorchExecutor:
    """An executor of a transformers model, by way of its checkpoint on disk."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = open_checkpoint(directory)
        executor = TorchExecutor(
            checkpoint.spec,
            checkpoint.weights,
            block_size=BLOCK_SIZE,
            max_model_len=max_model_len,
            dtype=dtype,
            device=torch.device("cpu"),
        )
    executor.allocate_kv_cache(num_blocks)
    return executor


class Request:
    """Tokens of one request, how many are computed, and its scattered blocks."""

    def __init__(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.blocks = list(blocks)
        self.computed = 0


class Driver:
    """Feeds an executor with steps and hands out blocks in random order."""

    def __init__(self, executor: TorchExecutor, num_blocks: int = 200, seed: int = 0) -> None:
        self.executor = executor
        self._free = np.random.default_rng(seed).permutation(num_blocks).tolist()

    def add(self, tokens: Sequence[int], capacity: int | None = None) -> Request:
        count = -(-(capacity or len(tokens)) // BLOCK_SIZE)
        return Request(tokens, [self._free.pop() for _ in range(count)])

    def step(self, work: Sequence[tuple[Request, int]]) -> list[torch.Tensor]:
        """Compute the next `count` tokens of each sequence: logits `[count, vocab]` of every one."""
        logits = self.executor.forward(self.inputs(work))
        return list(logits.clone().split([count for _, count in work]))

    def inputs(self, work: Sequence[tuple[Request, int]]) -> ForwardInputs:
        """One step's inputs, wanting logits of every token; the sequences move on."""
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for sequence, count in work:
            where = range(sequence.computed, sequence.computed + count)
            ids += [sequence.tokens[p] for p in where]
            positions += where
            slots += [sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in where]
            sequence.computed += count
            starts.append(len(ids))
            contexts.append(sequence.computed)
        # Entries beyond a sequence's blocks are garbage on purpose.
        tables = torch.full((len(work), max(len(s.blocks) for s, _ in work) + 3), -7, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            tables[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        return ForwardInputs(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
            logits_index=torch.arange(len(ids), dtype=torch.int32),
        )


def prompts(vocab_size: int, lengths: Sequence[int] = (5, 61, 300), seed: int = 1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]
