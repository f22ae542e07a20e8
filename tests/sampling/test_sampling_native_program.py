"""Native programs leave the same tokens with the same probabilities as the torch stages, and draw the same one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
from sampling_harness import Harness

from aphrodite.kernels.cpu.sampling import NativeSampling, load
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import DEFAULT_ORDER
from aphrodite.sampling.stages.registry import all_stages

STAGES: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 4.0},
    {"dynatemp_min": 0.3, "dynatemp_max": 2.0, "dynatemp_exponent": 1.3},
    {"dynatemp_range": 0.5},
    {"top_nsigma": 1.0},
    {"top_nsigma": 3.0},
    {"top_k": 1},
    {"top_k": 30},
    {"top_k": 3000},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_a": 0.3},
    {"min_p": 0.05},
    {"min_p": 0.0001},
    {"tfs": 0.5},
    {"tfs": 0.95},
    {"tfs": 0.9999},
    {"eta_cutoff": 0.0006},
    {"epsilon_cutoff": 0.0003},
    {"epsilon_cutoff": 9.0},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"smoothing_factor": 0.3, "smoothing_curve": 1.0},
    {"smoothing_factor": 0.2, "smoothing_curve": 4.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"xtc_probability": 0.5, "xtc_threshold": 0.001, "xtc_protect": True},
    {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    {"skew": 0.7},
    {"skew": -0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.4, "presence_penalty": -0.3},
    {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "repetition_penalty_range": 4,
        "repetition_penalty_slope": 0.6,
        "repetition_decay": 3,
    },
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
    {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_range": 8, "dry_sequence_breakers": ()},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"mirostat_mode": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
    {"mirostat_mode": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.3},
    {"adaptive_target": 0.3, "adaptive_decay": 0.8},
    {"logit_bias": {3: 4.0, 5: -100.0}},
    {"custom_token_bans": (1, 3), "ban_eos_token": True},
    {"allowed_token_ids": (6, 2, 5, 4)},
    {"bad_words_ids": ((5,), (3, 4), (4, 4, 6))},
    {"min_tokens": 3, "stop_token_ids": (4, 5)},
    {"thinking_token_budget": 1},
]
KINDS = ("narrow", "wide", "ties", "masked", "equal", "model", "one")
NEUTRAL: dict[str, Any] = {"logprobs_mode": "processed"}
# The reference's margin below which float32 may decide either way: mass of 5e-7, or logits 1e-5 apart.
CLOSE = 1e-5


def logits_of(generator: np.random.Generator, vocab: int, kind: str) -> np.ndarray:
    """[vocab] float32."""
    logits = generator.normal(size=vocab) * {"narrow": 1.0, "equal": 0.0, "model": 2.5}.get(kind, 4.0)
    if kind == "ties":
        logits = np.round(logits / 2)
    elif kind == "masked":
        logits[generator.permutation(vocab)[: vocab * 3 // 4]] = -np.inf
    elif kind == "model":
        likely = generator.integers(0, vocab, max(3, vocab // 200))
        logits[likely] += generator.exponential(4.0, len(likely))
    elif kind == "one":
        logits[generator.permutation(vocab)[1:]] = -np.inf
    return logits.astype(np.float32)


class Pair:
    """The same rows on both paths.

    Attributes:
        close: rows whose paths parted where the float64 reference says that it was too close to call. They are left
            out from then on, since what they remember may differ.
    """

    def __init__(self, rows: list[dict[str, Any]], vocab: int, generator: np.random.Generator) -> None:
        self.close: set[int] = set()
        self._ended: set[int] = set()  # rows that had no token left; what follows means nothing
        self.paths = [Harness(len(rows), vocab, native=native) for native in (False, True)]
        for row, fields in enumerate(rows):
            prompt, seed = generator.integers(0, vocab, 9).tolist(), int(generator.integers(0, 2**63))
            params = SamplingParams(logprobs=vocab, **NEUTRAL, **fields)
            for path in self.paths:
                path.start(row, params, seed, prompt)
        native = self.paths[1].sampler
        assert native._fused is not None
        assert native._fused.rows == set(range(len(rows)))

    def step(self, logits: np.ndarray) -> list[str]:
        """Sample all rows on both paths; returns what differs. The native rows continue from the torch tokens."""
        rows = list(range(len(logits)))
        torch_path, native_path = self.paths
        margins = {row: self._margin(row, logits[row]) for row in rows if row not in self.close | self._ended}
        expected, found = torch_path.sample(logits, rows), native_path.sample(logits, rows)
        differences = []
        for row, margin in margins.items():
            if (why := self._difference(row, expected, found)) is None:
                continue
            if margin < CLOSE:
                self.close.add(row)
            else:
                differences.append(f"row {row}: {why} (margin {margin})")
        native_path.token_ids.copy_(torch_path.token_ids)
        for row in rows:
            native_path.rows[row].output[:] = torch_path.rows[row].output
        return differences

    def _margin(self, row: int, logits: np.ndarray) -> float:
        """How close the reference's closest decision about a row is; it remembers what it needs for the next token."""
        outcome = reference.sample(logits, self.paths[0].rows[row])
        if outcome.token is None:
            self._ended.add(row)
        return outcome.margin

    def _difference(self, row: int, expected: Any, found: Any) -> str | None:
        if bool(expected.ok[row]) != bool(found.ok[row]) or bool(expected.exhausted[row]) != bool(found.exhausted[row]):
            return f"ok {expected.ok[row]} {found.ok[row]} exhausted {expected.exhausted[row]} {found.exhausted[row]}"
        if not expected.ok[row]:
            return None
        wanted, given = expected.logprobs_of(row), found.logprobs_of(row)
        wanted_probabilities = dict(zip(wanted.top_ids, np.exp(wanted.top_logprobs), strict=True))
        given_probabilities = dict(zip(given.top_ids, np.exp(given.top_logprobs), strict=True))
        if wanted_probabilities.keys() != given_probabilities.keys():
            return f"{len(wanted_probabilities)} survivors, not {len(given_probabilities)}"
        for token, probability in wanted_probabilities.items():
            if not math.isclose(probability, given_probabilities[token], rel_tol=1e-4, abs_tol=1e-5):
                return f"token {token} has p {given_probabilities[token]}, not {probability}"
        if expected.token_ids[row] != found.token_ids[row]:
            return f"token {found.token_ids[row]}, not {expected.token_ids[row]}"
        return None


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeSampling:
    """The native sampler on one instruction set."""
    native = load(request.param)
    if native is None:
        pytest.skip(f"no native library for {request.param} here")
    monkeypatch.setattr("aphrodite.kernels.cpu.sampling.load", lambda: native)
    return native


