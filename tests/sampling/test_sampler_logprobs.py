"""Log-probabilities of chosen and prompt tokens against float64, raw and processed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sampling_harness import Harness

from aphrodite.core.plan import TokenLogprobs
from aphrodite.errors import RequestFailedError
from aphrodite.sampling.params import SamplingParams

Make = Callable[[int, int], Harness]


def expected(logits: np.ndarray, token: int, k: int) -> TokenLogprobs:
    """By sorting the whole vocabulary in float64."""
    wide = logits.astype(np.float64)
    logprobs = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    order = sorted(range(len(wide)), key=lambda t: (-wide[t], t))
    top = [t for t in order[:k] if np.isfinite(wide[t])]
    return TokenLogprobs(token, logprobs[token], order.index(token) + 1, top, [logprobs[t] for t in top])


def check(found: TokenLogprobs | None, wanted: TokenLogprobs) -> None:
    assert found is not None
    assert (found.token_id, found.rank, found.top_ids) == (wanted.token_id, wanted.rank, wanted.top_ids)
    assert found.logprob == pytest.approx(wanted.logprob, abs=2e-5)
    assert found.top_logprobs == pytest.approx(wanted.top_logprobs, abs=2e-5)


@pytest.mark.parametrize("vocab", [7, 100, 8193])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_raw_logprobs_are_those_of_the_model(make: Make, vocab: int, k: int) -> None:
    generator = np.random.default_rng(vocab + k)
    harness = make(3, vocab)
    harness.start(0, SamplingParams(logprobs=k, temperature=3.0, top_k=3, logit_bias={1: 5.0}), 1, [1])
    harness.start(1, SamplingParams(), 1, [1])
    harness.start(2, SamplingParams(logprobs=k, temperature=0.0, repetition_penalty=2.0), 1, [1])
    for scale in (1.0, 0.0):  # 0: every token ties
        logits = (generator.normal(size=(3, vocab)) * scale).astype(np.float32)
        logits[0, 3] = -np.inf
        sampled = harness.sample(logits, [0, 1, 2])
        assert sampled.logprobs_of(1) is None
        for row in (0, 2):
            check(sampled.logprobs_of(row), expected(logits[row], int(sampled.token_ids[row]), k))


def test_processed_logprobs_are_those_of_the_draw(make: Make) -> None:
    generator = np.random.default_rng(4)
    harness = make(3, 100)
    mode = {"logprobs": 5, "logprobs_mode": "processed"}
    harness.start(0, SamplingParams(**mode, temperature=0.7, top_k=3), 1, [1])
    harness.start(1, SamplingParams(**mode, top_p=0.8, min_p=0.05, presence_penalty=1.0), 2, [1])
    harness.start(2, SamplingParams(logprobs=2), 3, [1])
    for _ in range(4):
        logits = generator.normal(size=(3, 100)).astype(np.float32)
        outcomes = harness.expect(logits[:2], [0, 1])
        sampled = harness.sample(logits, [0, 1, 2])
        for row, outcome in enumerate(outcomes):
            check(sampled.logprobs_of(row), expected(outcome.logits, int(sampled.token_ids[row]), 5))
        check(sampled.logprobs_of(2), expected(logits[2], int(sampled.token_ids[2]), 2))


def test_prompt_logprobs(make: Make) -> None:
    harness = make(1, 1000)
    logits = np.random.default_rng(5).normal(size=(6, 1000)).astype(np.float32)
    targets = torch.tensor([0, 999, 5, 17, 17, int(logits[5].argmax())], dtype=torch.int32)
    found = harness.sampler.prompt_logprobs(torch.from_numpy(logits), targets, 4)
    for row, entry in enumerate(found):
        check(entry, expected(logits[row], int(targets[row]), 4))
    assert found[5].rank == 1
    logits[2, 3] = np.nan
    with pytest.raises(RequestFailedError):
        harness.sampler.prompt_logprobs(torch.from_numpy(logits), targets, 4)


def test_more_top_tokens_than_vocabulary(make: Make) -> None:
    harness = make(1, 7)
    harness.start(0, SamplingParams(logprobs=20), 1, [1])
    logits = np.arange(7, dtype=np.float32)[None]
    found = harness.sample(logits, [0]).logprobs_of(0)
    assert found is not None
    assert found.top_ids == [6, 5, 4, 3, 2, 1, 0]
