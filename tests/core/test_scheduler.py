"""The scheduler's rules, one by one. `Harness` checks KV contents, answers and conservation along the way."""

from __future__ import annotations

import pytest
from scheduler_oracle import EOS, Harness, expected_answer, sampled
from scripted_scheduler import PROMPT, Scripted, steps_of

from aphrodite.core.plan import RowResult, StepResult
from aphrodite.core.request import Request
from aphrodite.errors import ConfigError, InvalidRequestError, QueueFullError
from aphrodite.sampling.params import SamplingParams

# Refusals


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "at least one"),
        ([1] * 64, "has 64 tokens and needs room for 65, but the context length is 64"),
        ([2**31], "32-bit"),
        ([1.5], "32-bit"),
        ([3, -1], "negative"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused_with_the_reason(prompt, words):
    harness = Harness(num_blocks=100)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        harness.add(prompt)
    assert caught.value.param == "prompt"
    assert not harness.scheduler.has_unfinished()


def test_a_prompt_larger_than_the_cache_is_refused_with_numbers():
    harness = Harness(num_blocks=5)
    with pytest.raises(InvalidRequestError, match=r"20 tokens and needs room for 21.* holds 20 \(5 blocks of 4\)"):
        harness.add(PROMPT[:20])
    harness.add(PROMPT[:20], max_tokens=0)
    harness.add(PROMPT[:19])
    harness.run()


def test_a_refused_group_leaves_nothing():
    scheduler = Harness().scheduler
    good = Request("a", [1, 2], SamplingParams(), 0)
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add([good, Request("a", [1, 2], SamplingParams(), 0)])
    with pytest.raises(ValueError, match="same prompt"):
        scheduler.add([good, Request("b", [1, 3], SamplingParams(), 0)])
    assert scheduler.num_waiting == 0
    scheduler.add(good)
    with pytest.raises(InvalidRequestError, match="in use"):
        scheduler.add(Request("a", [1, 2], SamplingParams(), 0))


def test_queue_limit_counts_requests_beyond_free_rows_and_groups_whole():
    harness = Harness(max_num_seqs=2, max_queued_requests=3)
    harness.add([1, 2], [1, 2])
    harness.launch()
    harness.add([1, 2], n=3)
    with pytest.raises(QueueFullError) as caught:
        harness.add([1, 2])
    assert caught.value.retry_after > 0
    harness.abort("r4")
    with pytest.raises(QueueFullError):
        harness.add([1, 2], n=2)
    harness.add([1, 2])
    harness.run()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_blocks": 0},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"max_queued_requests": -1},
        {"policy": "x"},
    ],
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Harness(**wrong)


# The budget


def test_long_prompts_are_computed_in_chunks_and_decoding_goes_on():
    harness = Harness(max_num_batched_tokens=8)
    harness.add([1, 2, 3], ignore_eos=True, max_tokens=9)
    harness.step()
    harness.add(PROMPT[:20], ignore_eos=True, max_tokens=2)
    harness.step()
    harness.step()
    harness.step()
    row = harness.plans[1].steps[1].row
    assert [steps_of(plan) for plan in harness.plans[1:]] == [
        [(0, 3, 1, True), (row, 0, 7, False)],
        [(0, 4, 1, True), (row, 7, 7, False)],
        [(0, 5, 1, True), (row, 14, 6, True)],
    ]
    harness.run()


def test_prompts_take_less_of_a_step_beside_answers():
    harness = Harness(max_num_batched_tokens=8, prompt_tokens_beside_answers=3)
    harness.add(PROMPT[:10], ignore_eos=True, max_tokens=4)
    harness.step()
    harness.step()
    harness.add(PROMPT[10:24], ignore_eos=True, max_tokens=1)
    harness.run()
    assert [[step.count for step in plan.steps] for plan in harness.plans] == [
        [8],  # nobody waits for it
        [2],
        [1, 3],
        [1, 4],  # its row's own token, too
        [1, 4],
        [3],
    ]


