"""A request's parameters compiled into a plan: which stages in which order, and how the token is chosen.

The default order (rank, stage):

    first, in every order: grammar (5), thinking_token_budget (7), logit_bias (10), min_tokens (20),
        allowed_token_ids (30), token_bans (40), token_ban_ranges (50), bad_words (60)
    then: dry (100), penalties (200) or ranged_penalties (210), no_repeat_ngram (300), temperature (400) or
        dynatemp (410), top_nsigma (500), top_k (600), top_p (610), top_a (700), min_p (800), tfs (900),
        eta_cutoff (1000), epsilon_cutoff (1100), typical_p (1200), quadratic (1300), xtc (1400), skew (1500)
    last, in every order: mirostat (2000), adaptive_p (2100); then the draw, or the argmax of a greedy request

It is the classic Aphrodite order. Each stage works on what the one before left, so top_p's mass is that of
top_k's survivors. A request can have another order: `temperature_last` moves temperature behind xtc;
`sampler_priority` wins over it and names stages that take, in its order, the places which they have between
them in the default order, so all others stay where they are.

Temperature 0 is greedy: the token is the most likely one after constraints and penalties, and all stages that
shape or cut what is drawn from are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aphrodite.sampling.followers import TokenFollower
from aphrodite.sampling.order import arrange, stage_names
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.stages.base import RowInfo, Stage
from aphrodite.sampling.stages.registry import all_stages

DEFAULT_ORDER = tuple(stage.name for stage in all_stages())
GRAMMAR, THINKING_BUDGET = "grammar", "thinking_token_budget"  # the stages that the sampler tells of tokens
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

    @property
    def followers(self) -> tuple[TokenFollower, ...]:
        """What has to be told of the row's tokens."""
        return tuple(self.steps[name].prepared for name in (GRAMMAR, THINKING_BUDGET) if name in self.steps)


def stage_order(params: SamplingParams) -> tuple[Stage, ...]:
    """All stages in the order in which this request wants them; constraints lead in every order."""
    stages = {stage.name: stage for stage in all_stages()}
    fixed = {name for name, stage in stages.items() if stage.constraint or stage.selector}
    names = [name for name, stage in stages.items() if stage.stands_in_for is None]
    if params.sampler_priority:
        names = arrange(names, [name for name in stage_names(params.sampler_priority) if name not in fixed])
    elif params.temperature_last:
        names.remove("temperature")
        names.insert(names.index("xtc") + 1, "temperature")
    for name, stage in stages.items():
        if stage.stands_in_for is not None:
            names.insert(names.index(stage.stands_in_for) + 1, name)
    return tuple(stages[name] for name in names)


def compile_plan(params: SamplingParams, info: RowInfo) -> SamplingPlan:
    """The plan of valid `params` for one row."""
    order = stage_order(params)
    greedy = params.temperature < GREEDY_BELOW
    wanted = [
        stage
        for stage in order
        if not (greedy and (stage.keeps_argmax or stage.greedy_skips)) and not stage.is_neutral(params)
    ]
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
