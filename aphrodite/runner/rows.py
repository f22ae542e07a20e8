"""Persistent per-request state of the runner: one row a request, at fixed addresses.

A step carries only differences (`StepPlan`); applying one touches nothing but the rows it names. Token
ids are written where they are sampled, so the next step can be prepared before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from aphrodite.core.plan import NO_ADAPTER, RowStep, StepPlan
from aphrodite.runner.inputs import ForwardInputs

# Columns that a decoding batch's block tables have to spare when they are made.
_SPARE_BLOCKS = 16


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
        self._adapters = np.full(num_rows, NO_ADAPTER, dtype=np.int32)  # slots
        self._decoding = _DecodeBatch([], 0, self._token_ids, self._block_tables, block_size, None)

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan changes: new prompts and block tables."""
        for start in plan.starts:
            prompt = start.prompt_token_ids
            self._token_ids[start.row, : len(prompt)] = prompt
            self._num_prompt[start.row] = len(prompt)
            self._block_counts[start.row] = 0
            if self._adapters[start.row] != start.adapter_slot:
                self._adapters[start.row] = start.adapter_slot
                self._decoding.rows = []  # it has the slots of its rows
        for step in plan.steps:
            if step.reset_blocks:
                self._block_counts[step.row] = 0
            if step.blocks:
                used = self._block_counts[step.row]
                self._block_tables[step.row, used : used + len(step.blocks)] = step.blocks
                self._block_counts[step.row] = used + len(step.blocks)

    def decode_inputs(self, steps: Sequence[RowStep], rows: list[int]) -> ForwardInputs:
        """The forward pass's tensors where each of `steps`, of `rows`, computes one token and wants its logits.

        The same object as in the step before as long as the rows are the same and in the same order.
        """
        starts = [step.start for step in steps]
        num_blocks = max(starts) // self.block_size + 1
        batch = self._decoding
        if rows != batch.rows or num_blocks > batch.max_blocks:
            width = min(num_blocks + _SPARE_BLOCKS, self._block_tables.shape[1])
            adapters = self._adapters_of(np.array(rows, dtype=np.intp))
            batch = _DecodeBatch(rows, width, self._token_ids, self._block_tables, self.block_size, adapters)
            self._decoding = batch
            batch.copy_tables(range(len(rows)))
        else:
            batch.copy_tables([place for place, step in enumerate(steps) if step.blocks or step.reset_blocks])
        return batch.advance(starts)

    def inputs(self, steps: Sequence[RowStep], logits_index: np.ndarray) -> ForwardInputs:
        """The forward pass's tensors for `steps`; sequence r is `steps[r]`."""
        # Block tables change here behind the back of the batch that decoded last.
        self._decoding.rows = []
        rows = np.array([step.row for step in steps], dtype=np.intp)
        starts = np.array([step.start for step in steps], dtype=np.int32)
        counts = np.array([step.count for step in steps], dtype=np.int32)
        query_start = np.zeros(len(steps) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
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
            adapters=self._adapters_of(rows),
        )

    def _adapters_of(self, rows: np.ndarray) -> torch.Tensor | None:
        """`[R]` slots of `rows`; None if none has an adapter."""
        slots = self._adapters[rows]
        return torch.from_numpy(slots) if (slots != NO_ADAPTER).any() else None

    def append(self, rows: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]) -> None:
        """Write the sampled `token_ids` at `positions` of `rows`."""
        known = self._token_ids
        for row, position, token_id in zip(rows, positions, token_ids, strict=True):
            known[row, position] = token_id


class _DecodeBatch:
    """Rows that decode together, one token each: inputs at fixed addresses, filled anew for every step.

    They are filled number by number, for a step runs after a forward pass that has thrown the interpreter out of the
    processor's caches: then a loop over 32 rows costs less than the first calls of ten numpy functions.

    Args:
        max_blocks: columns of its block tables.
        token_ids, block_tables: those of all rows.
        adapters: slots of its rows, None if none has an adapter.
    """

    def __init__(
        self,
        rows: list[int],
        max_blocks: int,
        token_ids: np.ndarray,
        block_tables: np.ndarray,
        block_size: int,
        adapters: torch.Tensor | None,
    ) -> None:
        count = len(rows)
        self.rows = rows
        self.max_blocks = max_blocks
        self._block_size = block_size
        self._all_tables = block_tables
        self._known = token_ids.data
        self._inputs = ForwardInputs(
            token_ids=torch.zeros(count, dtype=torch.int32),
            positions=torch.zeros(count, dtype=torch.int32),
            slot_mapping=torch.zeros(count, dtype=torch.int64),
            query_start=torch.arange(count + 1, dtype=torch.int32),
            context_lens=torch.zeros(count, dtype=torch.int32),
            block_tables=torch.zeros(count, max_blocks, dtype=torch.int32),
            logits_index=torch.arange(count, dtype=torch.int32),
            adapters=adapters,
        )
        self._tables = self._inputs.block_tables.numpy()
        self._token_ids = self._inputs.token_ids.numpy().data
        self._positions = self._inputs.positions.numpy().data
        self._slots = self._inputs.slot_mapping.numpy().data
        self._context_lens = self._inputs.context_lens.numpy().data
        self._blocks = [0] * count  # where each row's latest token goes
        self._block_numbers = [-1] * count  # which of its blocks that is

    def copy_tables(self, places: Iterable[int]) -> None:
        """Take over the block tables of the rows at `places`."""
        for place in places:
            self._tables[place] = self._all_tables[self.rows[place], : self.max_blocks]
            self._block_numbers[place] = -1

    def advance(self, starts: list[int]) -> ForwardInputs:
        """The inputs for the tokens at positions `starts`."""
        size = self._block_size
        for place, start in enumerate(starts):
            number = start // size
            if number != self._block_numbers[place]:
                self._block_numbers[place] = number
                self._blocks[place] = int(self._tables[place, number])
            self._slots[place] = self._blocks[place] * size + start % size
            self._positions[place] = start
            self._context_lens[place] = start + 1
            self._token_ids[place] = self._known[self.rows[place], start]
        return self._inputs
