"""What one decode step costs the scheduler, in microseconds, by rows running, pool size and queue length.

The issue is linear cost: neither the pool's size nor the queue's length may show in a step. Plans run one step
ahead of results, as in the engine; results are prepared outside of the clock. No model, no torch.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import statistics
import time

from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.sampling.params import SamplingParams

PROMPT_TOKENS = 8
STEPS_A_ROUND = 36  # contexts stay within 3 blocks, so that 32 rows fit a pool of 100
ROUNDS = 15


def build(running: int, num_blocks: int, queued: int) -> Scheduler:
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=num_blocks, max_num_seqs=running, max_num_batched_tokens=8192, max_model_len=1024)
    )
    params = SamplingParams(ignore_eos=True)
    for number in range(running + queued):
        prompt = [(number * 31 + position) % 1000 for position in range(PROMPT_TOKENS)]
        scheduler.add(Request(str(number), prompt, params, seed=number))
    return scheduler


def result(plan: StepPlan) -> StepResult:
    return StepResult(plan.step_id, [RowResult(step.row, 7 if step.samples else None) for step in plan.steps])


def plan_next(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    if plan is None:
        raise RuntimeError("nothing to schedule: the benchmark's sizes do not fit each other")
    return plan


def measure(running: int, num_blocks: int, queued: int) -> tuple[float, float]:
    """Median microseconds of one `schedule` and one `commit`."""
    schedule_us: list[float] = []
    commit_us: list[float] = []
    for _ in range(ROUNDS):
        scheduler = build(running, num_blocks, queued)
        plan = plan_next(scheduler)
        for step in range(STEPS_A_ROUND):
            began = time.perf_counter()
            following = plan_next(scheduler)
            planned = time.perf_counter()
            outcome = result(plan)
            received = time.perf_counter()
            scheduler.commit(plan, outcome)
            ended = time.perf_counter()
            plan = following
            if step:  # the first one commits the prompts
                schedule_us.append((planned - began) * 1e6)
                commit_us.append((ended - received) * 1e6)
        if scheduler.num_running != running:
            raise RuntimeError(f"{scheduler.num_running} requests ran, {running} were meant to")
    return statistics.median(schedule_us), statistics.median(commit_us)


def main() -> None:
    print(f"{'running':>8} {'blocks':>8} {'queued':>8} {'schedule us':>12} {'commit us':>10} {'step us':>9}")
    for running, pools in ((1, (100, 100_000)), (32, (100, 100_000)), (256, (1_000, 100_000))):
        for num_blocks in pools:
            for queued in (0, 10_000):
                planned, committed = measure(running, num_blocks, queued)
                print(
                    f"{running:8} {num_blocks:8} {queued:8} {planned:12.1f} {committed:10.1f}"
                    f" {planned + committed:9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
