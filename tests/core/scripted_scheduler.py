"""A scheduler whose sampled tokens the test chooses, and what a plan holds in short."""

from __future__ import annotations

from scheduler_oracle import EOS

from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request, RequestUpdate
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
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
