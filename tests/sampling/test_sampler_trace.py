"""Traces: what is reported is what happened, and reporting changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from aphrodite.core.plan import RowResult, StageTrace, TokenTrace
from aphrodite.core.request import RequestUpdate
from aphrodite.errors import InvalidRequestError
from aphrodite.kernels.cpu.sampling import load
from aphrodite.sampling.explain import percent, why
from aphrodite.sampling.fields import MAX_TRACED_TOKENS, validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled, Sampler

VOCAB = 1000


class Rows:
    """A sampler over fixed logits."""

    def __init__(self, num_rows: int, *, native: bool) -> None:
        self.token_ids = torch.zeros(num_rows, 64, dtype=torch.int32)
        num_prompt = torch.full((num_rows,), 4, dtype=torch.int32)
        device = torch.device("cpu")
        self.sampler = Sampler(num_rows, VOCAB, frozenset({2}), self.token_ids, num_prompt, device, native=native)
        self.positions: dict[int, int] = {}

    def start(self, row: int, params: SamplingParams, seed: int) -> None:
        prompt = [5, 6, 7, 5]
        self.token_ids[row, :4] = torch.tensor(prompt, dtype=torch.int32)
        self.sampler.start(row, params, seed, prompt)
        self.positions[row] = 4

    def step(self, logits: np.ndarray, rows: list[int]) -> Sampled:
        sampled = self.sampler.sample(torch.from_numpy(logits.copy()), rows, [self.positions[row] for row in rows])
        for row, token in zip(rows, sampled.token_ids.tolist(), strict=True):
            self.token_ids[row, self.positions[row]] = token
            self.positions[row] += 1
        return sampled


@pytest.fixture(params=[False, True], ids=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Callable[[int], Rows]:
    if request.param and load() is None:
        pytest.skip("the native library is not built")
    return lambda num_rows: Rows(num_rows, native=request.param)


def logits_of(seed: int, rows: int = 1) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def check_stage(stage: StageTrace, logits: np.ndarray, token: int) -> None:
    """Against float64: counts, chances of the chosen token, and the ten most likely."""
    probabilities = softmax(logits)
    order = np.lexsort((np.arange(VOCAB), -logits))
    assert stage.candidates == int((logits > -np.inf).sum())
    assert stage.rank == int(np.flatnonzero(order == token)[0]) + 1
    assert stage.probability == pytest.approx(probabilities[token], rel=1e-5)
    count = min(10, stage.candidates)
    assert stage.top_ids == order[:count].tolist()
    assert stage.top_probabilities == pytest.approx(probabilities[order[:count]], rel=1e-5)


def test_each_stage_is_reported_as_it_is(make: Callable[[int], Rows]) -> None:
    rows = make(1)
    rows.start(0, SamplingParams(temperature=2.0, top_k=40, min_p=0.2, sampler_trace=True), 7)
    for seed in range(20):
        logits = logits_of(seed)
        trace = rows.step(logits, [0]).trace_of(0)
        assert trace is not None
        assert trace.drawn
        model, temperature, top_k, min_p = trace.stages
        assert [stage.stage for stage in trace.stages] == ["model", "temperature", "top_k", "min_p"]
        left = logits[0]
        check_stage(model, left, trace.token_id)
        left = left / 2
        check_stage(temperature, left, trace.token_id)
        left = np.where(left >= np.sort(left)[-40], left, -np.inf)
        check_stage(top_k, left, trace.token_id)
        left = np.where(left >= left.max() + math.log(0.2), left, -np.inf)
        check_stage(min_p, left, trace.token_id)
        assert 1 <= min_p.candidates < 40


def test_a_greedy_row_says_so(make: Callable[[int], Rows]) -> None:
    rows = make(1)
    rows.start(0, SamplingParams(temperature=0.0, repetition_penalty=1.3, sampler_trace=True), 7)
    trace = rows.step(logits_of(1), [0]).trace_of(0)
    assert trace is not None
    assert not trace.drawn
    assert trace.stages[-1].rank == 1
    assert [stage.stage for stage in trace.stages] == ["model", "penalties"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.3, "min_p": 0.05, "top_p": 0.9, "top_k": 50},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "temperature": 0.8, "top_p": 0.7},
        {"xtc_probability": 0.5, "xtc_threshold": 0.05, "min_p": 0.02, "temperature": 1.5, "temperature_last": True},
        {"logit_bias": {3: 5.0}, "min_tokens": 5, "typical_p": 0.9},
        {"mirostat_mode": 2, "temperature": 1.2},
        {"adaptive_target": 0.3, "min_p": 0.05},
        {"dry_multiplier": 0.8, "dry_sequence_breakers": (), "no_repeat_ngram_size": 2, "dynatemp_range": 0.5},
        {"repetition_penalty": 1.2, "repetition_penalty_range": 3, "skew": 0.3, "sampler_priority": ("skew", "min_p")},
    ],
)
def test_tracing_changes_no_token(make: Callable[[int], Rows], fields: dict[str, object]) -> None:
    plain = SamplingParams(**fields)  # type: ignore[arg-type]
    traced = msgspec.structs.replace(plain, sampler_trace=True)
    alone, beside = make(1), make(3)
    alone.start(0, plain, 99)
    beside.start(0, SamplingParams(top_p=0.5), 1)
    beside.start(1, traced, 99)
    beside.start(2, msgspec.structs.replace(traced, min_p=0.3), 2)
    for seed in range(12):
        logits = logits_of(seed, 3)
        expected = alone.step(logits[1:2], [0])
        sampled = beside.step(logits, [0, 1, 2])
        assert sampled.token_ids[1] == expected.token_ids[0]
        assert sampled.traces.keys() == {1, 2}
        trace = sampled.trace_of(1)
        assert trace is not None
        assert trace.token_id == expected.token_ids[0]
        assert trace.stages[-1].rank > 0
        assert expected.trace_of(0) is None


def test_a_request_may_trace_so_many_tokens_and_no_more() -> None:
    def check(**fields: int) -> None:
        params = SamplingParams(sampler_trace=True, **fields)  # type: ignore[arg-type]
        validate(params, vocab_size=100, max_model_len=8192, max_logprobs=20)

    check(max_tokens=MAX_TRACED_TOKENS)
    check(max_tokens=MAX_TRACED_TOKENS // 4, n=4)
    for fields in ({}, {"max_tokens": MAX_TRACED_TOKENS + 1}, {"max_tokens": MAX_TRACED_TOKENS // 4 + 1, "n": 4}):
        with pytest.raises(InvalidRequestError, match="sampler_trace") as refused:
            check(**fields)
        assert refused.value.param == "sampler_trace"


def test_traces_cross_the_wire() -> None:
    stage = StageTrace("min_p", 3, 1, 0.5, [4, 5, 6], [0.5, 0.3, 0.2])
    trace = TokenTrace(4, True, [stage])
    update = RequestUpdate("r", [4], traces=[trace])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(update), type=RequestUpdate) == update
    assert RowResult(0).trace is None


def stage_of(name: str, candidates: int, rank: int, probability: float) -> StageTrace:
    return StageTrace(name, candidates, rank, probability, [], [])


def test_words() -> None:
    model = stage_of("model", 49152, 5, 0.0161)
    drawn = TokenTrace(1, True, [model, stage_of("min_p", 5, 5, 0.05), stage_of("xtc", 3, 3, 0.16)])
    assert why(drawn) == (
        "Drawn with 16 % as number 3 of 3 candidates; the model gave it 1.61 % as number 5, and xtc moved it up by 2."
    )
    assert why(TokenTrace(1, True, [model, stage_of("xtc", 1, 1, 1.0)])).startswith("The only candidate left; ")
    greedy = TokenTrace(1, False, [stage_of("model", 9, 1, 0.5)])
    assert why(greedy) == "The most likely of 9 candidates, with 50 %; no stage was active."
    assert [percent(share) for share in (0.0, 1.0, 0.9996, 0.123456, 1e-9)] == [
        "0 %",
        "100 %",
        "100 %",
        "12.3 %",
        "<0.0001 %",
    ]
