"""What scheduler and runner say to each other: a plan before a step, a result after it.

A request owns one row of the runner's persistent state from its first step to its end, preemptions
included. A plan carries only what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from aphrodite.sampling.params import SamplingParams

Pooling = Literal["mean", "last", "cls"]
"""What of a prompt's hidden states becomes its embedding: all of them in equal parts, the last, or the first."""


NO_ADAPTER = -1


class AdapterPlacement(NamedTuple):
    """An adapter is put into a slot, in place of what was there."""

    slot: int
    adapter: int


class RowStart(NamedTuple):
    """A request takes a row."""

    row: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int  # 64 bits, unsigned; drawn at random when the request named none
    pooling: Pooling | None = None  # the request wants its prompt's embedding
    adapter_slot: int = NO_ADAPTER  # of the adapter that it is computed with


class RowStep(NamedTuple):
    """One row's share of a step: compute positions `start` to `start + count` (exclusive)."""

    row: int
    start: int
    count: int  # type: ignore[assignment]  # shadows tuple.count
    blocks: list[int]  # appended to the row's block table, or its whole new table if `reset_blocks`
    reset_blocks: bool
    samples: bool  # the last computed position is the last known one, so a new token comes out
    # Where not -1: the row of the next step in the plan, which does not sample. The logits at its last position guide
    # this row's (`sampling/guidance.py`), and the sampled token is the next one of both rows.
    guide: int = -1


class RowRewind(NamedTuple):
    """A row forgets its tokens from `position` on; its step in the same plan computes on from there."""

    row: int
    position: int
    barred: list[int]  # never to be chosen at `position`; empty: whatever was barred there may be chosen again


class StepPlan(NamedTuple):
    """One step of the engine. Order of application: adapters, ends, starts, rewinds, steps."""

    step_id: int
    ends: list[int]  # rows whose request is gone
    starts: list[RowStart]
    steps: list[RowStep]
    rewinds: Sequence[RowRewind] = ()
    adapters: Sequence[AdapterPlacement] = ()

    @property
    def num_tokens(self) -> int:
        return sum(step.count for step in self.steps)


class TokenLogprobs(NamedTuple):
    """Natural-log probability of one token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    rank: int  # 1 = most likely
    top_ids: list[int]
    top_logprobs: list[float]


class StageTrace(NamedTuple):
    """What one stage left of a row, and where the token that was chosen in the end stood in it."""

    stage: str  # "model" is the distribution before all stages
    candidates: int  # tokens with a probability above 0
    rank: int  # of the chosen token: 1 = most likely, 0 = not a candidate
    probability: float  # of the chosen token
    top_ids: list[int]  # up to ten, most likely first
    top_probabilities: list[float]


class TokenTrace(NamedTuple):
    """How one token came about: the model's distribution, then what each active stage made of it."""

    token_id: int
    drawn: bool  # False: it is the most likely one of the last stage
    stages: list[StageTrace]


class RowResult(NamedTuple):
    """What a step brought for one row; in the order of `StepPlan.steps`."""

    row: int
    token_id: int | None = None  # None: the row did not sample, or `error` is set
    logprobs: TokenLogprobs | None = None
    # For prompt positions start + 1 .. start + count that lie inside the prompt, if asked for.
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None  # this request failed; the others are untouched
    trace: TokenTrace | None = None  # if asked for
    complete: bool = False  # the token completed what the request's grammar describes: nothing may follow it
    embedding: bytes | None = None  # [hidden_size] float32, with the step that completes a prompt to be pooled


class StepResult(NamedTuple):
    step_id: int
    rows: list[RowResult]
