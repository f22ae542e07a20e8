"""The scheduler's rules for blocks that requests share: the prefix cache, and groups with one prompt."""

from __future__ import annotations

import pytest
from scheduler_oracle import Harness
from scripted_scheduler import PROMPT, steps_of

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
