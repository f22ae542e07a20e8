"""Decides what each step computes, and turns a step's results into requests' progress.

There are no phases. Every request has tokens that are known and positions that are computed, and a step spends
a budget of tokens on letting the second chase the first: decoding is one position behind, a prompt many, a
preempted request all of them. Requests are served in one order, `Request.key`; those that run go before those
that wait because they came first, and under policy "priority" because they matter more.

Plans may be made ahead of results. A token that a plan in flight samples counts as known: the next plan names
its position, and the runner finds the token on the device. What ends a request may thus be learned after it was
scheduled once more; that step's result is dropped.

Progress: the first request in order takes blocks from the last until it has what it needs, and a request that
could not fit alone is refused or ends at the pool's capacity. So the first one advances in every plan that is
not waiting for its own tokens in flight, and every request becomes first or finishes.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from aphrodite.core.draft import InFlight
from aphrodite.core.guidance import make_shadow
from aphrodite.core.plan import StepPlan, StepResult
from aphrodite.core.request import Request, RequestUpdate, is_plain
from aphrodite.core.result_applier import ResultApplier
from aphrodite.core.scheduler_config import SchedulerConfig, SchedulerStats
from aphrodite.core.scheduler_state import SchedulerState
from aphrodite.core.step_planner import StepPlanner
from aphrodite.errors import InvalidRequestError, QueueFullError

__all__ = ["RequestUpdate", "Scheduler", "SchedulerConfig", "SchedulerStats"]

# The core has no clock; a second is many steps, after which a place in the queue may have come free.
_RETRY_AFTER_SECONDS = 1.0


class Scheduler:
    """Admits requests to rows and blocks, plans steps, applies their results.

    Call `schedule` for a plan, execute plans in order, and `commit` each with its result, in order; any number
    of plans may be in flight. Not thread-safe.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._state = SchedulerState(config)
        self._planner = StepPlanner(self._state)
        self._applier = ResultApplier(self._state)
        self._inflight: deque[InFlight] = deque()
        self._num_arrivals = 0
        self._next_step_id = 0

    # Requests come and go.

    def add(self, requests: Request | Sequence[Request]) -> None:
        """Queue one request, or several that share their prompt's blocks (`n` > 1): prompt, salt and adapter are one.

        Log-probabilities of a shared prompt come with the first request only.

        Raises:
            InvalidRequestError: one could never run, for the reason given. None was added.
            QueueFullError: too many are waiting already. None was added.
        """
        group = [requests] if isinstance(requests, Request) else list(requests)
        first = group[0]
        shared = [(r.prompt_token_ids, r.cache_salt, r.adapter) for r in group]
        if any(own != shared[0] for own in shared[1:]):
            raise ValueError("requests added together must have the same prompt, cache salt and adapter")
        self._refuse_duplicates(group)
        prepared = [(request, *self._prepare(request)) for request in group]
        self._refuse_overflow(len(group))
        for request, tokens, max_total, shadow in prepared:
            request.tokens, request.max_total, request.shadow = tokens, max_total, shadow
            request.ending_tokens = self.config.eos_token_ids.union(request.params.stop_token_ids)
            request.plain = is_plain(request)
            request.key = (request.priority if self.config.policy == "priority" else 0, self._num_arrivals)
            self._num_arrivals += 1
            self._state.requests[request.request_id] = request
        self._state.waiting.push(first)
        for sibling in group[1:]:
            if sibling.params.prompt_logprobs is not None:
                sibling.params = msgspec.structs.replace(sibling.params, prompt_logprobs=None)
        self._state.held.form_group(group)

    def _prepare(self, request: Request) -> tuple[array[int], int, Request | None]:
        """A request's prompt, the number of tokens at which it ends, and its shadow if it is guided."""
        if request.adapter is not None and not self.config.max_loras:
            raise InvalidRequestError("this engine was started without adapters (--enable-lora)", param="model")
        tokens, max_total = self.config.measure(request)
        if request.negative_prompt_ids is None or max_total == len(tokens):
            return tokens, max_total, None
        return tokens, *make_shadow(request, max_total, self.config)

    def _refuse_duplicates(self, group: list[Request]) -> None:
        ids = [request.request_id for request in group]
        for request_id in ids:
            if request_id in self._state.requests or ids.count(request_id) > 1:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")

    def _refuse_overflow(self, count: int) -> None:
        limit = self.config.max_queued_requests
        if limit is None:
            return
        queued = self._state.num_fresh
        if queued + count - self._state.rows.num_free > limit:
            raise QueueFullError(
                f"{queued} requests are waiting and at most {limit} may wait for a free place; try again later",
                retry_after=_RETRY_AFTER_SECONDS,
            )

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests now, whatever they are doing; ids that are not (or no longer) here are passed over."""
        updates = []
        for request_id in request_ids:
            request = self._state.requests.get(request_id)
            if request is not None:
                self._state.end(request)
                cached = request.num_cached_tokens
                updates.append(RequestUpdate(request_id, [], finish_reason="abort", num_cached_tokens=cached))
        return updates

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests go on, and leave none of what they hold now."""
        self._state.pool.forget_all()
        for request in self._state.running:
            for sequence in request.sequences:
                sequence.registers = False

    def uses_adapter(self, adapter: int) -> bool:
        """Whether a request that has not ended wants the adapter. O(requests)."""
        return any(request.adapter == adapter for request in self._state.requests.values())

    def forget_adapter(self, adapter: int) -> None:
        """An adapter that nobody uses is gone, and its number will not come back."""
        self._state.adapters.forget(adapter)

    # Steps.

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if nothing can run before a result arrives or a request comes."""
        draft = self._planner.draft(self._next_step_id)
        if not draft.steps:
            return None
        ended = self._state.rows.take_ended()
        plan = StepPlan(draft.step_id, ended, draft.starts, draft.steps, draft.rewinds, draft.adapters)
        self._next_step_id += 1
        self._inflight.append(InFlight(plan, draft.requests))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Apply the result of the oldest plan in flight; returns what became known, by request."""
        if not self._inflight or self._inflight[0].plan.step_id != plan.step_id or result.step_id != plan.step_id:
            raise RuntimeError(f"step {result.step_id} committed as {plan.step_id} out of order")
        entry = self._inflight.popleft()
        if len(result.rows) != len(plan.steps):
            raise RuntimeError(f"step {plan.step_id}: {len(result.rows)} results for {len(plan.steps)} rows")
        return self._applier.apply(entry, result)

    # What there is.

    def has_unfinished(self) -> bool:
        return bool(self._state.requests)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks: not yet begun, or preempted."""
        return self._state.num_fresh + len(self._state.preempted)

    @property
    def num_running(self) -> int:
        return len(self._state.requests) - self.num_waiting

    @property
    def next_step_id(self) -> int:
        """Of the plan that is made next."""
        return self._next_step_id

    @property
    def num_inflight(self) -> int:
        """Plans made and not yet committed."""
        return len(self._inflight)

    def stats(self) -> SchedulerStats:
        pool, prefixes = self._state.pool, self._state.prefixes
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            kv_usage=pool.num_used / pool.num_blocks,
            prefix_queries=prefixes.num_queries,
            prefix_hits=prefixes.num_hits,
            num_preemptions=self._state.num_preemptions,
        )

    def check(self) -> None:
        """Verify that blocks, references, rows and queues add up. O(everything); for tests and idle moments.

        Raises:
            RuntimeError: an invariant is broken.
        """
        self._state.check([request for entry in self._inflight for request, *_ in entry.requests])
