"""The sampler on the device, under the interpreter, against the float64 reference: survivors, probabilities, draws."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "sampling"))

import reference
from sampling_cases import FIELDS, LOGITS, logits_of, random_params
from sampling_harness import EOS, FakeTokenizer, text_of, with_marks

from aphrodite.kernels.triton.logprobs import top_logprobs
from aphrodite.sampling.fields import from_mapping, to_mapping
from aphrodite.sampling.followers import TokenFollower
from aphrodite.sampling.fused import Choices
from aphrodite.sampling.logprobs import LogprobTensors
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import compile_plan
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo
from aphrodite.sampling.triton_fused import TritonSampler
from aphrodite.sampling.vocabulary import Vocabulary

CPU = torch.device("cpu")
TOLERANCE = 1e-5
# What has no kernel, so that these rows go through the torch stages.
DECLINED = {"tfs", "skew", "ranged_penalties"}


class Rows:
    """A TritonSampler with its runner's history, and the reference's view of every row."""

    def __init__(self, num_rows: int, vocab: int) -> None:
        self.vocab = vocab
        self.history = torch.zeros(num_rows + 1, 128, dtype=torch.int32)
        num_prompt = torch.zeros(num_rows, dtype=torch.int32)
        self.sampler = TritonSampler(SamplerInfo(num_rows, vocab, CPU, self.history, num_prompt))
        self.vocabulary = Vocabulary(vocab, FakeTokenizer())
        self.rows: dict[int, reference.Row] = {}
        self.followers: dict[int, tuple[TokenFollower, ...]] = {}

    def start(
        self, row: int, params: SamplingParams, seed: int, prompt: Sequence[int], mode: str = "processed"
    ) -> bool:
        """Whether the sampler takes the row."""
        params = with_marks(from_mapping({"logprobs": self.vocab, "logprobs_mode": mode}, base=params))
        self.history[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        plan = compile_plan(params, RowInfo(self.vocab, frozenset({EOS}), len(prompt), CPU, self.vocabulary))
        if not self.sampler.start(row, plan, seed, len(prompt)):
            return False
        self.followers[row] = plan.followers
        protected = FakeTokenizer.special_ids | FakeTokenizer.newlines
        self.rows[row] = reference.Row(list(prompt), [], seed, params, frozenset({EOS}), protected, text_of)
        return True

    def sample(
        self, logits: np.ndarray, rows: Sequence[int], barred: Mapping[int, set[int]] | None = None
    ) -> tuple[Choices, LogprobTensors]:
        positions = [len(self.rows[row].prompt) + len(self.rows[row].output) for row in rows]
        for row, position in zip(rows, positions, strict=True):
            for follower in self.followers[row]:
                follower.refresh(position)
        place = self.sampler.choices(len(rows))
        choices = place.tensors
        reported, _ = self.sampler.sample(torch.from_numpy(logits.copy()), None, rows, positions, barred or {}, place)
        assert reported is not None
        for row, position, token in zip(rows, positions, choices.token_ids.tolist(), strict=True):
            self.history[row, position] = token
            self.rows[row].output.append(token)
            for follower in self.followers[row]:
                follower.tell(position, token)
        return choices, reported

    def compare(self, logits: np.ndarray, rows: list[int]) -> int:
        """One step against the reference; rows too close to call, which are counted, and ended ones leave `rows`."""
        expected = [reference.sample(raw, self.rows[row]) for raw, row in zip(logits, rows, strict=True)]
        choices, reported = self.sample(logits, rows)
        close = 0
        for entry, (row, outcome) in enumerate(zip(list(rows), expected, strict=True)):
            what = to_mapping(self.rows[row].params)
            assert bool(choices.ok[entry]) == (outcome.token is not None), what
            assert bool(choices.exhausted[entry]) == (outcome.token is None), what
            if outcome.token is None or outcome.margin < TOLERANCE:
                rows.remove(row)
                close += outcome.token is not None
                continue
            pairs = zip(reported.top_ids[entry].tolist(), reported.top_logprobs[entry].tolist(), strict=True)
            found = {token: math.exp(logprob) for token, logprob in pairs if logprob > -math.inf}
            assert found.keys() == outcome.survivors, what
            worst = max(abs(probability - outcome.probabilities[token]) for token, probability in found.items())
            assert worst < TOLERANCE * (10 if "adaptive_target" in what else 1), what
            assert int(choices.token_ids[entry]) == outcome.token, what
        assert not (self.sampler.kernels.marks & ~0x3FF00000).any(), "marks of this step stay behind"
        return close


def prompt_of(g: np.random.Generator, vocab: int) -> list[int]:
    """Short, of few different tokens, so that it repeats itself."""
    return g.integers(0, min(vocab, int(g.choice([6, 12, 200]))), int(g.integers(1, 30))).tolist()


@pytest.mark.parametrize("name", FIELDS)
def test_stage_alone(name: str) -> None:
    """Each kind of logits; flat and extreme ones included."""
    g = np.random.default_rng(len(name))
    rows = Rows(len(LOGITS), 100)
    taken = [
        row
        for row in range(len(LOGITS))
        if rows.start(row, from_mapping(FIELDS[name](g, 100)), int(g.integers(0, 2**63)), prompt_of(g, 100))
    ]
    if name in DECLINED:
        assert not taken
        return
    assert len(taken) == len(LOGITS) or name in {"mirostat", "dry"}
    for _ in range(3 if name in {"mirostat", "adaptive_p"} else 1):
        assert rows.compare(np.stack([logits_of(g, 100, LOGITS[row]) for row in taken]), taken) <= 2


@pytest.mark.parametrize("batch", range(6))
def test_combinations_and_orders(batch: int) -> None:
    g = np.random.default_rng(100 + batch)
    rows, vocab = Rows(8, 300), 300
    running: list[int] = []
    while len(running) < 8:
        if rows.start(len(running), random_params(g, vocab), int(g.integers(0, 2**63)), prompt_of(g, vocab)):
            running.append(len(running))
    close = 0
    for _ in range(2):
        logits = np.stack([logits_of(g, vocab, LOGITS[g.integers(len(LOGITS))]) for _ in running])
        close += rows.compare(logits, running)
    assert close <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"min_p": 1e-6, "top_p": 0.9, "temperature": 1.5},
        {"top_k": 2000, "xtc_probability": 1, "xtc_threshold": 0.0005},
        {"top_p": 0.99, "typical": 0.8, "smoothing_factor": 0.2},
        {"mirostat": 2, "mirostat_tau": 11},
        {"adaptive_target": 0.3},
        {"no_repeat_ngram_size": 1, "allowed_token_ids": [3, 4]},
        {"temperature": 0, "no_repeat_ngram_size": 1, "allowed_token_ids": [3, 4]},
    ],
)
def test_more_survivors_than_a_list_holds(fields: dict[str, Any]) -> None:
    g = np.random.default_rng(5)
    rows = Rows(1, 2600)
    assert rows.start(0, from_mapping(fields), 77, [3, 4, 9, 4])
    assert rows.compare(logits_of(g, 2600, "normal")[None], [0]) == 0


@pytest.mark.parametrize("breakers", [["\n"], ["t1 t2"], ["1 t2 t3", "t3 "], ["t0 t1 t0 t1 t0"]])
def test_dry_breakers_of_several_tokens(breakers: list[str]) -> None:
    g = np.random.default_rng(9)
    rows = Rows(6, 50)
    fields = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_sequence_breakers": breakers}
    for row in range(6):
        prompt = g.integers(0, 4, 60).tolist()
        assert rows.start(row, from_mapping(fields), row, prompt)
    rows.compare(np.stack([logits_of(g, 50, "normal") for _ in range(6)]), list(range(6)))


def test_bad_logits_end_their_row_alone() -> None:
    g = np.random.default_rng(1)
    rows = Rows(4, 200)
    for row in range(4):
        assert rows.start(row, from_mapping({"min_p": 0.1}), row, [1])
    logits = np.stack([logits_of(g, 200, "normal") for _ in range(4)])
    logits[0, 150], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    choices, _ = rows.sample(logits, [0, 1, 2, 3])
    assert choices.ok.tolist() == [False, False, False, True]
    assert choices.exhausted.tolist() == [False, False, True, False]
    assert choices.token_ids[:3].tolist() == [0, 0, 0]


def test_padding_and_rows_of_the_other_path_are_left_alone() -> None:
    g = np.random.default_rng(2)
    rows = Rows(3, 200)
    assert rows.start(1, from_mapping({"repetition_penalty": 1.2}), 5, [1, 2])
    logits = torch.from_numpy(np.stack([logits_of(g, 200, "normal") for _ in range(3)]))
    token_ids, ok, exhausted = Choices.empty(3, CPU)
    ok[:] = True
    places = torch.tensor([3, 1, 0]).int(), torch.tensor([0, 2, 7]).int()
    rows.sampler.run(logits, *places, token_ids, ok, exhausted, rows.sampler.stage([1], [2], {}))
    assert ok.tolist() == [False, True, False]
    assert rows.sampler.kernels.counts.count_nonzero() == len({1, 2, int(token_ids[1])})


def test_barred_tokens_are_barred_at_their_position_alone() -> None:
    rows = Rows(2, 150)
    for row, fields in enumerate(({"temperature": 0}, {"top_k": 3})):
        assert rows.start(row, from_mapping(fields), 3, [1, 2, 3])
    logits = np.stack([np.linspace(0, 30, 150, dtype=np.float32)] * 2)
    choices, _ = rows.sample(logits, [0, 1], {0: {149, 148}, 1: {149}})
    assert int(choices.token_ids[0]) == 147
    assert int(choices.token_ids[1]) in {148, 147, 146}
    choices, _ = rows.sample(logits, [0, 1])
    assert int(choices.token_ids[0]) == 149


def test_the_models_log_probabilities_are_those_before_grammars_and_budgets() -> None:
    g = np.random.default_rng(8)
    rows, vocab = Rows(3, 100), 100
    for row, fields in enumerate(({"guided_regex": "(?:t[0-9]*[78] )*"}, {"thinking_token_budget": 0}, {"min_p": 0.1})):
        assert rows.start(row, from_mapping(fields), 3, [1, 2, 3], mode="raw")
    for forced in (4, 3):  # the two tokens of the mark
        logits = np.stack([logits_of(g, vocab, "normal") for _ in range(3)])
        choices, reported = rows.sample(logits, [0, 1, 2])
        tokens = choices.token_ids.tolist()
        assert tokens[0] % 10 in (7, 8)
        assert tokens[1] == forced
        raw = logits.astype(np.float64)
        raw -= np.log(np.exp(raw).sum(-1, keepdims=True))
        for entry, token in enumerate(tokens):
            assert math.isclose(float(reported.logprobs[entry]), raw[entry, token], abs_tol=1e-4)
            assert int(reported.top_ids[entry, 0]) == int(raw[entry].argmax())


def tokens_of(rows: Rows, logits: np.ndarray, row: int, steps: int) -> list[int]:
    return [int(rows.sample(logits[None], [row])[0].token_ids[0]) for _ in range(steps)]


@pytest.mark.parametrize(
    "fields", [{"presence_penalty": 1.5, "repetition_penalty": 1.3}, {"mirostat": 2, "mirostat_tau": 3}]
)
def test_rewind_gives_the_same_tokens_again(fields: dict[str, Any]) -> None:
    rows = Rows(2, 120)
    logits = logits_of(np.random.default_rng(4), 120, "normal")
    assert rows.start(1, from_mapping(fields), 11, [4, 5, 6])
    first = tokens_of(rows, logits, 1, 5)
    rows.sampler.rewind(1, 5)
    rows.rows[1].output = first[:2]
    assert tokens_of(rows, logits, 1, 3) == first[2:]


def test_a_row_can_be_taken_again() -> None:
    """Nothing of the request before stays: neither bans nor counts."""
    g = np.random.default_rng(6)
    rows = Rows(1, 100)
    for _ in range(2):
        assert rows.start(0, from_mapping({"allowed_token_ids": [1, 2], "repetition_penalty": 2.0}), 1, [1, 1])
        rows.compare(logits_of(g, 100, "normal")[None], [0])
        rows.sampler.end(0)
    assert rows.start(0, from_mapping({"repetition_penalty": 1.5}), 1, [50])
    rows.compare(logits_of(g, 100, "normal")[None], [0])
    assert rows.sampler.kernels.marks.count_nonzero() == 0


def _plan(fields: Mapping[str, Any], vocab: int, tokens: Iterable[int] = ()) -> bool:
    return Rows(1, vocab).start(0, from_mapping(dict(fields)), 0, list(tokens) or [1])


def test_plans_without_a_kernel_are_declined() -> None:
    assert not _plan({"mirostat": 1}, 100)
    assert not _plan({"dry_multiplier": 1, "dry_base": 1.001}, 100)
    assert not _plan({"logit_bias": {str(token): 1.0 for token in range(256)}}, 300)
    assert _plan({"logit_bias": {str(token): 1.0 for token in range(255)}}, 300)


@pytest.mark.parametrize(("vocab", "k", "dtype"), [(100, 5, "float32"), (300, 20, "float16"), (9000, 3, "float32")])
def test_logprobs_without_sorting(vocab: int, k: int, dtype: str) -> None:
    """Ties, masked tokens and fewer candidates than asked for included."""
    g = np.random.default_rng(vocab)
    logits = np.stack([logits_of(g, vocab, kind) for kind in ("normal", "model", "flat", "wide")]).astype(dtype)
    logits[2] = np.round(logits[2])
    logits[3, : vocab - 2] = -np.inf
    entries, tokens = np.array([3, 0, 2, 1]), np.array([vocab - 1, 7, vocab // 2, 0])
    found = top_logprobs(torch.from_numpy(logits), torch.from_numpy(entries), torch.from_numpy(tokens), k)
    for number, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
        row = logits[entry].astype(np.float64)
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        order = np.lexsort((np.arange(vocab), -row))
        listed = order[: min(k, int((row > -np.inf).sum()))]
        assert abs(float(found.logprobs[number]) - logprobs[token]) < 1e-5
        assert int(found.ranks[number]) == int(np.flatnonzero(order == token)[0]) + 1
        assert found.top_ids[number, : len(listed)].tolist() == listed.tolist()
        assert np.abs(found.top_logprobs[number, : len(listed)].numpy() - logprobs[listed]).max() < 1e-5
        assert (found.top_logprobs[number, len(listed) :] == -math.inf).all()
