"""A request's parameters compiled into a plan: which stages in which order, and how the token is chosen.

The default order (rank, stage):

    first, in every order: logit_bias (10), min_tokens (20)
    then: penalties (200), temperature (400), top_k (600), top_p (610), min_p (800)
    last: the draw, or the argmax of a greedy request

It is the classic Aphrodite order. Each stage works on what the one before left, so top_p's mass is that of
top_k's survivors. Temperature 0 is greedy: stages that cannot change the most likely token are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage
from aphrodite.sampling.stages.registry import all_stages

DEFAULT_ORDER = tuple(stage.name for stage in all_stages())
GREEDY_BELOW = 1e-5  # a lower temperature would overflow float32 and is a client's spelling of 0


class Step(NamedTuple):
    """A stage of one request."""

    stage: Stage
    values: tuple[float, ...]
    prepared: Any


class SamplingPlan(NamedTuple):
    """What a row needs from the sampler.

    Attributes:
        order: names of all stages in this request's order; rows of one order are computed together.
        steps: the stages that are not neutral, by name, in that order.
        logprobs: top tokens wanted beside the chosen one, or None.
        trace: what each stage does is reported, so the row goes through the stages, alone.
    """

    order: tuple[str, ...]
    steps: dict[str, Step]
    greedy: bool
    logprobs: int | None
    processed_logprobs: bool
    trace: bool = False


def stage_order(params: SamplingParams) -> tuple[Stage, ...]:
    """All stages in the order in which this request wants them; constraints lead in every order."""
    return all_stages()


def compile_plan(params: SamplingParams, info: RowInfo) -> SamplingPlan:
    """The plan of valid `params` for one row."""
    order = stage_order(params)
    greedy = params.temperature < GREEDY_BELOW
    wanted = [stage for stage in order if not (greedy and stage.keeps_argmax) and not stage.is_neutral(params)]
    if any(stage.replaces_truncation for stage in wanted):
        wanted = [stage for stage in wanted if not stage.truncation]
    steps = {stage.name: Step(stage, stage.values(params), stage.prepare(params, info)) for stage in wanted}
    return SamplingPlan(
        order=tuple(stage.name for stage in order),
        steps=steps,
        greedy=greedy,
        logprobs=params.logprobs,
        processed_logprobs=params.logprobs_mode == "processed",
        trace=params.sampler_trace,
    )
