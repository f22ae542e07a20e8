"""Scheduling of guided requests, rule by rule. `Harness` checks KV contents, answers and conservation along the way."""

from __future__ import annotations

import pytest
from scheduler_oracle import Harness, longest

from aphrodite.core.guidance import answer_room
from aphrodite.core.plan import StepPlan
from aphrodite.errors import InvalidRequestError

PROMPT = [5, 3, 8, 1, 9, 2, 7, 4, 6, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9]
NEGATIVE = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 3, 5, 7]


def steps_of(plan: StepPlan | None) -> list[tuple[int, int, int, bool, int]]:
    assert plan is not None
    return [(step.row, step.start, step.count, step.samples, step.guide) for step in plan.steps]


def test_both_prompts_are_computed_over_several_steps_and_meet_in_one() -> None:
    harness = Harness(max_num_batched_tokens=9)
    harness.add(PROMPT[:12], negative=NEGATIVE[:13], max_tokens=3, ignore_eos=True)
    found = []
    while harness.scheduler.has_unfinished():
        harness.step()
        found.append(steps_of(harness.plans[-1]))
    assert found == [
        [(1, 0, 9, False, -1)],
        [(0, 0, 6, False, -1), (1, 9, 3, False, -1)],  # neither computes its last token without the other
        [(0, 6, 6, True, 1), (1, 12, 1, False, -1)],
        [(0, 12, 1, True, 1), (1, 13, 1, False, -1)],
        [(0, 13, 1, True, 1), (1, 14, 1, False, -1)],
    ]
    starts = harness.plans[0].starts
    assert [(start.row, start.request_id) for start in starts] == [(0, "r0"), (1, "r0")]


def test_a_short_negative_prompt_waits_for_a_long_prompt() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(PROMPT[:18], negative=[4], max_tokens=2, ignore_eos=True)
    harness.run()
    assert [steps_of(plan) for plan in harness.plans] == [
        [(0, 0, 8, False, -1)],
        [(0, 8, 8, False, -1)],
        [(0, 16, 2, True, 1), (1, 0, 1, False, -1)],
        [(0, 18, 1, True, 1), (1, 1, 1, False, -1)],
    ]


def test_a_pair_waits_for_two_rows_and_is_not_overtaken() -> None:
    harness = Harness(max_num_seqs=3)
    harness.add(PROMPT[:4], PROMPT[:5], max_tokens=6, ignore_eos=True)
    (guided,) = harness.add(PROMPT[:6], negative=[4], max_tokens=2, ignore_eos=True)
    (late,) = harness.add(PROMPT[:7], max_tokens=2, ignore_eos=True)
    started = []
    while harness.scheduler.has_unfinished():
        harness.step()
        started += [start.request_id for start in harness.plans[-1].starts]
    assert started == ["r0", "r1", guided, guided, late]


def test_a_long_prompt_leaves_a_running_pair_its_two_tokens() -> None:
    harness = Harness(policy="priority", max_num_batched_tokens=8, num_blocks=32)
    (guided,) = harness.add(PROMPT[:4], negative=[4], max_tokens=12, ignore_eos=True, priority=1)
    harness.step()
    harness.add(PROMPT * 2, max_tokens=1, ignore_eos=True, priority=0)
    before = len(harness.outputs[guided])
    for _ in range(4):
        harness.step()
    assert len(harness.outputs[guided]) == before + 4
    harness.run()


def test_answers_of_one_request_share_both_prompts() -> None:
    harness = Harness(num_blocks=40, max_num_seqs=8, max_num_batched_tokens=64)
    harness.add(PROMPT, negative=NEGATIVE, n=3, max_tokens=1, ignore_eos=True)
    harness.run()
    computed = harness.runner.num_computed_tokens
    assert computed == len(PROMPT) + len(NEGATIVE) + 2 * (4 + 3)  # each other one the tails behind full blocks


def test_a_prompt_without_an_answer_has_no_shadow() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(PROMPT[:4], negative=[], max_tokens=0)
    harness.run()
    assert steps_of(harness.plans[0]) == [(0, 0, 4, False, -1)]


def test_an_abort_between_the_prompts_frees_both() -> None:
    for depth in (0, 2):
        harness = Harness(depth=depth, max_num_batched_tokens=6)
        (name,) = harness.add(PROMPT[:12], negative=NEGATIVE[:13], max_tokens=3)
        harness.launch()
        harness.abort(name)
        harness.run()
        assert harness.scheduler.stats().kv_usage == 0.0


def test_an_error_of_either_row_ends_the_request_once() -> None:
    harness = Harness(max_num_batched_tokens=6)
    (name,) = harness.add(PROMPT[:12], negative=NEGATIVE[:13], max_tokens=3)
    harness.runner.failing.add(name)
    (update,) = harness.step()  # a step of the shadow alone
    assert [step.row for step in harness.plans[0].steps] == [1]
    assert (update.request_id, update.finish_reason, update.error) == (name, "error", "injected")
    harness.run()


@pytest.mark.parametrize(
    ("sizes", "negative", "param"),
    [
        ({"max_num_seqs": 1}, [4], "guidance_scale"),
        ({"max_num_batched_tokens": 1}, [4], "guidance_scale"),
        ({"max_model_len": 16}, [4] * 16, "negative_prompt"),
        ({"num_blocks": 4}, [4] * 12, "negative_prompt"),
        ({}, [], "negative_prompt"),
        ({}, [-1], "negative_prompt"),
        ({}, [2**31], "negative_prompt"),
    ],
)
def test_what_could_never_run_is_refused(sizes: dict[str, int], negative: list[int], param: str) -> None:
    harness = Harness(**sizes)
    with pytest.raises(InvalidRequestError) as caught:
        harness.add(PROMPT[:4], negative=negative)
    assert caught.value.param == param
    assert not harness.scheduler.has_unfinished()


def test_room_for_the_answer_is_what_fits_twice() -> None:
    config = Harness(num_blocks=9, max_model_len=24).config
    for prompt in range(1, 25):
        for negative in range(1, 25):
            room = answer_room(prompt, negative, max_model_len=24, num_blocks=9, block_size=4)
            assert room == longest(prompt, (1,) * negative, None, config) - prompt
