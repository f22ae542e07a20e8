"""Draws follow the distribution that the reference computes, and no neighbour changes a seeded request."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import reference
import torch
from sampling_cases import FIELDS, LOGITS, logits_of, random_params
from sampling_harness import EOS, FakeTokenizer, Harness, text_of, with_marks

from aphrodite.kernels.cpu.sampling import load
from aphrodite.sampling.draw import draw
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import compile_plan
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, StageContext
from aphrodite.sampling.vocabulary import Vocabulary

# Stages whose state knows rows, which all draws of the first test share.
HISTORY = {"dry", "ranged_penalties", "no_repeat_ngram", "mirostat", "adaptive_p"}
VOCAB, DRAWS = 60, 100_000


def expected_probabilities(logits: np.ndarray, params: SamplingParams, prompt: list[int]) -> np.ndarray:
    """XTC mixes two distributions, everything else has one."""

    def of(params: SamplingParams) -> np.ndarray:
        protected = FakeTokenizer.special_ids | FakeTokenizer.newlines
        row = reference.Row(prompt, [], 0, params, frozenset({EOS}), protected, text_of)
        return reference.sample(logits, row).probabilities

    share = params.xtc_probability
    without = of(msgspec.structs.replace(params, xtc_probability=0.0))
    return (
        without
        if share == 0
        else (1 - share) * without + share * of(msgspec.structs.replace(params, xtc_probability=1.0))
    )


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in HISTORY])
def test_100_000_draws_follow_the_distribution(name: str) -> None:
    """One batch of rows that differ in their seeds alone; no stage but XTC looks at them."""
    g = np.random.default_rng(sum(name.encode()))
    logits = logits_of(g, VOCAB, "normal")
    prompt = g.integers(0, VOCAB, 6).tolist()
    params = with_marks(from_mapping(FIELDS[name](g, VOCAB)))
    device = torch.device("cpu")
    history = torch.tensor([prompt + [0] * 10], dtype=torch.int32)
    info = SamplerInfo(1, VOCAB, device, history, torch.tensor([len(prompt)]))
    plan = compile_plan(
        params, RowInfo(VOCAB, frozenset({EOS}), len(prompt), device, Vocabulary(VOCAB, FakeTokenizer()))
    )
    assert set(plan.steps) <= {name, "temperature"}
    seeds = torch.from_numpy(g.integers(-(2**63), 2**63, DRAWS))
    distinct = DRAWS if name == "xtc" else 10
    rows = torch.from_numpy(logits).repeat(distinct, 1)
    for step in plan.steps.values():
        state = step.stage.new_state(info)
        if state is not None:
            state.start(0, prompt)
        everyone = [0] * distinct
        context = StageContext(
            rows=everyone,
            index=torch.tensor(everyone),
            positions=[len(prompt)] * distinct,
            prepared=[step.prepared] * distinct,
            state=state,
            seeds=seeds[:distinct],
            token_ids=history,
            num_prompt=info.num_prompt,
        )
        rows = step.stage.apply(rows, torch.tensor([step.values]).expand(distinct, -1), context)
    rows = rows.repeat(DRAWS // distinct, 1)
    counts = np.bincount(draw(rows, seeds, torch.full((DRAWS,), len(prompt))).numpy(), minlength=VOCAB)
    check_chi_squared(counts, expected_probabilities(logits, params, prompt))


@pytest.mark.parametrize(
    ("native", "name"), [*((True, name) for name in FIELDS), (False, "mirostat"), (False, "adaptive_p")]
)
def test_100_000_draws_of_whole_requests_follow_the_distribution(name: str, native: bool) -> None:
    """Requests that differ in their seeds alone; what follows from earlier draws on both paths."""
    if native and load() is None:
        pytest.skip("the native library is not built")
    g = np.random.default_rng(sum(name.encode()))
    logits = logits_of(g, VOCAB, "normal")
    prompt = g.integers(0, 10, 12).tolist()  # short, so that it repeats itself
    params = from_mapping(FIELDS[name](g, VOCAB))
    rows = list(range(2000))
    harness = Harness(len(rows), VOCAB, native=native)
    for row in rows:
        harness.start(row, params, 0, prompt)
    fused = harness.sampler._fused
    assert (fused is not None and fused.rows == set(rows)) == native
    counts = np.zeros(VOCAB, np.int64)
    tiled = torch.from_numpy(logits).repeat(len(rows), 1)
    for _ in range(DRAWS // len(rows)):
        seeds = g.integers(0, 2**64, len(rows), dtype=np.uint64)
        if fused is not None:
            fused._table["seed"][: len(rows)] = seeds
        harness.sampler._seeds.copy_(torch.from_numpy(seeds.view(np.int64)))
        sampled = harness.sampler.sample(tiled.clone(), rows, [len(prompt)] * len(rows))
        assert sampled.ok.all()
        counts += np.bincount(sampled.token_ids.numpy(), minlength=VOCAB)
    check_chi_squared(counts, expected_probabilities(logits, params, prompt))


def check_chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's statistic, rare tokens in one bin; four standard deviations are the limit."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    rare = expected < 20
    bins = [(counts[token], expected[token]) for token in np.flatnonzero(~rare)]
    if expected[rare].sum() >= 20:
        bins.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    freedom = len(bins) - 1
    assert statistic <= freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", FIELDS)
def test_neighbours_with_every_other_stage_change_nothing(name: str) -> None:
    vocab, steps = 1000, 5
    g = np.random.default_rng(len(FIELDS) + sum(name.encode()))
    victim = from_mapping({**FIELDS[name](g, vocab), "temperature_last": bool(g.integers(2))})
    others = [from_mapping(FIELDS[other](g, vocab)) for other in FIELDS if other != name]
    others += [random_params(g, vocab) for _ in range(31 - len(others))]
    prompt = g.integers(0, 50, 20).tolist()
    logits = np.stack([logits_of(g, vocab, LOGITS[number % 4]) for number in range(steps * 32)]).reshape(steps, 32, -1)

    def tokens(place: int, neighbours: list[SamplingParams]) -> list[int]:
        harness = Harness(len(neighbours) + 1, vocab, native=True)
        harness.start(place, victim, 2**63 + 5, prompt)
        free = [row for row in range(len(neighbours) + 1) if row != place]
        for row, params in zip(free, neighbours, strict=True):
            harness.start(row, msgspec.structs.replace(params, logprobs=None), row, prompt[row % 10 :])
        chosen = []
        for step in range(steps):
            batch = logits[step, : len(neighbours) + 1].copy()
            batch[place] = logits[step, 0]
            chosen.append(int(harness.sample(batch, list(range(len(batch)))).token_ids[place]))
        return chosen

    assert tokens(0, []) == tokens(13, others)
