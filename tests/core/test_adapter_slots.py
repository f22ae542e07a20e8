"""Adapters in the scheduler: slots, who waits for one, and that prefixes are never shared between adapters."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from aphrodite.core.adapter_slots import AdapterSlots
from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.params import SamplingParams

PROMPT = [5, 3, 8, 1, 9, 2, 7, 4, 6, 10, 11, 1]


class Engine:
    """A scheduler and what lies in the slots of a runner that follows its plans."""

    def __init__(self, **config) -> None:
        sizes = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
        self.scheduler = Scheduler(SchedulerConfig(**{**sizes, "block_size": 4, "max_loras": 2, **config}))
        self.slots: dict[int, int] = {}
        self.rows: dict[int, str] = {}
        self.row_slots: dict[int, int] = {}
        self.adapters: dict[str, int | None] = {}

    def add(self, name: str, adapter: int | None = None, *, max_tokens: int = 4, **params) -> None:
        self.adapters[name] = adapter
        negative = [7, 7] if params else None
        params = SamplingParams(max_tokens=max_tokens, **params)
        self.scheduler.add(Request(name, PROMPT, params, 1, adapter=adapter, negative_prompt_ids=negative))

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        for slot, adapter in plan.adapters:
            self.slots[slot] = adapter
        for start in plan.starts:
            self.rows[start.row], self.row_slots[start.row] = start.request_id, start.adapter_slot
        return plan

    def commit(self, plan: StepPlan) -> Mapping[str, int]:
        rows = [RowResult(step.row, 9 if step.samples else None) for step in plan.steps]
        updates = self.scheduler.commit(plan, StepResult(plan.step_id, rows))
        self.scheduler.check()
        return {update.request_id: update.num_cached_tokens for update in updates}

    def step(self) -> set[str]:
        """One step; the requests that it computed, each with the adapter that it wanted."""
        plan = self.plan()
        for step in plan.steps:
            adapter = self.adapters[self.rows[step.row]]
            assert self.slots.get(self.row_slots[step.row]) == adapter
        assert len({self.row_slots[step.row] for step in plan.steps} - {-1}) <= self.scheduler.config.max_loras
        self.commit(plan)
        return {self.rows[step.row] for step in plan.steps}


def test_a_third_adapter_waits_for_a_slot_and_nobody_without_one_does():
    engine = Engine()
    for name, adapter in (("a", 1), ("b", 2), ("c", 3), ("d", None), ("e", 1)):
        engine.add(name, adapter)
    # `e` would find its adapter in place, and goes behind `c` nevertheless.
    assert engine.step() == {"a", "b", "d"}
    assert engine.scheduler.num_waiting == 2
    for _ in range(3):
        assert engine.step() == {"a", "b", "d"}
    assert engine.step() == {"c", "e"}
    while engine.scheduler.has_unfinished():
        engine.step()


def test_an_adapter_stays_until_another_needs_its_slot():
    engine = Engine()
    placed = []
    for name, adapter in (("a", 1), ("b", 2), ("c", 1), ("d", 3), ("e", 1), ("f", 2)):
        engine.add(name, adapter, max_tokens=1)
        plan = engine.plan()
        engine.commit(plan)
        placed.append([adapter for _, adapter in plan.adapters])
    # `d` takes the place of 2, which was used before 1 was used again.
    assert placed == [[1], [2], [], [3], [], [2]]


def test_a_waiting_request_that_is_aborted_leaves_nothing_behind():
    engine = Engine(max_loras=1)
    for name, adapter in (("a", 1), ("b", 2), ("c", 1)):
        engine.add(name, adapter)
    assert engine.step() == {"a"}
    engine.scheduler.abort(["b"])
    engine.scheduler.check()
    assert engine.step() == {"a", "c"}
    engine.scheduler.abort(["a", "c"])
    engine.scheduler.check()
    assert not engine.scheduler.has_unfinished()


def test_prefixes_of_an_adapter_are_its_own():
    engine = Engine()
    found = []
    for name, adapter in (("a", None), ("b", 1), ("c", 2), ("d", 1), ("e", None)):
        engine.add(name, adapter, max_tokens=1)
        found.append(engine.commit(engine.plan())[name])
    assert found == [0, 0, 0, 8, 8]


def test_a_guided_request_is_computed_with_one_adapter():
    engine = Engine()
    engine.add("guided", 5, guidance_scale=2.0)
    plan = engine.plan()
    assert [start.adapter_slot for start in plan.starts] == [plan.adapters[0].slot] * 2
    engine.commit(plan)


def test_preempted_requests_keep_their_slot():
    engine = Engine(num_blocks=9, max_num_seqs=3)
    for name, adapter in (("a", 1), ("b", 2), ("c", 1)):
        engine.add(name, adapter, max_tokens=20)
    while engine.scheduler.has_unfinished():
        engine.step()
    assert engine.scheduler.stats().num_preemptions


def test_an_unloaded_adapter_leaves_its_slot_empty():
    engine = Engine(max_loras=1)
    engine.add("a", 1)
    engine.step()
    assert engine.scheduler.uses_adapter(1)
    with pytest.raises(RuntimeError, match="in use"):
        engine.scheduler.forget_adapter(1)
    engine.scheduler.abort(["a"])
    assert not engine.scheduler.uses_adapter(1)
    engine.scheduler.forget_adapter(1)
    engine.scheduler.check()


def test_without_slots_an_adapter_is_refused():
    engine = Engine(max_loras=0)
    with pytest.raises(InvalidRequestError, match="adapters"):
        engine.add("a", 1)


def test_every_slot_is_lost_or_found():
    slots = AdapterSlots(2)
    request = Request("a", PROMPT, SamplingParams(), 1, adapter=7)
    request.key = (0, 0)
    assert slots.admits(request)
    assert slots.take(request).slot == request.adapter_slot
    slots.check()
    slots._free.append(request.adapter_slot)
    with pytest.raises(RuntimeError, match="lost or owned twice"):
        slots.check()
