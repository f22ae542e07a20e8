"""The scheduler's rules, one by one. `Harness` checks KV contents, answers and conservation along the way."""

from __future__ import annotations

import pytest
from scheduler_oracle import EOS, Harness, expected_answer, sampled

from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request, RequestUpdate
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.errors import ConfigError, InvalidRequestError, QueueFullError
from aphrodite.sampling.params import SamplingParams

PROMPT = [5, 3, 8, 1, 9, 2, 7, 4, 6, 10, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 3, 5, 7, 9, 11, 2, 4, 6, 8]


def steps_of(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    assert plan is not None
    return [(step.row, step.start, step.count, step.samples) for step in plan.steps]


class Scripted:
    """A scheduler whose sampled tokens the test chooses."""

    def __init__(self, *, params: dict[str, object] | None = None, prompt: int = 4, **config) -> None:
        sizes = {"num_blocks": 32, "max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 64}
        self.scheduler = Scheduler(SchedulerConfig(**(sizes | {"eos_token_ids": frozenset({EOS})} | config)))
        self.add("a", prompt, **(params or {}))

    def add(self, name: str, prompt: int = 4, **params) -> None:
        self.scheduler.add(Request(name, PROMPT[:prompt], SamplingParams(**params), seed=1))

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int = 5) -> list[RequestUpdate]:
        rows = [RowResult(step.row, token if step.samples else None) for step in plan.steps]
        updates = self.scheduler.commit(plan, StepResult(plan.step_id, rows))
        self.scheduler.check()
        return updates

    def next(self, token: int = 5) -> RequestUpdate:
        (update,) = self.commit(self.plan(), token)
        return update


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


# The prefix cache


def test_a_full_hit_still_computes_the_last_block():
    harness = Harness()
    harness.add(PROMPT[:16], max_tokens=1)
    harness.run()
    harness.add(PROMPT[:16], max_tokens=1)
    harness.run()
    assert steps_of(harness.plans[-1]) == [(0, 12, 4, True)]
    assert harness.ended["r1"].num_cached_tokens == 12
    stats = harness.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (32, 12)


def test_outputs_are_cached_for_the_next_turn():
    harness = Harness()
    harness.add(PROMPT[:6], max_tokens=12, ignore_eos=True)
    harness.run()
    harness.add(PROMPT[:6] + harness.outputs["r0"] + [1], max_tokens=1)
    harness.run()
    assert harness.ended["r1"].num_cached_tokens == 16


@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_request_leaves_its_full_blocks(depth):
    harness = Harness(depth=depth)
    harness.add(PROMPT[:18])
    harness.step()
    harness.abort("r0")
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    assert harness.ended["r1"].num_cached_tokens == 16


def test_tokens_in_flight_are_not_findable():
    harness = Harness(depth=3)
    harness.add(PROMPT[:18], max_tokens=1)
    harness.launch()
    harness.add(PROMPT[:18], max_tokens=1)
    harness.launch()
    harness.run()
    assert harness.ended["r1"].num_cached_tokens == 0


def test_salts_do_not_share():
    harness = Harness(num_blocks=64)
    for salt, cached in ((b"one", 0), (b"two", 0), (None, 0), (b"", 0), (b"one", 16), (None, 16)):
        (name,) = harness.add(PROMPT[:18], salt=salt, max_tokens=1)
        harness.run()
        assert harness.ended[name].num_cached_tokens == cached


def test_a_disabled_cache_finds_nothing():
    harness = Harness(enable_prefix_caching=False)
    for _ in range(2):
        (name,) = harness.add(PROMPT[:18], max_tokens=1)
        harness.run()
        assert harness.ended[name].num_cached_tokens == 0
    assert harness.scheduler.stats().prefix_queries == 0


def test_a_reset_forgets_what_is_cached_and_what_runs():
    harness = Harness()
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    harness.add(PROMPT[:18], max_tokens=20, ignore_eos=True)
    harness.step()
    harness.reset()
    harness.run()
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    assert harness.ended["r2"].num_cached_tokens == 0


def test_a_request_older_than_a_reset_leaves_nothing_later_either():
    harness = Harness(num_blocks=40)
    harness.add(PROMPT[:18], max_tokens=20, ignore_eos=True)
    harness.step()
    harness.reset()
    harness.run()
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    harness.add(PROMPT[:18] + harness.outputs["r0"], max_tokens=1)
    harness.run()
    assert harness.ended["r2"].num_cached_tokens == 16


def test_blocks_borrowed_from_before_a_reset_are_not_cached():
    harness = Harness(max_num_seqs=2)
    harness.add(PROMPT[:18], n=3, max_tokens=6, ignore_eos=True)
    for _ in range(3):
        harness.step()
    harness.reset()
    harness.run()
    harness.add(PROMPT[:18], max_tokens=1)
    harness.run()
    assert harness.ended["r2"].num_cached_tokens == 16
    assert harness.ended["r3"].num_cached_tokens == 0
    harness.add(PROMPT[:18] + harness.outputs["r2"], max_tokens=1)
    harness.run()
    assert harness.ended["r4"].num_cached_tokens == 16


def test_the_head_of_a_prefix_survives_its_tail():
    harness = Harness(num_blocks=6)
    harness.add(PROMPT[:20], max_tokens=1)
    harness.run()
    harness.add([11] * 10, max_tokens=1)
    harness.run()
    harness.add(PROMPT[:20], max_tokens=1)
    harness.run()
    assert harness.ended["r2"].num_cached_tokens == 12


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


# Preemption


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_youngest_is_preempted_keeps_its_row_and_comes_back_first(depth):
    harness = Harness(depth=depth, num_blocks=8, max_num_seqs=3, max_model_len=32)
    harness.add([1, 2, 3], [4, 5, 6], [7, 8, 9], [9, 8], ignore_eos=True, max_tokens=18)
    harness.run()
    assert harness.scheduler.stats().num_preemptions > 0
    assert harness.requests["r0"].num_preemptions == 0
    starts = [start for plan in harness.plans for start in plan.starts]
    assert [start.request_id for start in starts] == ["r0", "r1", "r2", "r3"]
    resets = [step for plan in harness.plans for step in plan.steps if step.reset_blocks]
    assert len(resets) > len(starts)
    assert next(iter(harness.ended)) == "r0"
    assert harness.scheduler.stats().prefix_queries == 3 + 3 + 3 + 2


def test_a_newcomer_leaves_blocks_to_those_ahead():
    harness = Harness(num_blocks=4)
    harness.add(PROMPT[:11], ignore_eos=True, max_tokens=3)
    harness.step()
    harness.add([1, 2], max_tokens=1)
    harness.run()
    assert harness.scheduler.stats().num_preemptions == 0
    assert len(harness.plans) == 4


@pytest.mark.parametrize("num_blocks", range(5, 8))
@pytest.mark.parametrize("length", range(4, 10))
def test_what_is_preempted_with_its_last_token_in_flight_is_not_computed_again(num_blocks, length):
    """For some of these sizes, the older request takes the younger one's blocks at just that moment."""
    harness = Harness(depth=3, num_blocks=num_blocks, max_num_batched_tokens=5, enable_prefix_caching=False)
    harness.add(PROMPT[:length], ignore_eos=True, max_tokens=12)
    harness.add(PROMPT[:12], ignore_eos=True, max_tokens=1)
    harness.run()


def test_progress_is_told_of_the_prompt_alone():
    sizes = {"num_blocks": 9, "block_size": 4, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    scripted = Scripted(params={"max_tokens": 24}, **sizes)
    asked = Request("b", PROMPT[:14], SamplingParams(max_tokens=16), seed=1, tells_progress=True)
    scripted.scheduler.add(asked)
    updates = []
    while scripted.scheduler.has_unfinished():
        updates += [update for update in scripted.commit(scripted.plan()) if update.request_id == "b"]
    assert asked.num_preemptions > 0  # so that its answer was computed again, in several steps
    answer = [bool(update.token_ids) for update in updates].index(True)
    assert answer > 0
    assert all(0 < update.num_computed < 14 for update in updates[:answer])
    assert all(update.token_ids and not update.num_computed for update in updates[answer:])


def test_a_preempted_request_finds_its_own_blocks_again():
    harness = Harness(num_blocks=7, max_num_seqs=2, max_model_len=28)
    harness.add([1, 2, 3], PROMPT[:12], ignore_eos=True, max_tokens=12)
    harness.run()
    resumed = [s for p in harness.plans for s in p.steps if s.reset_blocks][2:]
    assert harness.requests["r1"].num_preemptions > 0
    assert resumed[0].start > 0


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_exhausted_cache_finishes_everything(depth, caching):
    """Many requests, a pool that can hold one: all finish, and the first in order always advances."""
    harness = Harness(
        depth=depth, num_blocks=8, max_num_seqs=8, max_model_len=32, block_size=4, enable_prefix_caching=caching
    )
    for number in range(64):
        harness.add(PROMPT[number % 7 : number % 7 + 1 + number % 20], ignore_eos=True, max_tokens=1 + number % 12)
    for _ in range(3_000):
        if not harness.scheduler.has_unfinished():
            break
        first = min(
            (r for r in harness.requests.values() if r.request_id not in harness.ended), key=lambda request: request.key
        )
        before = first.num_computed, first.num_output_tokens, first.num_inflight
        harness.step()
        assert first.request_id in harness.ended or (
            (first.num_computed, first.num_output_tokens, first.num_inflight) != before
        )
    assert len(harness.ended) == 64


# Priorities


def test_a_lower_value_goes_first_and_takes_blocks_from_a_higher_one():
    harness = Harness(policy="priority", num_blocks=6, max_num_seqs=2, max_model_len=24)
    harness.add(PROMPT[:16], priority=5, ignore_eos=True, max_tokens=4)
    harness.step()
    harness.add(PROMPT[10:26], priority=1, ignore_eos=True, max_tokens=4)
    harness.run()
    assert list(harness.ended) == ["r1", "r0"]
    assert harness.requests["r0"].num_preemptions == 1
    assert harness.requests["r1"].num_preemptions == 0


def test_a_long_prompt_ahead_leaves_a_token_to_those_behind():
    harness = Harness(policy="priority", max_num_batched_tokens=8)
    harness.add([1, 2], priority=5, ignore_eos=True, max_tokens=4)
    harness.step()
    harness.add(PROMPT[:14], priority=0, ignore_eos=True, max_tokens=1)
    harness.run()
    assert [[step.count for step in plan.steps] for plan in harness.plans[1:3]] == [[7, 1], [7, 1]]


def test_waiting_order_is_priority_then_arrival():
    harness = Harness(policy="priority", max_num_seqs=1)
    for priority in (0, 2, 1, 1):
        harness.add([1, 2], priority=priority, max_tokens=1)
    harness.run()
    assert list(harness.ended) == ["r0", "r2", "r3", "r1"]


def test_first_come_first_served_ignores_priorities():
    harness = Harness(max_num_seqs=1)
    for priority in (3, 2, 1):
        harness.add([1, 2], priority=priority, max_tokens=1)
    harness.run()
    assert list(harness.ended) == ["r0", "r1", "r2"]


def test_rows_kept_by_preempted_requests_cannot_lock_out_a_better_one():
    harness = Harness(policy="priority", num_blocks=4, max_num_seqs=2, max_model_len=16)
    harness.add([1, 2, 3], [4, 5, 6], priority=5, ignore_eos=True, max_tokens=12)
    for _ in range(8):
        harness.step()
    harness.add([7, 8], priority=0, ignore_eos=True, max_tokens=12)
    harness.run(200)


# Groups


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_siblings_share_the_prompt_and_compute_only_its_tail(depth, caching):
    harness = Harness(depth=depth, num_blocks=64, max_num_seqs=8, enable_prefix_caching=caching)
    harness.add(PROMPT[:18], n=5, ignore_eos=True, max_tokens=6)
    harness.run()
    firsts = {step.row: step for plan in reversed(harness.plans) for step in plan.steps if step.reset_blocks}
    assert sorted((step.start, step.count) for step in firsts.values()) == [(0, 18)] + [(16, 2)] * 4
    assert len({tuple(step.blocks[:4]) for step in firsts.values()}) == 1
    assert len({step.blocks[4] for step in firsts.values()}) == 5
    assert harness.runner.num_computed_tokens == 18 + 4 * 2 + 5 * 5


def test_a_prompt_of_less_than_a_block_is_not_waited_for():
    harness = Harness()
    harness.add(PROMPT[:4], n=3, max_tokens=1)
    plan = harness.launch()
    assert plan is not None
    assert len(plan.steps) == 3
    harness.run()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_siblings_go_on_without_a_leader(depth, caching):
    harness = Harness(depth=depth, max_num_batched_tokens=8, enable_prefix_caching=caching)
    harness.add(PROMPT[:18], n=4, max_tokens=5)
    harness.step()
    harness.abort("r0")
    harness.run()
    assert harness.ended.keys() == {"r0", "r1", "r2", "r3"}
    firsts = sorted(step.start for plan in harness.plans[1:] for step in plan.steps if step.reset_blocks)
    assert firsts == [8 if caching else 0, 16, 16]


@pytest.mark.parametrize("moment", range(6))
def test_any_member_may_be_aborted_at_any_moment(moment):
    for victim in ("r0", "r1", "r2"):
        harness = Harness(depth=1, max_num_batched_tokens=8)
        harness.add(PROMPT[:18], n=3, max_tokens=5)
        for _ in range(moment):
            harness.step()
        if victim not in harness.ended:
            harness.abort(victim)
        harness.run()


@pytest.mark.parametrize("caching", [True, False])
def test_a_leader_that_ends_with_the_prompts_step_leaves_the_others_a_way(caching):
    harness = Harness(depth=0, max_num_seqs=8, num_blocks=64, enable_prefix_caching=caching)
    harness.add(PROMPT[:18], n=4, max_tokens=1)
    harness.run()
    assert len(harness.ended) == 4
    assert len(harness.plans) == (2 if caching else 4)


def test_a_leaders_failed_step_does_not_reach_its_siblings():
    """Nothing is shared before a result has confirmed it, so a failed step's blocks are never read by others."""
    harness = Harness(depth=1)
    harness.add(PROMPT[:18], n=3, max_tokens=4)
    harness.runner.failing.add("r0")
    harness.run()
    assert harness.ended["r0"].finish_reason == "error"
    assert {harness.ended[name].finish_reason for name in ("r1", "r2")} <= {"stop", "length"}


def test_prompt_logprobs_of_a_group_come_with_the_first():
    harness = Harness(prompt_logprobs_chunk=7)
    harness.add(PROMPT[:18], n=2, max_tokens=2, prompt_logprobs=0)
    harness.run()
    assert len(harness.prompt_logprobs["r0"]) == 17
    assert harness.prompt_logprobs["r1"] == []


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