def test_every_stage_of_ours_has_a_native_operation() -> None:
    missing = [
        stage.name
        for stage in all_stages()
        if stage.native_steps.__qualname__ == "Stage.native_steps" and stage.native is None
    ]
    assert missing == []


@pytest.mark.parametrize("vocab", [7, 100, 8193])
def test_each_stage_alone(isa: NativeSampling, vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    pair = Pair(STAGES, vocab, generator)
    differences: list[str] = []
    for step in range(7 if vocab < 1000 else 4):
        kinds = [KINDS[(row + step) % len(KINDS)] for row in range(len(STAGES))]
        differences += pair.step(np.stack([logits_of(generator, vocab, kind) for kind in kinds]))
    assert not differences
    assert len(pair.close) <= 1


def random_rows(generator: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Plans of up to six stages in a random order."""
    movable = list(DEFAULT_ORDER)
    rows = []
    for _ in range(count):
        fields: dict[str, Any] = {}
        for number in generator.permutation(len(STAGES))[: generator.integers(1, 7)]:
            fields.update(STAGES[number])
        if generator.random() < 0.7:
            fields["sampler_priority"] = tuple(generator.permutation(movable).tolist())
        rows.append(fields)
    return rows


@pytest.mark.parametrize("vocab", [7, 100, 8193])
def test_random_combinations_and_orders(isa: NativeSampling, vocab: int) -> None:
    generator = np.random.default_rng(vocab + 1)
    rows = random_rows(generator, 40 if vocab == 8193 else 150)
    pair = Pair(rows, vocab, generator)
    differences: list[str] = []
    for step in range(3):
        kinds = [KINDS[(row + step) % len(KINDS)] for row in range(len(rows))]
        found = pair.step(np.stack([logits_of(generator, vocab, kind) for kind in kinds]))
        differences += [f"{why} {kinds[int(why.split()[1][:-1])]} {rows[int(why.split()[1][:-1])]}" for why in found]
    assert not differences
    assert len(pair.close) <= len(rows) // 50
