"""A decoding batch keeps its tensors from step to step; what they hold must be what fresh ones would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aphrodite.core.plan import NO_ADAPTER, RowStart, RowStep, StepPlan
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.rows import Rows
from aphrodite.sampling.params import SamplingParams

NUM_ROWS, MAX_LEN, BLOCK = 6, 700, 16


class Requests:
    """Rows that grow by a token a step, and the plans that say so."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.known: dict[int, list[int]] = {}  # by row
        self.num_blocks: dict[int, int] = {}
        self.next_block = 0

    def start(self, row: int) -> RowStart:
        prompt = self.random.integers(0, 1000, self.random.integers(1, 40)).tolist()
        self.known[row] = prompt
        self.num_blocks[row] = 0
        slot = int(self.random.choice([NO_ADAPTER, NO_ADAPTER, NO_ADAPTER, 0, 3]))
        return RowStart(row, str(row), prompt, SamplingParams(), 0, adapter_slot=slot)

    def step(self, row: int, *, reset: bool) -> RowStep:
        """Computes the last known position."""
        if reset:
            self.num_blocks[row] = 0
        known = len(self.known[row])
        missing = -(-known // BLOCK) - self.num_blocks[row]
        blocks = list(range(self.next_block, self.next_block + missing))
        self.next_block += missing
        self.num_blocks[row] += missing
        return RowStep(row, known - 1, 1, blocks, reset, True)


def general(rows: Rows, steps: list[RowStep]) -> ForwardInputs:
    return rows.inputs(steps, np.arange(len(steps), dtype=np.int32))


def assert_same(kept: ForwardInputs, fresh: ForwardInputs) -> None:
    width = fresh.block_tables.shape[1]
    assert kept.block_tables.shape[1] >= width
    assert kept.block_tables.stride(1) == 1
    for mine, theirs in zip(kept._replace(block_tables=kept.block_tables[:, :width]), fresh, strict=True):
        if theirs is None:  # nobody has an adapter
            assert mine is None
            continue
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_kept_inputs_equal_fresh_ones(seed: int) -> None:
    requests = Requests(seed)
    draw = requests.random
    kept, fresh = Rows(NUM_ROWS, MAX_LEN, BLOCK), Rows(NUM_ROWS, MAX_LEN, BLOCK)
    batch = [4, 0, 2]
    starting = list(range(NUM_ROWS))
    for number in range(500):
        if draw.random() < 0.03:
            batch = draw.permutation(NUM_ROWS)[: draw.integers(1, NUM_ROWS + 1)].tolist()
        if draw.random() < 0.02:
            starting.append(int(draw.choice(batch)))
        starts = [requests.start(row) for row in starting]
        steps = [requests.step(row, reset=row in starting or draw.random() < 0.01) for row in batch]
        starting = [row for row in starting if row not in batch]
        plan = StepPlan(number, [], starts, steps)
        kept.apply(plan)
        fresh.apply(plan)
        # Now and then a step with a prompt in it comes between.
        mixed = draw.random() < 0.1
        assert_same(general(kept, steps) if mixed else kept.decode_inputs(steps, batch), general(fresh, steps))
        tokens = draw.integers(0, 1000, len(batch)).tolist()
        positions = [len(requests.known[row]) for row in batch]
        for rows in (kept, fresh):
            rows.append(batch, positions, tokens)
        for row, token in zip(batch, tokens, strict=True):
            requests.known[row].append(token)


def test_a_batch_that_stays_keeps_its_tensors() -> None:
    requests = Requests(0)
    rows = Rows(2, MAX_LEN, BLOCK)
    starts = [requests.start(row) for row in (1, 0)]
    seen = set()
    for number in range(BLOCK * 3):
        steps = [requests.step(row, reset=False) for row in (1, 0)]
        rows.apply(StepPlan(number, [], starts if number == 0 else [], steps))
        seen.add(id(rows.decode_inputs(steps, [1, 0])))
        for row in (1, 0):
            requests.known[row].append(5)
    assert len(seen) == 1
