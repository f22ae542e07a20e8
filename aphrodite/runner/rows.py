"""Persistent per-request state of the runner: one row a request, at fixed addresses.

A step carries only differences (`StepPlan`); applying one touches nothing but the rows it names. Token
ids are written where they are sampled, so the next step can be prepared before the host has seen them.
"""

from __future__ import annotations

import numpy as np
import torch

from aphrodite.core.plan import RowStep, StepPlan
from aphrodite.runner.inputs import ForwardInputs


class Rows:
    """Token ids, block tables and lengths of up to `num_rows` requests, and the inputs made from them.

    Attributes:
        token_ids: `[num_rows, max_model_len + 1]` int32; the extra column takes the token sampled at
            the last position of a full context.
        num_prompt: `[num_rows]` int32, prompt lengths.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(num_rows, max_model_len + 1, dtype=torch.int32)
        self.num_prompt = torch.zeros(num_rows, dtype=torch.int32)
        self._token_ids = self.token_ids.numpy()
        self._num_prompt = self.num_prompt.numpy()
        self._block_tables = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._block_counts = [0] * num_rows

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan changes: new prompts and block tables."""
        for start in plan.starts:
            prompt = start.prompt_token_ids
            self._token_ids[start.row, : len(prompt)] = prompt
            self._num_prompt[start.row] = len(prompt)
            self._block_counts[start.row] = 0
        for step in plan.steps:
            if step.reset_blocks:
                self._block_counts[step.row] = 0
            if step.blocks:
                used = self._block_counts[step.row]
                self._block_tables[step.row, used : used + len(step.blocks)] = step.blocks
                self._block_counts[step.row] = used + len(step.blocks)

    def inputs(self, steps: list[RowStep], logits_index: np.ndarray) -> ForwardInputs:
        """The forward pass's tensors for `steps`; sequence r is `steps[r]`."""
        rows = np.array([step.row for step in steps], dtype=np.intp)
        starts = np.array([step.start for step in steps], dtype=np.int32)
        counts = np.array([step.count for step in steps], dtype=np.int32)
        query_start = np.zeros(len(steps) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        if total == len(steps):  # decode only: one token a sequence
            token_rows, positions = rows, starts
        else:
            token_rows = np.repeat(rows, counts)
            positions = np.arange(total, dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
        context_lens = starts + counts
        num_blocks = -(-int(context_lens.max()) // self.block_size)
        blocks = self._block_tables[token_rows, positions // self.block_size].astype(np.int64)
        return ForwardInputs(
            token_ids=torch.from_numpy(self._token_ids[token_rows, positions]),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(blocks * self.block_size + positions % self.block_size),
            query_start=torch.from_numpy(query_start),
            context_lens=torch.from_numpy(context_lens),
            block_tables=torch.from_numpy(self._block_tables[rows, :num_blocks]),
            logits_index=torch.from_numpy(logits_index),
        )

    def append(self, rows: list[int], positions: list[int], token_ids: torch.Tensor) -> None:
        """Write the sampled `token_ids` `[L]` at `positions` of `rows`."""
        self._token_ids[rows, positions] = token_ids.numpy()
