"""Every stage and 1,000 random combinations and orders of them against the float64 reference.

Rows of one batch use different stages and orders, so the comparison covers neighbours as well. Decisions
that are closer than float32 can tell (`Outcome.margin`) are not compared; they must be few.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from sampling_cases import FIELDS, LOGITS, logits_of, random_params
from sampling_harness import Harness

from aphrodite.sampling.params import SamplingParams, from_mapping, to_mapping
from aphrodite.sampling.pipeline import Sampled
from aphrodite.sampling.stages.guard import GuardedStage
from aphrodite.sampling.stages.registry import all_stages

TOLERANCE = 1e-5

Make = Callable[[int, int], Harness]


def survivors_of(sampled: Sampled, vocab: int) -> list[dict[int, float]]:
    """Each row's tokens with their probabilities, as the sampler reports them for `logprobs_mode: processed`."""
    assert sampled.logprobs is not None
    ids, logprobs = sampled.logprobs.top_ids, sampled.logprobs.top_logprobs
    assert ids.shape[1] == vocab
    return [
        dict(zip(row_ids[kept].tolist(), values[kept].exp().tolist(), strict=True))
        for row_ids, values in zip(ids, logprobs, strict=True)
        for kept in (values > -torch.inf,)
    ]


def compare(harness: Harness, logits: np.ndarray, rows: list[int]) -> int:
    """One step of `rows` against the reference; returns how many rows were too close to call.

    Those leave `rows`, as what they remember may differ from now on, and so do rows with nothing left.
    """
    expected = harness.expect(logits, rows)
    sampled = harness.sample(logits, rows)
    close = 0
    survivors = survivors_of(sampled, harness.vocab_size)
    for entry, (row, found, outcome) in enumerate(zip(list(rows), survivors, expected, strict=True)):
        what = to_mapping(harness.rows[row].params)
        assert bool(sampled.ok[entry]) == (outcome.token is not None), what
        assert bool(sampled.exhausted[entry]) == (outcome.token is None), what
        if outcome.token is None or outcome.margin < TOLERANCE:
            rows.remove(row)
            close += outcome.token is not None
            continue
        assert found.keys() == outcome.survivors, what
        tokens = np.array(sorted(found))
        difference = np.abs(np.array([found[token] for token in tokens]) - outcome.probabilities[tokens])
        # Adaptive-p's curve multiplies rounding by up to 70.
        assert difference.max() < TOLERANCE * (10 if "adaptive_target" in what else 1), what
        assert int(sampled.token_ids[entry]) == outcome.token, what
    return close


def start(harness: Harness, row: int, params: SamplingParams, g: np.random.Generator) -> None:
    """`params` on a row with a short random prompt, all of the vocabulary reported."""
    vocab = harness.vocab_size
    params = from_mapping({"logprobs": vocab}, base=params)
    prompt = g.integers(0, min(vocab, 200), int(g.integers(1, 30))).tolist()
    harness.start(row, params, int(g.integers(0, 2**63)), prompt)


def test_every_stage_is_known_here() -> None:
    assert FIELDS.keys() == {stage.name for stage in all_stages() if not isinstance(stage, GuardedStage)}
    assert set(reference.STAGES) == {*reference.CONSTRAINTS, *reference.ORDER, *reference.SELECTORS}


@pytest.mark.parametrize("name", FIELDS)
def test_stage_alone(make: Make, name: str) -> None:
    """Each kind of logits twice, several settings; flat and extreme ones included."""
    g = np.random.default_rng(len(name))
    harness = make(2 * len(LOGITS), 100)
    close = 0
    for row in range(2 * len(LOGITS)):
        fields = {**FIELDS[name](g, 100), "logprobs": 0, "logprobs_mode": "processed"}
        start(harness, row, from_mapping(fields), g)
    rows = list(range(2 * len(LOGITS)))
    for _ in range(3):
        close += compare(harness, np.stack([logits_of(g, 100, LOGITS[row // 2]) for row in rows]), rows)
    assert close <= 6


@pytest.mark.parametrize(
    ("vocab", "batches", "rows", "steps"),
    [(100, 40, 20, 3), (8193, 8, 20, 1), (49152, 2, 15, 1), (151936, 1, 10, 1)],
)
def test_combinations(make: Make, vocab: int, batches: int, rows: int, steps: int) -> None:
    g = np.random.default_rng(vocab)
    close = 0
    for _ in range(batches):
        harness = make(rows, vocab)
        for row in range(rows):
            start(harness, row, random_params(g, vocab), g)
        running = list(range(rows))
        for _ in range(steps):
            logits = np.stack([logits_of(g, vocab, LOGITS[g.integers(len(LOGITS))]) for _ in running])
            close += compare(harness, logits, running)
    assert close <= batches * rows * steps / 10
