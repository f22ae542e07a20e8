"""What both data planes share: which logits a step wants, and how its results are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from aphrodite.core.plan import RowResult, RowRewind, RowStart, RowStep, StepPlan, StepResult, TokenLogprobs
from aphrodite.errors import RequestFailedError
from aphrodite.sampling.extensions import installed_extensions
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampler

logger = logging.getLogger(__name__)
Change = TypeVar("Change")

NON_FINITE_LOGITS = (
    "the model produced non-finite logits for this request; the weights may be damaged or overflow"
    " in this precision: try --dtype float32"
)
NOTHING_ALLOWED = (
    "no token may be chosen at this position: token bans, allowed_token_ids, bad_words, min_tokens, the grammar and"
    " thinking_token_budget together leave nothing of the vocabulary; loosen them"
)
UNSERVABLE = "the engine could not prepare this request's sampler; the server's log has the reason"
EXTENSION_FAILED = "; or a sampler extension failed for it: then the server's log has its error"


class Outcome(NamedTuple):
    """What a step brought.

    Attributes:
        forward_seconds: that the model's forward took; on an accelerator the whole step.
        waited_seconds: of the time in `collect`, those in which the host had nothing to do but wait for the model.
    """

    result: StepResult
    forward_seconds: float
    waited_seconds: float


# Log-probabilities of a prompt's tokens, or why there are none.
PromptLogprobs = list[TokenLogprobs] | RequestFailedError


def with_prompt_logprobs(result: RowResult, found: PromptLogprobs) -> RowResult:
    """What became of a row whose prompt was to be scored."""
    if isinstance(found, RequestFailedError):
        return RowResult(result.row, error=str(found))
    return result._replace(prompt_logprobs=found)


class LogitsLayout(NamedTuple):
    """Which token rows' logits a step wants, and where each sequence's rows of them lie."""

    entries: np.ndarray  # [L] int32, token rows
    sampling: list[int]  # indices of `entries` that sample, in the order of the sampling steps
    prompt: dict[int, tuple[int, int]]  # step number -> slice of `entries` for prompt log-probabilities
    guides: Mapping[int, tuple[int, int]] = MappingProxyType({})  # guided step -> indices of its and its guide's entry


def logits_layout(steps: Sequence[RowStep], scored: Mapping[int, int]) -> LogitsLayout:
    """The last token of every row that samples or guides, and every position of a prompt whose logprobs are wanted.

    Args:
        scored: prompt lengths of the rows that want the latter.
    """
    if not any(step.row in scored or step.guide >= 0 for step in steps):
        ends = np.cumsum(np.array([step.count for step in steps], dtype=np.int32), dtype=np.int32) - 1
        samples = np.array([step.samples for step in steps], dtype=bool)
        return LogitsLayout(ends[samples], list(range(int(samples.sum()))), {})
    entries: list[int] = []
    sampling: list[int] = []
    prompt: dict[int, tuple[int, int]] = {}
    guides: dict[int, tuple[int, int]] = {}
    first_token = 0
    for number, step in enumerate(steps):
        last_token = first_token + step.count - 1
        if step.row in scored:
            # Logits at position p speak of position p + 1, which has to lie inside the prompt.
            inside = min(step.count, scored[step.row] - 1 - step.start)
            if inside > 0:
                prompt[number] = (len(entries), len(entries) + inside)
                entries.extend(range(first_token, first_token + inside))
        if step.samples:
            sampling.append(len(entries))
            entries.append(last_token)
        elif number and steps[number - 1].guide == step.row:
            guides[number - 1] = (sampling[-1], len(entries))
            entries.append(last_token)
        first_token += step.count
    return LogitsLayout(np.array(entries, dtype=np.int32), sampling, prompt, guides)


def take_over(changes: Iterable[Change], part: Callable[[Change], None]) -> None:
    """Call `part` with each of `changes`, even if some fail: steps to come build on all of them.

    Raises:
        Exception: the first that was raised.
    """
    errors: list[Exception] = []
    for change in changes:
        try:
            part(change)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def error_of(exhausted: bool) -> str:
    """Why a row has no token that may be shown."""
    if exhausted:
        return NOTHING_ALLOWED
    return NON_FINITE_LOGITS + (EXTENSION_FAILED if installed_extensions() else "")


class RowRequests:
    """What a data plane remembers of the requests that its rows serve, and tells its sampler of them.

    Attributes:
        params: of every taken row.
        scored: rows whose prompt's log-probabilities are wanted, with the prompt's length.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.params: dict[int, SamplingParams] = {}
        self.scored: dict[int, int] = {}
        self._sampler = sampler
        self._unservable: set[int] = set()  # rows whose sampler could not be prepared

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan changes; the rows' tokens have been."""
        for row in plan.ends:
            self._end(row)
            self.params.pop(row, None)
            self.scored.pop(row, None)
            self._unservable.discard(row)
        for start in plan.starts:
            self.params[start.row] = start.sampling
            if start.sampling.prompt_logprobs is not None:
                self.scored[start.row] = len(start.prompt_token_ids)
        changes = [partial(self._start, start) for start in plan.starts]
        changes += [partial(self._rewind, rewind) for rewind in plan.rewinds]
        take_over(changes, lambda change: change())

    def error(self, row: int, exhausted: bool) -> str:
        """Why a row has no token that may be shown."""
        return self._sampler.failure(row) or error_of(exhausted)

    def follow(self, results: list[RowResult], positions: Sequence[int]) -> None:
        """Tell the sampler which tokens stand at `positions`, and mark those that complete what a grammar describes."""
        if not self._sampler.follows(result.row for result in results):
            return
        for number, (result, position) in enumerate(zip(results, positions, strict=True)):
            if result.token_id is None:
                continue
            self._sampler.tell([result.row], [position], [result.token_id])
            if self._sampler.completed_at(result.row, position):
                results[number] = result._replace(complete=True)

    def fail_unservable(self, results: list[RowResult]) -> None:
        """Tell the requests whose sampler could not be prepared."""
        if not self._unservable:
            return
        for number, result in enumerate(results):
            if result.row in self._unservable:
                results[number] = RowResult(result.row, error=UNSERVABLE)

    def _end(self, row: int) -> None:
        """Free a row, come what may: it is given to another request."""
        try:
            self._sampler.end(row)
        except Exception:
            logger.exception("row %d was freed in part only", row)

    def _start(self, start: RowStart) -> None:
        """Give a row to the sampler. A plan that cannot be prepared must not cost others their step: the row is
        sampled without any stage then, until its request is told."""
        try:
            self._sampler.start(start.row, start.sampling, start.seed, start.prompt_token_ids)
        except Exception:
            logger.exception("request %s fails: its sampler could not be prepared", start.request_id)
            self._end(start.row)
            self._sampler.start(start.row, SamplingParams(), start.seed, start.prompt_token_ids)
            self._unservable.add(start.row)

    def _rewind(self, rewind: RowRewind) -> None:
        self._sampler.rewind(rewind.row, rewind.position)
        if rewind.barred:
            self._sampler.bar(rewind.row, rewind.position, rewind.barred)
        else:
            self._sampler.unbar(rewind.row, rewind.position)