def test_requests_are_admitted_in_order_of_arrival():
    harness = Harness(max_num_seqs=2)
    harness.add([1], [2], [3], ignore_eos=True, max_tokens=2)
    plan = harness.launch()
    assert plan is not None
    assert [start.request_id for start in plan.starts] == ["r0", "r1"]
    harness.run()
    assert [start.request_id for plan in harness.plans for start in plan.starts] == ["r0", "r1", "r2"]


def test_max_tokens_is_never_reserved():
    harness = Harness(num_blocks=16, max_model_len=64)
    harness.add(*[[i] for i in range(1, 5)], max_tokens=60)
    plan = harness.launch()
    assert plan is not None
    assert len(plan.steps) == 4
    assert [len(step.blocks) for step in plan.steps] == [1] * 4


# Ends


def test_end_of_sequence_ends_without_a_stop_reason():
    update = Scripted().next(EOS)
    assert (update.token_ids, update.finish_reason, update.stop_reason) == ([EOS], "stop", None)


def test_ignored_end_of_sequence_goes_on():
    assert Scripted(params={"ignore_eos": True}).next(EOS).finish_reason is None


def test_stop_token_is_named():
    update = Scripted(params={"stop_token_ids": (7,)}).next(7)
    assert (update.finish_reason, update.stop_reason) == ("stop", 7)


def test_min_tokens_holds_back_both():
    scripted = Scripted(params={"min_tokens": 2, "stop_token_ids": (7,)})
    assert scripted.next(EOS).finish_reason is None
    assert scripted.next(7).finish_reason is None
    assert scripted.next(7).finish_reason == "stop"


def test_max_tokens_and_context_end_with_length():
    scripted = Scripted(params={"max_tokens": 2})
    assert [scripted.next().finish_reason, scripted.next().finish_reason] == [None, "length"]
    scripted = Scripted(max_model_len=6)
    assert [scripted.next().finish_reason, scripted.next().finish_reason] == [None, "length"]


def test_a_stop_on_the_last_token_is_a_stop():
    assert Scripted(params={"max_tokens": 1}).next(EOS).finish_reason == "stop"


def test_max_tokens_zero_computes_the_prompt_only():
    harness = Harness(max_num_batched_tokens=8)
    harness.add(PROMPT[:20], max_tokens=0, prompt_logprobs=1)
    harness.run()
    assert not any(step.samples for plan in harness.plans for step in plan.steps)
    assert harness.ended["r0"].finish_reason == "length"
    assert harness.outputs["r0"] == []


def test_a_request_ends_at_the_capacity_of_the_whole_pool():
    harness = Harness(num_blocks=3, max_model_len=1000)
    harness.add([1, 2, 3], ignore_eos=True)
    harness.run()
    assert harness.ended["r0"].finish_reason == "length"
    assert len(harness.outputs["r0"]) == 9


# Ahead of the device


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_end_known_in_advance_wastes_no_step(depth):
    harness = Harness(depth=depth)
    harness.add([1, 2, 3], ignore_eos=True, max_tokens=5)
    harness.run()
    assert [step.start for plan in harness.plans for step in plan.steps] == [0, 3, 4, 5, 6]


def test_plans_ahead_name_the_position_of_a_token_not_yet_known():
    scripted = Scripted()
    plans = [scripted.plan() for _ in range(3)]
    assert [steps_of(plan) for plan in plans] == [[(0, 0, 4, True)], [(0, 4, 1, True)], [(0, 5, 1, True)]]
    assert [plan.steps[0].reset_blocks for plan in plans] == [True, False, False]
    assert [scripted.commit(plan, token)[0].token_ids for plan, token in zip(plans, (1, 2, 3), strict=True)] == [
        [1],
        [2],
        [3],
    ]


