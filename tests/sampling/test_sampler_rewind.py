"""Rows that go back, pause or stand beside others get what they would have got without: tokens of every stage."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import reference
from sampling_harness import EOS, Harness

from aphrodite.sampling.params import SamplingParams

Make = Callable[[int, int], Harness]
VOCAB = 97
PROMPT = [7, 8, 9, 10, 7, 8]
STATEFUL = {
    "penalties": SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.4),
    "ranged": SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, repetition_penalty_range=5),
    "dry": SamplingParams(dry_multiplier=2.0, dry_allowed_length=1, temperature=0.6),
    "ngram": SamplingParams(no_repeat_ngram_size=2),
    "xtc": SamplingParams(xtc_probability=0.5, xtc_threshold=0.05),
    "mirostat 1": SamplingParams(mirostat_mode=1, mirostat_tau=2.0, mirostat_eta=0.4),
    "mirostat 2": SamplingParams(mirostat_mode=2, mirostat_tau=2.0, mirostat_eta=0.4),
    "adaptive_p": SamplingParams(adaptive_target=0.3, adaptive_decay=0.7, min_p=0.02),
    "mirostat and adaptive_p": SamplingParams(mirostat_mode=2, mirostat_tau=3.0, adaptive_target=0.4),
    "all": SamplingParams(
        repetition_penalty=1.2, dry_multiplier=0.8, no_repeat_ngram_size=4, xtc_probability=0.4, adaptive_target=0.5
    ),
}


def model(row: int, length: int) -> np.ndarray:
    """[vocab] logits for the token after `length` others, with few likely tokens so that texts repeat."""
    rng = np.random.default_rng((row, length % 7))
    return (rng.normal(size=VOCAB) * 3).astype(np.float32)


def advance(harness: Harness, row: int, count: int) -> list[int]:
    """Sample `count` tokens of one row."""
    for _ in range(count):
        harness.sample(model(row, len(harness.rows[row].output))[None], [row])
    return harness.rows[row].output[-count:]


def go_back(harness: Harness, row: int, length: int) -> None:
    state = harness.rows[row]
    harness.sampler.rewind(row, len(state.prompt) + length)
    del state.output[length:]


@pytest.mark.parametrize("name", STATEFUL)
def test_after_going_back_the_same_tokens_follow(make: Make, name: str) -> None:
    harness = make(4, VOCAB)
    harness.start(2, STATEFUL[name], 11, PROMPT)
    first = advance(harness, 2, 40)
    rng = random.Random(1)
    for _ in range(6):
        length = rng.randrange(len(harness.rows[2].output))
        go_back(harness, 2, length)
        advance(harness, 2, rng.randint(1, 40 - length))
    go_back(harness, 2, 0)
    assert advance(harness, 2, 40) == first


@pytest.mark.parametrize("name", STATEFUL)
def test_another_way_from_an_earlier_token_equals_that_way_from_the_start(make: Make, name: str) -> None:
    """Going back and barring a token leaves what a row has that never went the first way."""
    harness = make(4, VOCAB)
    harness.start(0, STATEFUL[name], 5, PROMPT)
    first = advance(harness, 0, 25)
    go_back(harness, 0, 12)
    harness.sampler.bar(0, len(PROMPT) + 12, [first[12]])
    second = advance(harness, 0, 25)
    assert first[12] != second[0]
    harness.start(1, STATEFUL[name], 5, PROMPT)
    harness.sampler.bar(1, len(PROMPT) + 12, [first[12]])
    for _ in range(37):
        harness.sample(model(0, len(harness.rows[1].output))[None], [1])
    assert harness.rows[1].output == first[:12] + second


@pytest.mark.parametrize("name", STATEFUL)
def test_a_pause_changes_nothing(make: Make, name: str) -> None:
    """A preempted row keeps its place while others go on, end, and start in other rows."""
    harness = make(4, VOCAB)
    harness.start(0, STATEFUL[name], 5, PROMPT)
    alone = advance(harness, 0, 30)
    harness.end(0)
    harness.start(0, STATEFUL[name], 5, PROMPT)
    before = advance(harness, 0, 10)
    harness.start(1, STATEFUL[name], 6, PROMPT[::-1])
    advance(harness, 1, 12)
    harness.start(2, STATEFUL[name], 7, PROMPT[:1])
    harness.end(1)
    advance(harness, 2, 12)
    assert before + advance(harness, 0, 20) == alone


def test_neighbours_with_other_stages_change_nothing(make: Make) -> None:
    alone = {}
    for row, (name, params) in enumerate(STATEFUL.items()):
        harness = make(len(STATEFUL), VOCAB)
        harness.start(row, params, 100 + row, PROMPT)
        alone[name] = advance(harness, row, 25)
    harness = make(len(STATEFUL), VOCAB)
    for row, params in enumerate(STATEFUL.values()):
        harness.start(row, params, 100 + row, PROMPT)
    rng = random.Random(2)
    rows = list(range(len(STATEFUL)))
    while rows:  # rows at different lengths, in changing company
        some = sorted(rng.sample(rows, rng.randint(1, len(rows))))
        harness.sample(np.stack([model(row, len(harness.rows[row].output)) for row in some]), some)
        rows = [row for row in rows if len(harness.rows[row].output) < 25]
    for row, name in enumerate(STATEFUL):
        assert harness.rows[row].output == alone[name], name


@pytest.mark.parametrize("name", STATEFUL)
def test_tokens_are_those_of_the_reference(make: Make, name: str) -> None:
    harness = make(2, VOCAB)
    harness.start(1, STATEFUL[name], 9, PROMPT)
    compared = 0
    for length in range(60):
        logits = model(1, length)
        row = harness.rows[1]
        told = reference.sample(logits, row)  # on the row itself: what it remembers grows with it
        token = int(harness.sample(logits[None], [1]).token_ids[0])
        assert token == told.token or told.margin < 1e-3, (name, length)
        compared += told.margin >= 1e-3
    assert compared > 40


def test_mirostat_keeps_the_surprise_near_its_target(make: Make) -> None:
    for mode in (1, 2):
        harness = make(1, VOCAB)
        params = SamplingParams(mirostat_mode=mode, mirostat_tau=1.5, mirostat_eta=0.3)
        harness.start(0, params, 3, PROMPT)
        rng = np.random.default_rng(0)
        surprises = []
        for _ in range(250):
            logits = (rng.normal(size=VOCAB) * 1.5).astype(np.float32)
            row = harness.rows[0]
            told = reference.sample(logits, row)
            token = int(harness.sample(logits[None], [0]).token_ids[0])
            surprises.append(-np.log2(told.probabilities[token]))
        assert abs(np.mean(surprises[50:]) - 1.5) < 0.15


def test_several_barred_tokens_add_up_and_earlier_ones_come_back(make: Make) -> None:
    harness = make(1, VOCAB)
    harness.start(0, SamplingParams(temperature=0.0), 0, PROMPT)
    at = len(PROMPT) + 1
    second = [advance(harness, 0, 2)[1]]
    for _ in range(3):
        go_back(harness, 0, 1)
        harness.sampler.bar(0, at, second[-1:])
        second.append(advance(harness, 0, 1)[0])
    best = np.argsort(-model(0, 1), kind="stable")[:4]
    assert second == best.tolist()
    go_back(harness, 0, 0)  # another text begins there: what was barred behind it may come again
    assert advance(harness, 0, 2)[1] == second[0]


def test_barred_tokens_are_out_of_every_stage_s_reach(make: Make) -> None:
    best = int(model(0, 0).argmax())
    for params in (*STATEFUL.values(), SamplingParams(logit_bias={best: 100.0}), SamplingParams(temperature=0.0)):
        harness = make(1, VOCAB)
        harness.start(0, params, 1, PROMPT)
        harness.sampler.bar(0, len(PROMPT), [best, EOS])
        assert advance(harness, 0, 1)[0] not in (best, EOS)


def test_a_row_with_every_token_barred_fails_alone(make: Make) -> None:
    harness = make(2, VOCAB)
    for row in range(2):
        harness.start(row, SamplingParams(temperature=0.0), 1, PROMPT)
    harness.sampler.bar(0, len(PROMPT), range(VOCAB))
    sampled = harness.sample(np.stack([model(0, 0), model(1, 0)]), [0, 1])
    assert sampled.ok.tolist() == [False, True]


def test_a_new_request_in_the_row_has_nothing_barred(make: Make) -> None:
    harness = make(1, VOCAB)
    harness.start(0, SamplingParams(temperature=0.0), 1, PROMPT)
    free = advance(harness, 0, 1)
    harness.sampler.bar(0, len(PROMPT), free)
    harness.end(0)
    harness.start(0, SamplingParams(temperature=0.0), 1, PROMPT)
    assert advance(harness, 0, 1) == free


def test_nobody_goes_back_into_the_prompt(make: Make) -> None:
    harness = make(1, VOCAB)
    harness.start(0, SamplingParams(), 1, PROMPT)
    with pytest.raises(ValueError, match="prompt"):
        harness.sampler.rewind(0, len(PROMPT) - 1)
