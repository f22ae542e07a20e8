"""The sampler, on both paths, chooses the float64 reference's token under the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampling_harness import EOS, Harness

from aphrodite.sampling.params import SamplingParams

# Closer decisions than this may fall either way in float32.
TOLERANCE = 1e-5

Make = Callable[[int, int], Harness]

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"temperature": 1e-6, "top_k": 3},
    {},
    {"temperature": 0.7},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.0},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"temperature": 5.0, "top_p": 0.99},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
    {"top_p": 0.5, "min_p": 0.3, "temperature": 2.0},
    {"repetition_penalty": 1.2},
    {"repetition_penalty": 0.7, "frequency_penalty": -1.0, "presence_penalty": -2.0},
    {"logit_bias": {0: 5.0, 3: -100.0, 6: 100.0}},
    {"min_tokens": 2, "stop_token_ids": (1, 5)},
    {"min_tokens": 2, "stop_token_ids": (1,), "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
]


def logits_for(generator: np.random.Generator, vocab: int, kind: int) -> np.ndarray:
    """[vocab] float32: narrow, wide, full of ties, half masked, or all equal."""
    logits = generator.normal(size=vocab) * (1, 4, 3, 3, 0)[kind]
    if kind == 2:
        logits = np.round(logits)
    if kind == 3:
        logits[: vocab // 2] = -np.inf
    return logits.astype(np.float32)


def agree(harness: Harness, logits: np.ndarray, rows: list[int]) -> int:
    """Check one step against the reference; returns how many decisions were too close to call."""
    expected = harness.expect(logits, rows)
    sampled = harness.sample(logits, rows)
    close = 0
    for token, ok, outcome, row in zip(sampled.token_ids.tolist(), sampled.ok.tolist(), expected, rows, strict=True):
        assert ok == (outcome.token is not None)
        if not ok or token == outcome.token:
            continue
        assert outcome.margin < TOLERANCE, f"row {row}: {token}, not {outcome.token} (margin {outcome.margin})"
        close += 1
    return close


@pytest.mark.parametrize("vocab", [7, 100, 8193, 49152])
def test_every_setting_agrees_with_the_reference(make: Make, vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    harness = make(len(SETTINGS), vocab)
    for row, fields in enumerate(SETTINGS):
        prompt = generator.integers(0, vocab, 12).tolist()
        harness.start(row, SamplingParams(**fields), int(generator.integers(0, 2**64, dtype=np.uint64)), prompt)
    rows = list(range(len(SETTINGS)))
    steps = 10 if vocab < 1000 else 3
    close = 0
    for step in range(steps):
        logits = np.stack([logits_for(generator, vocab, (row + step) % 5) for row in rows])
        close += agree(harness, logits, rows)
    assert close <= 2


def hundredths(low: int, high: int) -> st.SearchStrategy[float]:
    """Numbers that clients send: differences that vanish in float32 are no test of the sampler."""
    return st.integers(low * 100, high * 100).map(lambda number: number / 100)


valid_params = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), hundredths(0, 100)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    top_k=st.one_of(st.just(-1), st.integers(0, 200)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), hundredths(0, 100).filter(bool)),
    frequency_penalty=hundredths(-2, 2),
    presence_penalty=hundredths(-2, 2),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 6), hundredths(-100, 100), max_size=5),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    params=st.lists(valid_params, min_size=1, max_size=4),
    vocab=st.sampled_from([7, 100, 8193]),
    seed=st.integers(0, 2**64 - 1),
    kinds=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_any_accepted_parameters_yield_a_survivor(
    make: Make, params: list[SamplingParams], vocab: int, seed: int, kinds: list[int]
) -> None:
    generator = np.random.default_rng(seed)
    harness = make(len(params), vocab)
    rows = list(range(len(params)))
    for row in rows:
        harness.start(row, params[row], (seed + row) % 2**64, generator.integers(0, vocab, 4).tolist())
    for _ in range(2):
        logits = np.stack([logits_for(generator, vocab, kinds[row]) for row in rows])
        expected = harness.expect(logits, rows)
        sampled = harness.sample(logits, rows)
        for token, ok, outcome in zip(sampled.token_ids.tolist(), sampled.ok.tolist(), expected, strict=True):
            assert ok == bool(outcome.survivors)
            assert not ok or token in outcome.survivors or outcome.margin < TOLERANCE


def test_neighbours_and_order_of_rows_change_nothing(make: Make) -> None:
    vocab, steps = 8193, 4
    generator = np.random.default_rng(3)
    logits = (generator.normal(size=(steps, len(SETTINGS), vocab)) * 3).astype(np.float32)
    prompts = generator.integers(0, vocab, (len(SETTINGS), 6)).tolist()

    def tokens(group: list[int]) -> dict[int, list[int]]:
        harness = make(len(SETTINGS), vocab)
        for place, number in enumerate(group):
            harness.start(place, SamplingParams(**SETTINGS[number]), 1000 + number, prompts[number])
        texts: dict[int, list[int]] = {number: [] for number in group}
        for step in range(steps):
            order = generator.permutation(len(group)).tolist()
            sampled = harness.sample(logits[step, [group[place] for place in order]], order)
            for place, token in zip(order, sampled.token_ids.tolist(), strict=True):
                texts[group[place]].append(token)
        return texts

    everyone = list(range(len(SETTINGS)))
    together = tokens(everyone)
    assert together == tokens(everyone[::-1])
    for number in everyone:
        assert tokens([number])[number] == together[number]


def test_bad_rows_fail_alone(make: Make) -> None:
    vocab = 100
    logits = np.random.default_rng(0).normal(size=(8, vocab)).astype(np.float32)
    harness = make(8, vocab)
    for row in range(8):
        params = SamplingParams(temperature=row % 2 * 1.0, top_p=0.9, min_tokens=5 if row == 7 else 0, logprobs=2)
        harness.start(row, params, row, [1])
    damaged = logits.copy()
    damaged[1, 50], damaged[2, 0], damaged[4] = np.nan, np.inf, -np.inf
    damaged[6, 99], damaged[7] = np.nan, -np.inf
    damaged[7, EOS] = 1.0  # the only possible token is one that min_tokens forbids
    expected = harness.expect(damaged, list(range(8)))
    sampled = harness.sample(damaged, list(range(8)))
    assert sampled.ok.tolist() == [True, False, False, True, False, True, False, False]
    for row in (0, 3, 5):
        assert sampled.token_ids[row] == expected[row].token
    assert all(sampled.token_ids[row] == 0 for row in (1, 2, 4, 6, 7))


def test_masked_logits_are_never_drawn(make: Make) -> None:
    harness = make(1, 100)
    harness.start(0, SamplingParams(temperature=100.0), 5, [1])
    logits = np.full((1, 100), -np.inf, np.float32)
    logits[0, [17, 80]] = 0.0
    assert {harness.sample(logits, [0]).token_ids.item() for _ in range(50)} == {17, 80}


def test_seeds_decide_the_text_and_rows_can_be_taken_again(make: Make) -> None:
    logits = np.random.default_rng(1).normal(size=(1, 8193)).astype(np.float32)
    harness = make(2, 8193)

    def text(row: int, seed: int) -> list[int]:
        harness.start(row, SamplingParams(frequency_penalty=0.5), seed, [1, 2, 3])
        tokens = [int(harness.sample(logits, [row]).token_ids) for _ in range(10)]
        harness.end(row)
        return tokens

    first = text(0, 2**64 - 1)
    assert text(1, 2**64 - 1) == first
    assert text(0, 2**63 - 1) != first
    assert text(0, 2**64 - 1) == first


@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(make: Make, fields: dict[str, Any]) -> None:
    vocab, draws = 50, 4000
    logits = np.random.default_rng(2).normal(size=(1, vocab)).astype(np.float32)
    harness = make(8, vocab)
    for row in range(8):
        harness.start(row, SamplingParams(**fields), 77 + row, [1])
    outcome = harness.expect(logits, [0])[0]
    expected = np.exp(outcome.logits - outcome.logits.max())
    expected *= draws / expected.sum()
    counts = np.zeros(vocab)
    tiled = np.repeat(logits, 8, axis=0)
    for position in range(1, draws // 8 + 1):
        sampled = harness.sampler.sample(_tensor(tiled), list(range(8)), [position] * 8)
        np.add.at(counts, sampled.token_ids.numpy(), 1)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())