def test_a_late_end_drops_the_wasted_token_and_keeps_the_row_until_it_has_come_back():
    scripted = Scripted(max_num_seqs=1)
    first, wasted = scripted.plan(), scripted.plan()
    scripted.add("b")
    assert scripted.commit(first, EOS)[0].finish_reason == "stop"
    assert not scripted.scheduler.stats().kv_usage
    assert scripted.scheduler.schedule() is None
    assert scripted.commit(wasted) == []
    plan = scripted.plan()
    assert (plan.ends, [start.request_id for start in plan.starts]) == ([0], ["b"])
    assert scripted.commit(plan)[0].request_id == "b"


def test_abort_in_flight_frees_blocks_at_once_and_drops_what_comes_later():
    scripted = Scripted(max_num_seqs=1)
    plans = [scripted.plan(), scripted.plan()]
    (ended,) = scripted.scheduler.abort(["a", "unknown"])
    assert (ended.request_id, ended.finish_reason) == ("a", "abort")
    assert scripted.scheduler.stats().kv_usage == 0
    scripted.add("b")
    assert scripted.scheduler.schedule() is None
    assert [scripted.commit(plan) for plan in plans] == [[], []]
    assert scripted.plan().starts[0].request_id == "b"
    assert scripted.scheduler.abort(["a"]) == []


def test_commits_out_of_order_fail_loudly():
    scripted = Scripted()
    _, second = scripted.plan(), scripted.plan()
    with pytest.raises(RuntimeError, match="out of order"):
        scripted.commit(second)


@pytest.mark.parametrize("rows", [[], [RowResult(1, 5)], [RowResult(0)]])
def test_results_that_do_not_fit_the_plan_fail_loudly(rows):
    scripted = Scripted()
    plan = scripted.plan()
    with pytest.raises(RuntimeError):
        scripted.scheduler.commit(plan, StepResult(plan.step_id, rows))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_error_fails_only_its_request(depth):
    harness = Harness(depth=depth)
    harness.add(PROMPT[:10], PROMPT[:11], PROMPT[:9], max_tokens=6)
    harness.runner.failing.add("r1")
    harness.run()
    assert harness.ended["r1"].finish_reason == "error"
    assert harness.ended["r1"].error == "injected"
    assert {harness.ended[name].finish_reason for name in ("r0", "r2")} <= {"stop", "length"}


# Prompt log-probabilities


def test_prompt_logprobs_take_no_hits_and_small_chunks():
    harness = Harness(prompt_logprobs_chunk=5)
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    harness.add(PROMPT[:18], max_tokens=1, prompt_logprobs=0)
    harness.run()
    assert harness.ended["r1"].num_cached_tokens == 0
    assert [step.count for plan in harness.plans[1:] for step in plan.steps] == [5, 5, 5, 3]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_prompt_logprobs_come_once_despite_preemption(depth):
    harness = Harness(depth=depth, num_blocks=8, prompt_logprobs_chunk=3)
    harness.add([1, 2, 3], ignore_eos=True, max_tokens=20)
    harness.add(PROMPT[:18], ignore_eos=True, max_tokens=8, prompt_logprobs=1)
    harness.run()
    assert harness.requests["r1"].num_preemptions > 0


# The oracle itself


def test_the_oracle_follows_the_rules():
    config = Harness().config
    request = Request("x", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True), seed=4)
    first = sampled((1, 2), 4)
    tokens, reason, _ = expected_answer(request, config)
    assert (tokens[0], len(tokens), reason) == (first, 3, "length")


def test_counts_return_to_zero():
    harness = Harness(depth=1)
    harness.add(PROMPT[:9], [1, 2], n=3, max_tokens=4)
    assert harness.scheduler.num_waiting == 6
    harness.step()
    assert harness.scheduler.num_running > 0
    harness.run()
    stats = harness.scheduler.stats()
    assert (stats.num_waiting, stats.num_running, stats.kv_usage) == (0, 0, 0.0)
