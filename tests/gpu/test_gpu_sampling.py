"""The device's sampler on a GPU: like the torch stages, by its draws' distribution, without the host, in a graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))

from sampling_cases import LOGITS, logits_of, random_params
from sampling_harness import EOS, FakeTokenizer

from aphrodite.sampling.fields import from_mapping, to_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled, Sampler
from aphrodite.sampling.vocabulary import Vocabulary

VOCAB = 128_256
ROLE_PLAY = {
    "repetition_penalty": 1.1,
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": [],
    "min_p": 0.05,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "temperature": 1.1,
    "temperature_last": True,
}


class Device:
    """A sampler on the device with its runner's history; tokens are appended as they are chosen."""

    def __init__(self, num_rows: int, vocab: int, device: torch.device, *, fused: bool = True) -> None:
        self.device, self.vocab = device, vocab
        self.history = torch.zeros(num_rows + 1, 4096, dtype=torch.int32, device=device)
        self.num_prompt = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.sampler = Sampler(
            num_rows,
            vocab,
            frozenset({EOS}),
            self.history,
            self.num_prompt,
            device,
            native=fused,
            vocabulary=Vocabulary(vocab, FakeTokenizer()),
        )

    def start(self, row: int, params: SamplingParams, seed: int, prompt: list[int]) -> None:
        self.history[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.num_prompt[row] = len(prompt)
        self.sampler.start(row, params, seed, prompt)

    def sample(self, logits: torch.Tensor, rows: list[int], positions: list[int]) -> Sampled:
        sampled = self.sampler.sample(logits.clone(), rows, positions)
        self.append(sampled.token_ids, rows, positions)
        return sampled

    def append(self, token_ids: torch.Tensor, rows: list[int], positions: list[int]) -> None:
        for row, position, token in zip(rows, positions, token_ids.tolist(), strict=True):
            self.history[row, position] = token


def survivors(sampled: Sampled, entry: int) -> dict[int, float]:
    reported = sampled.logprobs_of(entry)
    assert reported is not None
    return dict(zip(reported.top_ids, np.exp(reported.top_logprobs).tolist(), strict=True))


@pytest.mark.parametrize(("vocab", "batches", "rows"), [(100, 20, 16), (8193, 10, 16), (VOCAB, 4, 16)])
def test_random_plans_equal_the_torch_stages(device: torch.device, vocab: int, batches: int, rows: int) -> None:
    """Tokens under the same noise; survivors and probabilities of those that differ, which are close calls."""
    g = np.random.default_rng(vocab)
    different = compared = 0
    for _ in range(batches):
        fused, plain = Device(rows, vocab, device), Device(rows, vocab, device, fused=False)
        everybody = list(range(rows))
        lengths, plans = list[int](), list[SamplingParams]()
        for row in everybody:
            params = from_mapping({"logprobs": 50}, base=random_params(g, vocab))
            prompt, seed = g.integers(0, min(vocab, 40), int(g.integers(1, 60))).tolist(), int(g.integers(0, 2**63))
            lengths.append(len(prompt))
            plans.append(params)
            for one in (fused, plain):
                one.start(row, params, seed, prompt)
        for step in range(2):
            logits = np.stack([logits_of(g, vocab, LOGITS[g.integers(len(LOGITS))]) for _ in everybody])
            on_device = torch.from_numpy(logits).to(device)
            positions = [length + step for length in lengths]
            first, second = (one.sample(on_device, everybody, positions) for one in (fused, plain))
            assert first.ok.tolist() == second.ok.tolist()
            assert first.exhausted.tolist() == second.exhausted.tolist()
            for entry in everybody:
                compared += 1
                if not second.ok[entry]:
                    continue
                here, there = survivors(first, entry), survivors(second, entry)
                same = int(first.token_ids[entry]) == int(second.token_ids[entry]) and here.keys() == there.keys()
                different += not same
                if same:
                    worst = max(abs(here[token] - there[token]) for token in here)
                    assert worst < 1e-4, to_mapping(plans[entry])
            fused.append(second.token_ids, everybody, positions)
    assert different <= compared / 50


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.3},
        {"min_p": 0.02},
        {"top_k": 40, "top_p": 0.95},
        {"typical": 0.9, "top_k": 500},
        {"smoothing_factor": 0.2, "min_p": 0.001},
        {"adaptive_target": 0.2, "adaptive_decay": 0.99, "min_p": 0.01},
    ],
)
def test_draws_follow_the_distribution(device: torch.device, fields: dict[str, Any]) -> None:
    """20,000 draws against the probabilities that the sampler reports, by a chi-squared test."""
    g = np.random.default_rng(3)
    rows, steps = 200, 100
    one = Device(rows, 2000, device)
    params = from_mapping({**fields, "logprobs": 2000, "logprobs_mode": "processed"})
    for row in range(rows):
        one.start(row, params, row, [5])
    logits = torch.from_numpy(np.stack([logits_of(g, 2000, "model")] * rows)).to(device)
    reported = survivors(one.sampler.sample(logits.clone(), list(range(rows)), [1] * rows), 0)
    counts = np.zeros(2000)
    for step in range(steps):
        positions = [1 if "adaptive_target" in fields else 1 + step] * rows
        if "adaptive_target" in fields:  # its state moves on; other seeds at the first position do not have any
            for row in range(rows):
                one.sampler.end(row)
                one.start(row, params, row + rows * step, [5])
        tokens = one.sampler.sample(logits.clone(), list(range(rows)), positions).token_ids
        counts += np.bincount(tokens.cpu().numpy(), minlength=2000)
    expected = np.array([reported.get(token, 0.0) for token in range(2000)]) * rows * steps
    assert counts[expected == 0].sum() == 0
    common = expected >= 10
    rest_found, rest_expected = counts[~common].sum(), expected[~common].sum()
    chi = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    chi += (rest_found - rest_expected) ** 2 / max(rest_expected, 1e-9) if rest_expected >= 10 else 0.0
    degrees = int(common.sum())
    assert chi < degrees + 4 * np.sqrt(2 * degrees) + 8


