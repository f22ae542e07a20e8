"""The shape that further stages rely on: finding them, orders per row, state, stages that leave nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sampling_harness import EOS, Harness

from aphrodite.sampling import plan as plan_module
from aphrodite.sampling.fields import from_mapping, parameter_table
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampler
from aphrodite.sampling.plan import DEFAULT_ORDER, compile_plan, stage_order
from aphrodite.sampling.stages.base import RowInfo, Stage, StageContext
from aphrodite.sampling.stages.guard import GuardedStage
from aphrodite.sampling.stages.registry import all_stages

INFO = RowInfo(100, frozenset({2}), 3, torch.device("cpu"))


def test_stages_are_found_in_the_documented_order() -> None:
    assert tuple(stage.name for stage in sorted(all_stages(), key=lambda stage: stage.rank)) == DEFAULT_ORDER
    fields = {row.name for row in parameter_table()}
    for stage in all_stages():
        assert set(stage.parameters) <= fields
        assert stage.is_neutral(SamplingParams())
    documented = plan_module.__doc__ or ""
    assert all(f"{stage.name} ({stage.rank})" in documented for stage in all_stages())


def test_neutral_stages_are_left_out() -> None:
    assert not compile_plan(SamplingParams(), INFO).steps
    params = SamplingParams(temperature=0.0, top_p=0.5, min_p=0.2, top_k=4, presence_penalty=1.0)
    greedy = compile_plan(params, INFO)
    assert greedy.greedy
    assert list(greedy.steps) == ["penalties"]


def test_rows_may_have_different_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """min_p before and after a high temperature leaves different survivors; neighbours keep their own order."""

    def stage_order(params: SamplingParams) -> tuple[Stage, ...]:
        stages = all_stages()
        if params.n == 2:
            return tuple(sorted(stages, key=lambda stage: (stage.name == "temperature", stage.rank)))
        return stages

    monkeypatch.setattr(plan_module, "stage_order", stage_order)
    vocab = 200
    logits = np.random.default_rng(0).normal(size=(1, vocab)).astype(np.float32)
    harness = Harness(4, vocab, native=True)
    for row in range(4):
        harness.start(row, SamplingParams(temperature=3.0, min_p=0.6, n=1 + row % 2), 100 + row, [1])
    first = set(np.flatnonzero(logits[0] / 3 >= logits.max() / 3 + np.log(0.6)).tolist())
    last = set(np.flatnonzero(logits[0] >= logits.max() + np.log(0.6)).tolist())
    assert len(last) < len(first)
    drawn: list[set[int]] = [set(), set()]
    for position in range(1, 200):
        tensor = torch.from_numpy(np.repeat(logits, 4, axis=0))
        tokens = harness.sampler.sample(tensor, range(4), [position] * 4).token_ids.tolist()
        drawn[0].update(tokens[0::2])
        drawn[1].update(tokens[1::2])
    assert drawn == [first, last]


class EvenTokensOnly(Stage):
    """Masks odd tokens, and remembers what was chosen."""

    name = "even"
    rank = 300
    parameters = ("skip_special_tokens",)
    can_empty = True

    def is_neutral(self, params: SamplingParams) -> bool:
        return params.skip_special_tokens

    def new_state(self, info: Any) -> Log:
        return Log()

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        logits[:, 1::2] = -torch.inf
        return logits


class Log:
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        self.events.append(("start", row, list(prompt_token_ids)))

    def end(self, row: int) -> None:
        self.events.append(("end", row))

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        self.events.append(("observe", list(rows), token_ids.tolist()))


def test_a_new_stage_keeps_state_and_never_empties_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from aphrodite.sampling import pipeline

    stages = tuple(sorted((*all_stages(), EvenTokensOnly()), key=lambda stage: stage.rank))
    monkeypatch.setattr(plan_module, "all_stages", lambda: stages)
    monkeypatch.setattr(pipeline, "all_stages", lambda: stages)
    harness = Harness(3, 7, native=True)
    harness.start(0, SamplingParams(temperature=0.0, skip_special_tokens=False), 1, [4])
    harness.start(1, SamplingParams(temperature=0.0), 1, [4])
    harness.start(2, SamplingParams(temperature=0.0, skip_special_tokens=False), 1, [5])
    logits = np.array([[0, 9, 3, 1, 0, 0, 0]] * 3, np.float32)
    logits[2, 0::2] = -np.inf
    sampled = harness.sample(logits, [0, 1, 2])
    assert sampled.ok.all()
    assert sampled.token_ids.tolist() == [2, 1, 1]
    harness.end(2)
    state: Any = harness.sampler._states["even"]
    assert state.events == [("start", 0, [4]), ("start", 2, [5]), ("observe", [0, 2], [2, 1]), ("end", 2)]


def test_a_taken_row_cannot_be_taken() -> None:
    harness = Harness(1, 7, native=False)
    harness.start(0, SamplingParams(), 1, [1])
    with pytest.raises(ValueError, match="row 0 is taken"):
        harness.start(0, SamplingParams(), 1, [1])


def test_logits_of_another_shape_are_refused() -> None:
    harness = Harness(1, 7, native=True)
    harness.start(0, SamplingParams(), 1, [1])
    for logits in (torch.zeros(1, 8), torch.zeros(2, 7), torch.zeros(1, 7, dtype=torch.float64)):
        with pytest.raises(ValueError, match="logits are"):
            harness.sampler.sample(logits, [0], [1])


@pytest.mark.parametrize("native", [False, True])
def test_end_tokens_outside_the_vocabulary_are_ignored(native: bool) -> None:
    history = torch.zeros(1, 8, dtype=torch.int32)
    sampler = Sampler(1, 7, frozenset({2, 7, 10**6}), history, torch.ones(1), torch.device("cpu"), native=native)
    sampler.start(0, SamplingParams(temperature=0.0, min_tokens=3), 1, [1])
    logits = torch.tensor([[0.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    assert sampler.sample(logits, [0], [1]).token_ids.tolist() == [1]


DEFAULT = [stage.name for stage in all_stages() if not stage.constraint and not isinstance(stage, GuardedStage)]
KOBOLD = [
    *("dry", "penalties", "ranged_penalties", "no_repeat_ngram", "top_k", "top_nsigma", "top_a", "tfs", "typical_p"),
    *("top_p", "min_p", "eta_cutoff", "epsilon_cutoff", "temperature", "dynatemp", "quadratic", "xtc", "skew"),
    *("mirostat", "adaptive_p"),
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, DEFAULT),
        ({"temperature_last": True}, [*DEFAULT[:4], *DEFAULT[6:17], "temperature", "dynatemp", *DEFAULT[17:]]),
        ({"sampler_order": [6, 0, 1, 3, 4, 2, 5]}, KOBOLD),
        ({"sampler_priority": ["dry"]}, DEFAULT),
        ({"sampler_priority": ["adaptive_p", "mirostat"]}, DEFAULT),
        (
            {"sampler_priority": ["xtc", "TEMPERATURE", "dry"], "temperature_last": True},
            ["xtc", *DEFAULT[1:16], "dry", *DEFAULT[17:]],
        ),
    ],
)
def test_orders(fields: dict[str, Any], expected: list[str]) -> None:
    """Stages that are named swap places among themselves; constraints lead and selectors close in every order."""
    order = [stage for stage in stage_order(from_mapping(fields)) if not isinstance(stage, GuardedStage)]
    leading = [stage.name for stage in order if stage.constraint]
    assert [stage.name for stage in order] == [*leading, *expected]


def test_greedy_requests_take_the_most_likely_token_whatever_shapes_the_draw() -> None:
    shaping = {"xtc_probability": 1.0, "typical_p": 0.1, "smoothing_factor": 1.0, "smoothing_curve": 5.0, "skew": 3.0}
    logits = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    harness = Harness(1, 50, native=True)
    harness.start(0, SamplingParams(temperature=0.0, adaptive_target=0.2, **shaping), 1, [3])
    assert harness.sample(logits, [0]).token_ids.tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("protect", [False, True])
def test_xtc_can_spare_newlines_and_special_tokens(protect: bool) -> None:
    logits = np.full((1, 20), -9.0, np.float32)
    logits[0, [EOS, 5, 8, 9]] = [5.0, 4.0, 3.0, 2.0]  # end of sequence, a newline, two words
    harness = Harness(1, 20, native=True)
    harness.start(0, SamplingParams(xtc_probability=1.0, xtc_threshold=0.01, xtc_protect=protect, top_k=4), 1, [3])
    drawn = {int(harness.sample(logits, [0]).token_ids) for _ in range(200)}
    assert drawn == ({EOS, 5, 9} if protect else {9})


def test_bad_words_are_barred_where_the_answer_holds_their_beginning() -> None:
    logits = np.zeros((1, 10), np.float32)
    harness = Harness(1, 10, native=True)
    # The prompt ends with the word's opening, which does not count.
    harness.start(0, SamplingParams(temperature=0.0, bad_words_ids=((0,), (1, 2), (3, 1, 4))), 1, [1])
    answer = []
    for best in (0, 2, 3, 1, 2, 4, 1, 4, 1, 2):
        logits[:] = 0
        logits[0, best], logits[0, 9] = 2, 1
        answer.append(int(harness.sample(logits, [0]).token_ids))
    #                0 barred, 2 is free after the prompt's 1, 2 barred after 1, 4 free after 1 9, ...
    assert answer == [9, 2, 3, 1, 9, 4, 1, 4, 1, 9]
    harness.sample(logits, [0])


def test_a_row_that_constraints_leave_empty_says_so() -> None:
    harness = Harness(3, 10, native=True)
    harness.start(0, from_mapping({"allowed_token_ids": [1, 2], "custom_token_bans": [1, 2]}), 1, [1])
    harness.start(1, from_mapping({"allowed_token_ids": [1, 2], "top_k": 1}), 1, [1])
    harness.start(2, from_mapping({"skew": 1.0}), 1, [1])
    logits = np.zeros((3, 10), np.float32)
    logits[2, 3] = np.nan
    sampled = harness.sample(logits, [0, 1, 2])
    assert sampled.ok.tolist() == [False, True, False]
    assert sampled.exhausted.tolist() == [True, False, False]
