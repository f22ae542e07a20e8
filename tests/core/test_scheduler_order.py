"""The scheduler's rules for who goes first and who gives way: preemption and priorities."""

from __future__ import annotations

import pytest
from scheduler_oracle import Harness
from scripted_scheduler import PROMPT, Scripted

from aphrodite.core.request import Request
from aphrodite.sampling.params import SamplingParams

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