def started(device: torch.device, rows: int, vocab: int = VOCAB) -> tuple[Device, list[int]]:
    """Rows of all kinds of plans, and their positions."""
    g = np.random.default_rng(8)
    one = Device(rows, vocab, device)
    plans: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        ROLE_PLAY,
        {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"min_p": 0.05, "mirostat": 2, "mirostat_tau": 4},
        {"top_p": 0.999, "temperature": 3.0},
        {"dynatemp_low": 0.5, "dynatemp_high": 1.5, "min_p": 0.05},
        {"no_repeat_ngram_size": 3, "typical": 0.9, "logit_bias": {"5": 3.0}, "custom_token_bans": [7]},
    ]
    for row in range(rows):
        prompt = g.integers(0, 50, 100).tolist()
        one.start(row, from_mapping(plans[row % len(plans)]), 1000 + row, prompt)
    return one, [100] * rows


def model_logits(device: torch.device, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    g = np.random.default_rng(9)
    kinds = ("model", "normal", "wide")
    return torch.from_numpy(np.stack([logits_of(g, vocab, kinds[row % 3]) for row in range(rows)])).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_synchronisation_and_equal_in_a_graph(device: torch.device, dtype: torch.dtype) -> None:
    rows = 16
    logits = model_logits(device, rows).to(dtype)
    expected = []
    one, positions = started(device, rows)
    for step in range(3):
        sampled = one.sample(logits.float(), list(range(rows)), [position + step for position in positions])
        expected.append(sampled.token_ids.tolist())

    one, positions = started(device, rows)
    numbers = torch.arange(rows + 2, dtype=torch.int32, device=device).clamp(max=rows)  # two entries of padding
    at = torch.full((rows + 2,), positions[0], dtype=torch.int32, device=device)
    padded = torch.cat([logits, logits[:2]])
    token_ids = torch.zeros(rows + 2, dtype=torch.int32, device=device)
    ok, exhausted = torch.zeros(2, rows + 2, dtype=torch.bool, device=device)
    # Compile on a sampler of its own: a run moves the rows' state.
    other, _ = started(device, rows)
    launches = other.sampler.stage(list(range(rows)), positions)
    assert launches is not None
    other.sampler.run(padded, numbers, at, token_ids, ok, exhausted, launches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.sampler.run(padded, numbers, at, token_ids, ok, exhausted, launches)
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        assert one.sampler.stage(list(range(rows)), positions) == launches
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(token_ids[:rows].tolist())
        assert ok.tolist() == [True] * rows + [False] * 2
        one.history[torch.arange(rows, device=device), at[:rows].long()] = token_ids[:rows]
        at += 1
    assert found == expected


def test_eager_run_start_and_rewind_do_not_synchronise(device: torch.device) -> None:
    rows = 8
    one, positions = started(device, rows)
    logits = model_logits(device, rows)
    one.sampler.sample(logits.clone(), list(range(rows)), positions)
    torch.cuda.synchronize()
    params = from_mapping(ROLE_PLAY)
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.sampler.end(2)
        one.sampler.start(2, params, 5, [1] * 101)
        one.sampler.bar(1, 101, [5, 6, 7])
        one.sampler.sample(logits, list(range(rows)), [101] * rows)
        one.sampler.rewind(3, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_samples_the_same_beside_any_neighbours(device: torch.device) -> None:
    rows = 32
    one, positions = started(device, rows)
    logits = model_logits(device, rows)
    together = one.sampler.sample(logits.clone(), list(range(rows)), positions).token_ids.tolist()
    one, positions = started(device, rows)
    for row in range(0, rows, 3):
        alone = one.sampler.sample(logits[row : row + 1].clone(), [row], positions[:1])
        assert alone.token_ids.tolist() == [together[row]]
