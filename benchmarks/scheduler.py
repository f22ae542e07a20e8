"""What one decode step costs the host, in microseconds: scheduling by pool size and queue length, and all of it a row.

The issue is linear cost: neither the pool's size nor the queue's length may show in a step. Plans run one step
ahead of results, as in the engine; results are prepared outside of the clock. No model, no torch.

The second table has what a GPU's step has to hide: making the plan, wrapping the sampled tokens, committing them, and
bringing them to the answers, whole ones as `LLM.generate` wants them or streamed piece by piece; text is that of the
tokenizer of the default model, whose package has to be installed for it. A row is one of so many that run.

    python benchmarks/scheduler.py
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.engine.output import RequestStream
from aphrodite.loading.default_model import find_default_model
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

PROMPT_TOKENS = 8
STEPS_A_ROUND = 36  # contexts stay within 3 blocks, so that 32 rows fit a pool of 100
ROUNDS = 15
STORY = "The old ship sailed on through fog, and nobody spoke of the harbour — not yet. “Listen,” she said."


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


class StepCost(NamedTuple):
    """Microseconds of one step."""

    schedule: float
    results: float
    commit: float
    whole: float
    streamed: float

    @property
    def offline(self) -> float:
        return self.schedule + self.results + self.commit + self.whole


def measure_step(running: int, tokenizer: Tokenizer, story: list[int]) -> StepCost:
    """Medians over steps in which every row takes its next token of `story`, from a place of its own."""
    steps: list[StepCost] = []
    for _ in range(ROUNDS):
        scheduler = build(running, 4 * running + 100, 0)
        prompt, params = [1] * PROMPT_TOKENS, SamplingParams(ignore_eos=True)
        names = [str(number) for number in range(running)]
        whole = {name: RequestStream(name, [name], prompt, params, tokenizer, whole=True) for name in names}
        streamed = {name: RequestStream(name, [name], prompt, params, tokenizer) for name in names}
        texts = [itertools.islice(itertools.cycle(story), number * 7, None) for number in range(running)]
        steps += list(_timed_steps(scheduler, whole, streamed, texts))[1:]  # the first one commits the prompts
    return StepCost(*(statistics.median(column) * 1e6 for column in zip(*steps, strict=True)))


def _timed_steps(
    scheduler: Scheduler,
    whole: dict[str, RequestStream],
    streamed: dict[str, RequestStream],
    texts: Sequence[Iterator[int]],
) -> Iterator[StepCost]:
    plan = plan_next(scheduler)
    for _ in range(STEPS_A_ROUND):
        times = [time.perf_counter()]
        following = plan_next(scheduler)
        times.append(time.perf_counter())
        tokens = [next(texts[step.row]) for step in plan.steps]
        began = time.perf_counter()
        outcome = StepResult(plan.step_id, list(map(RowResult, [step.row for step in plan.steps], tokens)))
        times.append(time.perf_counter() - began + times[-1])
        committing = time.perf_counter()
        updates = scheduler.commit(plan, outcome)
        committed = time.perf_counter()
        for update in updates:
            whole[update.request_id].push(update)
        collected = time.perf_counter()
        for update in updates:
            streamed[update.request_id].push(update)
        ended = time.perf_counter()
        plan = following
        yield StepCost(
            times[1] - times[0], times[2] - times[1], committed - committing, collected - committed, ended - collected
        )


def print_steps() -> None:
    tokenizer = load_tokenizer(find_default_model(allow_download=False))
    words = STORY.split()
    source = random.Random(0)
    story = tokenizer.encode(" ".join(source.choices(words, k=2_000)), add_special_tokens=False)
    print(f"\n{'rows':>8} {'schedule':>10} {'results':>10} {'commit':>10} {'whole':>10} {'streamed':>10}", end="")
    print(f" {'us a row, offline':>18} {'streamed':>10}")
    for running in (1, 32, 256):
        cost = measure_step(running, tokenizer, story)
        print(f"{running:8}" + "".join(f" {value:10.1f}" for value in cost), end="")
        print(
            f" {cost.offline / running:18.2f} {(cost.offline - cost.whole + cost.streamed) / running:10.2f}", flush=True
        )


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
    print_steps()


if __name__ == "__main__":
    main()
