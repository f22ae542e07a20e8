"""Every stage and 1,000 random combinations and orders of them against the float64 reference.

Rows of one batch use different stages and orders, so the comparison covers neighbours as well. Decisions
that are closer than float32 can tell (`Outcome.margin`) are not compared; they must be few.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
from sampling_cases import FIELDS, LOGITS, logits_of, random_params
from sampling_harness import Harness

from aphrodite.sampling.fields import from_mapping, to_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled
from aphrodite.sampling.stages.guard import GuardedStage
from aphrodite.sampling.stages.registry import all_stages

TOLERANCE = 1e-5

Make = Callable[[int, int], Harness]
RealText = tuple[list[int], np.ndarray]


def survivors_of(sampled: Sampled, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each row's tokens in order and their log-probabilities, as reported for `logprobs_mode: processed`."""
    assert sampled.logprobs is not None
    ids, logprobs = sampled.logprobs.top_ids.numpy(), sampled.logprobs.top_logprobs.numpy()
    assert ids.shape[1] == vocab
    found = []
    for row_ids, values in zip(ids, logprobs, strict=True):
        kept = values > -np.inf
        order = np.argsort(row_ids[kept])
        found.append((row_ids[kept][order], values[kept][order].astype(np.float64)))
    return found


def compare(harness: Harness, logits: np.ndarray, rows: list[int]) -> int:
    """One step of `rows` against the reference; returns how many rows were too close to call.

    Those leave `rows`, as what they remember may differ from now on, and so do rows with nothing left.
    """
    expected = harness.expect(logits, rows)
    sampled = harness.sample(logits, rows)
    close = 0
    survivors = survivors_of(sampled, harness.vocab_size)
    for entry, (row, (found, logprobs), outcome) in enumerate(zip(list(rows), survivors, expected, strict=True)):
        what = to_mapping(harness.rows[row].params)
        assert bool(sampled.ok[entry]) == (outcome.token is not None), what
        assert bool(sampled.exhausted[entry]) == (outcome.token is None), what
        if outcome.token is None or outcome.margin < TOLERANCE:
            rows.remove(row)
            close += outcome.token is not None
            continue
        assert np.array_equal(found, reference.left(outcome.logits)), what
        difference = np.abs(np.exp(logprobs) - outcome.probabilities[found])
        # Float32 rounds a logit of 10,000 to the nearest 0.001. Adaptive-p's curve multiplies rounding by up to 70.
        rounding = 2**-23 * np.abs(outcome.logits[found]).max()
        assert difference.max() < max(TOLERANCE, rounding) * (10 if "adaptive_target" in what else 1), what
        assert int(sampled.token_ids[entry]) == outcome.token, what
    return close


def start(
    harness: Harness, row: int, params: SamplingParams, g: np.random.Generator, prompt: list[int] | None = None
) -> None:
    """`params` on a row with a given or a short random prompt, all of the vocabulary reported."""
    vocab = harness.vocab_size
    params = from_mapping({"logprobs": vocab}, base=params)
    if prompt is None:
        prompt = g.integers(0, min(vocab, 200), int(g.integers(1, 30))).tolist()
    harness.start(row, params, int(g.integers(0, 2**63)), prompt)


def test_every_stage_is_known_here() -> None:
    assert FIELDS.keys() == {stage.name for stage in all_stages() if not isinstance(stage, GuardedStage)}
    assert set(reference.STAGES) == {*reference.CONSTRAINTS, *reference.ORDER, *reference.SELECTORS}


@pytest.mark.parametrize(("vocab", "steps"), [(100, 3), (8193, 1)])
@pytest.mark.parametrize("name", FIELDS)
def test_stage_alone(make: Make, name: str, vocab: int, steps: int) -> None:
    """Each kind of logits twice, several settings; flat and extreme ones included."""
    g = np.random.default_rng(len(name) + vocab)
    harness = make(2 * len(LOGITS), vocab)
    close = 0
    for row in range(2 * len(LOGITS)):
        fields = {**FIELDS[name](g, vocab), "logprobs": 0, "logprobs_mode": "processed"}
        start(harness, row, from_mapping(fields), g)
    rows = list(range(2 * len(LOGITS)))
    for _ in range(steps):
        close += compare(harness, np.stack([logits_of(g, vocab, LOGITS[row // 2]) for row in rows]), rows)
    assert close <= 2 * steps


@pytest.mark.parametrize(
    ("vocab", "batches", "rows", "steps"),
    [(100, 32, 20, 3), (8193, 10, 20, 1), (49152, 5, 20, 1), (151936, 3, 20, 1)],
)
def test_combinations(make: Make, vocab: int, batches: int, rows: int, steps: int) -> None:
    """1,000 of them in all."""
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
    assert close <= 2 + batches * rows * steps / 25


def test_combinations_on_the_logits_of_a_real_model(make: Make, real_text: RealText) -> None:
    """SmolLM2's after pieces of a text: every stage alone three times, and 250 combinations."""
    tokens, logits = real_text
    vocab = logits.shape[1]
    g = np.random.default_rng(1)
    alone = [{**FIELDS[name](g, vocab), "logprobs": 0, "logprobs_mode": "processed"} for name in FIELDS for _ in "123"]
    requests = [*map(from_mapping, alone), *(random_params(g, vocab) for _ in range(250))]
    close = 0
    for first in range(0, len(requests), 20):
        batch = requests[first : first + 20]
        harness = make(len(batch), vocab)
        places = g.integers(20, len(tokens), len(batch))
        for row, (params, place) in enumerate(zip(batch, places, strict=True)):
            start(harness, row, params, g, tokens[: place + 1])
        close += compare(harness, logits[places], list(range(len(batch))))
    assert close <= len(requests) / 25


@pytest.mark.parametrize("skew", [-1.5, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["normal", "wide", "model", "flat"])
def test_skew_is_exact_down_to_the_least_likely_token(make: Make, kind: str, skew: float) -> None:
    """Logarithms, which stages behind it look at, also where a step is too small to change the sum so far."""
    vocab = 8193
    logits = logits_of(np.random.default_rng(5), vocab, kind)[None]
    harness = make(1, vocab)
    harness.start(0, SamplingParams(skew=skew, logprobs=vocab, logprobs_mode="processed"), 1, [3])
    expected = harness.expect(logits, [0])[0].probabilities
    ((found, logprobs),) = survivors_of(harness.sample(logits, [0]), vocab)
    assert len(found) == vocab
    # Float32 logits up to 85 below the top are 4e-6 apart.
    np.testing.assert_allclose(logprobs, np.log(expected), atol=2e-5)
