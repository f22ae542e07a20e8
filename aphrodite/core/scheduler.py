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
from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from operator import attrgetter

import msgspec

from aphrodite.core.adapter_slots import AdapterSlots
from aphrodite.core.block_pool import BlockPool
from aphrodite.core.draft import Draft, InFlight
from aphrodite.core.finish import GRAMMAR_COMPLETE, finish_reason_of
from aphrodite.core.guidance import make_shadow, missing_blocks, pair_counts
from aphrodite.core.held_requests import HeldRequests
from aphrodite.core.invariants import check_requests
from aphrodite.core.plan import (
    RowResult,
    RowRewind,
    RowStart,
    RowStep,
    StepPlan,
    StepResult,
    TokenLogprobs,
    TokenTrace,
)
from aphrodite.core.prefix_cache import FoundPrefix, PrefixCache
from aphrodite.core.request import OutputToken, Request, RequestStatus, RequestUpdate, Rewind, is_plain
from aphrodite.core.scheduler_config import SchedulerConfig, SchedulerStats
from aphrodite.core.waiting_queue import WaitingQueue
from aphrodite.errors import InvalidRequestError, QueueFullError
from aphrodite.outputs import FinishReason

__all__ = ["RequestUpdate", "Scheduler", "SchedulerConfig", "SchedulerStats"]

# The core has no clock; a second is many steps, after which a place in the queue may have come free.
_RETRY_AFTER_SECONDS = 1.0
_NO_BLOCKS: list[int] = []  # shared by the many steps that need no new block; never changed
_by_key = attrgetter("key")


class Scheduler:
    """Admits requests to rows and blocks, plans steps, applies their results.

    Call `schedule` for a plan, execute plans in order, and `commit` each with its result, in order; any number
    of plans may be in flight. Not thread-safe.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._pool = BlockPool(config.num_blocks)
        self._prefixes = PrefixCache(config, self._pool)
        self._requests: dict[str, Request] = {}  # all that have not finished
        self._running: list[Request] = []  # in order of service
        self._waiting = WaitingQueue()
        self._preempted = WaitingQueue()
        self._held = HeldRequests(self._waiting, config.block_size)
        self._adapters = AdapterSlots(config.max_loras)
        self._free_rows = list(range(config.max_num_seqs))  # a heap: low rows keep a batch dense
        self._ended_rows: list[int] = []  # to be named in the next plan's `ends`
        self._inflight: deque[InFlight] = deque()
        self._num_arrivals = 0
        self._next_step_id = 0
        self._num_guided = 0  # running requests with a shadow
        self._num_preemptions = 0

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
            self._requests[request.request_id] = request
        self._waiting.push(first)
        for sibling in group[1:]:
            if sibling.params.prompt_logprobs is not None:
                sibling.params = msgspec.structs.replace(sibling.params, prompt_logprobs=None)
        self._held.form_group(group)

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests now, whatever they are doing; ids that are not (or no longer) here are passed over."""
        updates = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                updates.append(self._end(request, "abort"))
        return updates

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests go on, and leave none of what they hold now."""
        self._pool.forget_all()
        for request in self._running:
            for sequence in request.sequences:
                sequence.registers = False

    def uses_adapter(self, adapter: int) -> bool:
        """Whether a request that has not ended wants the adapter. O(requests)."""
        return any(request.adapter == adapter for request in self._requests.values())

    def forget_adapter(self, adapter: int) -> None:
        """An adapter that nobody uses is gone, and its number will not come back."""
        self._adapters.forget(adapter)

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks: not yet begun, or preempted."""
        return len(self._waiting) + len(self._preempted) + len(self._held) + self._adapters.num_aside

    @property
    def num_running(self) -> int:
        return len(self._requests) - self.num_waiting

    @property
    def next_step_id(self) -> int:
        """Of the plan that is made next."""
        return self._next_step_id

    @property
    def num_inflight(self) -> int:
        """Plans made and not yet committed."""
        return len(self._inflight)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            kv_usage=self._pool.num_used / self._pool.num_blocks,
            prefix_queries=self._prefixes.num_queries,
            prefix_hits=self._prefixes.num_hits,
            num_preemptions=self._num_preemptions,
        )

    # A plan.

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None if nothing can run before a result arrives or a request comes."""
        draft = Draft(self._next_step_id, self._budget())
        self._held.release()
        for fresh in self._adapters.take_back():
            self._waiting.push(fresh)
        running = self._running
        candidate = self._next_waiting()
        preemptions = self._num_preemptions
        index = 0
        while draft.budget > 0:
            request = running[index] if index < len(running) else None
            if candidate is not None and (request is None or candidate.key < request.key):
                fits = self._admit(candidate, index, draft)
                if candidate.status is RequestStatus.RUNNING:
                    index += 1
                candidate = self._next_waiting()
            elif request is not None:
                fits = self._advance(request, index, draft)
                index += 1
            else:
                break
            # Blocks that someone had to give up, or that someone still lacks, are not for newcomers.
            if not fits or self._num_preemptions != preemptions:
                candidate = None
        if not draft.steps:
            return None
        plan = StepPlan(draft.step_id, self._ended_rows, draft.starts, draft.steps, draft.rewinds, draft.adapters)
        self._ended_rows = []
        self._next_step_id += 1
        self._inflight.append(InFlight(plan, draft.requests))
        return plan

    def _budget(self) -> int:
        """Tokens of the next step: fewer of prompts where answers go on, because those wait for the step's end."""
        most, beside = self.config.max_num_batched_tokens, self.config.prompt_tokens_beside_answers
        if beside is None or not any(request.num_computed >= request.num_prompt_tokens for request in self._running):
            return most
        return min(most, len(self._running) + self._num_guided + beside)

    def _next_waiting(self) -> Request | None:
        """The first request in order that is not running and has, or could have, a row."""
        resumed = self._preempted.peek()
        fresh = self._waiting.peek() if self._free_rows else None
        while fresh is not None and not self._adapters.admits(fresh):
            self._waiting.pop()
            fresh = self._waiting.peek()
        if fresh is not None and len(fresh.sequences) > len(self._free_rows):
            fresh = None
        if resumed is None or (fresh is not None and fresh.key < resumed.key):
            return fresh
        return resumed

    def _advance(self, request: Request, index: int, draft: Draft) -> bool:
        """Plan a share of the step for the running request at `index`; False if it lacks blocks."""
        if request.shadow is not None:
            return self._advance_guided(request, index, draft)
        known = len(request.tokens) + request.num_pending
        start = request.num_computed
        count = known - start
        if count == 0 or (known >= request.max_total and request.samples):
            return True  # what ends it is in flight
        size = self.config.block_size
        room = len(request.blocks) * size - start
        if count == 1 <= room and known < request.max_total and request.rewind is None:
            # `_take` for what most rows of most steps do, at half its cost.
            draft.steps.append(RowStep(request.row, start, 1, _NO_BLOCKS, False, True))  # type: ignore[arg-type]
            draft.requests.append((request, request.num_preemptions, request.num_rewinds))
            draft.budget -= 1
            request.num_computed = known
            request.num_pending += 1
            request.num_inflight += 1
            return True
        if count > 1:
            count = self._chunk(request, count, draft.budget, len(self._running) - index - 1)
        if count <= room:
            self._take(request, draft, count, _NO_BLOCKS, reset=False)
            return True
        missing = -(-(count - room) // size)
        self._make_room(missing, index + 1)
        # The last in order does not preempt itself: it computes what fits and keeps what it has.
        granted = min(missing, self._pool.num_available)
        count = min(count, room + granted * size)
        if count:
            blocks = self._pool.allocate(granted)
            request.blocks += blocks
            self._take(request, draft, count, blocks, reset=False)
        return granted == missing

    def _admit(self, request: Request, index: int, draft: Draft) -> bool:
        """Give a waiting request blocks, and a row if it has none, and plan its share; False if it does not fit.

        Those behind `index` give way. A member of a group whose prompt is being computed is held instead.
        """
        # Those ahead take a block every `block_size` steps: leave them a few steps' worth, so that the newcomer
        # is not preempted at once.
        reserve = (index + 3) // 4
        if self._pool.num_available <= reserve and len(self._running) == index:
            return False
        found = self._prefixes.find(request)
        if found is None:
            self._held.take_first()
            return True
        if request.shadow is not None:
            return self._admit_guided(request, found, index, draft)
        shared, source = found
        size = self.config.block_size
        self._pool.reference(shared)
        computed = len(shared) * size
        known = len(request.tokens) + request.num_pending
        count = self._chunk(request, known - computed, draft.budget, len(self._running) - index)
        missing = -(-(computed + count) // size) - len(shared)
        if not self._make_room(missing + reserve, index):
            self._pool.release(shared)
            return False
        request.blocks = shared + self._pool.allocate(missing)
        request.num_computed = request.num_committed = computed
        request.registers = source is None or source.registers
        request.num_registered = len(shared)
        self._prefixes.count_hits(request, source)
        self._start(request, draft)
        self._take(request, draft, count, list(request.blocks), reset=True)
        return True

    def _start(self, request: Request, draft: Draft) -> None:
        """Move an admitted request among the running ones."""
        if request.status is RequestStatus.PREEMPTED:
            self._preempted.pop()
        else:
            self._waiting.pop()
            placement = self._adapters.take(request)
            if placement is not None:
                draft.adapters.append(placement)
            self._start_row(request, draft)
            request.num_cached_tokens = request.num_computed
            self._held.note(request)
        request.status = RequestStatus.RUNNING
        insort(self._running, request, key=_by_key)

    def _start_row(self, request: Request, draft: Draft) -> None:
        request.row = heappop(self._free_rows)
        draft.starts.append(
            RowStart(
                request.row,
                request.request_id,
                request.prompt_token_ids,
                request.params,
                request.seed,
                request.pooling,
                (request.owner or request).adapter_slot,
            )
        )

    def _chunk(self, request: Request, count: int, budget: int, num_behind: int) -> int:
        """How many of `count` positions to compute now, leaving a token to each of those behind."""
        if request.awaits_prompt_logprobs:
            budget = min(budget, self.config.prompt_logprobs_chunk)
        return min(count, max(1, budget - num_behind - self._num_guided))

    def _make_room(self, wanted: int, first: int) -> bool:
        """Preempt the running requests from `first` on until `wanted` blocks are available, and say if they are."""
        while self._pool.num_available < wanted and len(self._running) > first:
            self._preempt(self._running.pop())
        return self._pool.num_available >= wanted

    def _take(self, request: Request, draft: Draft, count: int, blocks: list[int], *, reset: bool) -> None:
        """Put `count` positions of a running request into the plan."""
        start = request.num_computed
        end = start + count
        samples = end == len(request.tokens) + request.num_pending and request.samples
        assert request.row is not None
        if request.rewind is not None:
            # The plan that brings the row's next step brings the news, so if it fails the request fails with it.
            position = request.num_prompt_tokens + request.rewind.num_tokens
            draft.rewinds.append(RowRewind(request.row, position, request.rewind.barred))
            request.rewind = None
            blocks, reset = list(request.blocks), True
        draft.steps.append(RowStep(request.row, start, count, blocks, reset, samples))
        draft.requests.append((request, request.num_preemptions, request.num_rewinds))
        draft.budget -= count
        request.num_computed = end
        request.num_pending += samples
        request.num_inflight += 1

    def _preempt(self, request: Request) -> None:
        """Take the blocks of a request that was removed from `_running`; it computes again later.

        Its full blocks stay findable until someone needs them. Its row stays: the sampler's state lives there.
        """
        ending = request.num_wanted == request.num_computed
        for sequence in request.sequences:
            self._pool.release(sequence.blocks)
            sequence.blocks = []
            sequence.num_computed = sequence.num_committed = 0
            sequence.num_preemptions += 1
        self._num_guided -= request.shadow is not None
        self._num_preemptions += 1
        if ending:
            request.status = RequestStatus.ENDING
        else:
            request.status = RequestStatus.PREEMPTED
            self._preempted.push(request)

    # Guided requests: `core/guidance.py`.

    def _prepare(self, request: Request) -> tuple[array[int], int, Request | None]:
        """A request's prompt, the number of tokens at which it ends, and its shadow if it is guided."""
        if request.adapter is not None and not self.config.max_loras:
            raise InvalidRequestError("this engine was started without adapters (--enable-lora)", param="model")
        tokens, max_total = self.config.measure(request)
        if request.negative_prompt_ids is None or max_total == len(tokens):
            return tokens, max_total, None
        return tokens, *make_shadow(request, max_total, self.config)

    def _advance_guided(self, request: Request, index: int, draft: Draft) -> bool:
        """`_advance` for a guided request, with its shadow; nothing is planned of either if blocks are lacking."""
        if len(request.tokens) + request.num_pending >= request.max_total or draft.budget < 2:
            return True
        counts = pair_counts(request, draft.budget, len(self._running) - index + self._num_guided - 2, self.config)
        missing = missing_blocks(request, counts, self.config.block_size)
        if not self._make_room(sum(missing), index + 1):
            return False
        self._take_guided(request, draft, counts, missing)
        return True

    def _admit_guided(self, request: Request, found: FoundPrefix, index: int, draft: Draft) -> bool:
        """`_admit` for a guided request and its shadow, of which the first has `found` blocks."""
        assert request.shadow is not None
        if draft.budget < 2:
            return False
        shadow_found = self._prefixes.find(request.shadow)
        assert shadow_found is not None
        for sequence, (shared, source) in zip(request.sequences, (found, shadow_found), strict=True):
            self._pool.reference(shared)
            sequence.blocks, sequence.untold = list(shared), True
            sequence.num_computed = sequence.num_committed = len(shared) * self.config.block_size
            sequence.registers = source is None or source.registers
            sequence.num_registered = len(shared)
        counts = pair_counts(request, draft.budget, len(self._running) - index + self._num_guided, self.config)
        missing = missing_blocks(request, counts, self.config.block_size)
        if not self._make_room(sum(missing) + (index + 3) // 4, index):
            for sequence in request.sequences:
                self._pool.release(sequence.blocks)
                sequence.blocks = []
                sequence.num_computed = sequence.num_committed = 0
            return False
        self._prefixes.count_hits(request, found.source)
        self._start(request, draft)
        if request.shadow.row is None:
            self._start_row(request.shadow, draft)
        self._num_guided += 1
        self._take_guided(request, draft, counts, missing)
        return True

    def _take_guided(self, request: Request, draft: Draft, counts: tuple[int, int], missing: list[int]) -> None:
        pending = request.num_pending
        for sequence, count, wanted in zip(request.sequences, counts, missing, strict=True):
            if count:
                blocks = self._pool.allocate(wanted)
                sequence.blocks += blocks
                reset, sequence.untold = sequence.untold, False
                self._take(sequence, draft, count, list(sequence.blocks) if reset else blocks, reset=reset)
        if request.num_pending != pending:
            assert request.shadow is not None
            assert request.shadow.row is not None
            request.shadow.num_pending += 1
            draft.steps[-2] = draft.steps[-2]._replace(guide=request.shadow.row)

    def _extend_shadow(self, shadow: Request, token: int, preemptions: int) -> None:
        """Take over what the step brought that sampled `token`, before it may end both."""
        if preemptions == shadow.num_preemptions:
            shadow.num_committed = len(shadow.tokens)
            self._prefixes.register(shadow)
        shadow.tokens.append(token)
        shadow.num_pending -= 1

    # A result.

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestUpdate]:
        """Apply the result of the oldest plan in flight; returns what became known, by request."""
        if not self._inflight or self._inflight[0].plan.step_id != plan.step_id or result.step_id != plan.step_id:
            raise RuntimeError(f"step {result.step_id} committed as {plan.step_id} out of order")
        steps, requests = plan.steps, self._inflight.popleft().requests
        if len(result.rows) != len(steps):
            raise RuntimeError(f"step {plan.step_id}: {len(result.rows)} results for {len(steps)} rows")
        updates: list[RequestUpdate] = []
        size = self.config.block_size
        for step, (request, preemptions, rewinds), row in zip(steps, requests, result.rows, strict=True):
            if row.row != step.row:
                raise RuntimeError(f"step {plan.step_id}: result for row {row.row} in place of row {step.row}")
            request.num_inflight -= 1
            token = row.token_id
            if (
                token is not None
                and request.plain
                and request.status is RequestStatus.RUNNING
                and preemptions == request.num_preemptions
                and token not in request.ending_tokens
                and len(request.tokens) + 1 < request.max_total
            ):
                # `_apply` for what most rows of most steps bring, at half its cost.
                request.num_pending -= 1
                committed = request.num_committed = step.start + step.count
                if committed - request.num_registered * size >= size:
                    self._prefixes.register(request)
                request.tokens.append(token)
                updates.append(
                    RequestUpdate(request.request_id, [token], None, None, None, None, request.num_cached_tokens)
                )
                continue
            if request.status is RequestStatus.FINISHED:
                if request.num_inflight == 0:
                    self._release_row(request)
                continue
            if rewinds != request.num_rewinds:
                continue  # a step of tokens that are taken back, which no longer counts as pending
            request.num_pending -= step.samples
            if row.error is not None:
                update = self._fail(request, row.error)
            else:
                update = self._apply(request, preemptions, step, row)
            if update is not None:
                updates.append(update)
        return updates

    def _fail(self, request: Request, error: str) -> RequestUpdate | None:
        """No token could be chosen: end the request, unless what its guard barred may be the reason."""
        if request.owner is not None:
            return self._end(request.owner, "error", error=error)
        relented = None if request.guard is None else request.guard.relent()
        if relented is None:
            return self._end(request, "error", error=error)
        self._go_back(request, relented)
        return None

    def _apply(self, request: Request, preemptions: int, step: RowStep, row: RowResult) -> RequestUpdate | None:
        """One row's result, for a request that goes on so far."""
        prompt_logprobs = request.take_prompt_logprobs(step, row.prompt_logprobs) if row.prompt_logprobs else None
        # A preempted request's tokens count, its computed positions are gone.
        if preemptions == request.num_preemptions:
            request.num_committed = step.start + step.count
            if request.num_committed - request.num_registered * self.config.block_size >= self.config.block_size:
                self._prefixes.register(request)
        if not step.samples:
            if request.owner is not None:
                return None
            if not request.samples and step.start + step.count == request.num_prompt_tokens:
                ended = self._end(request, "length", prompt_logprobs=prompt_logprobs)
                return ended if row.embedding is None else ended._replace(embedding=row.embedding)
            # Of a request that was preempted in its answer, the answer is computed again, too.
            tells = request.tells_progress and len(request.tokens) == request.num_prompt_tokens
            if prompt_logprobs is None and not tells:
                return None
            cached, computed = request.num_cached_tokens, tells * (step.start + step.count)
            update = RequestUpdate(request.request_id, [], None, prompt_logprobs, None, None, cached)
            return update._replace(num_computed=computed)
        token = row.token_id
        if token is None:
            raise RuntimeError(f"row {step.row} of request {request.request_id} brought no token")
        request.tokens.append(token)
        if request.shadow is not None:
            self._extend_shadow(request.shadow, token, preemptions)
        finish_reason, stop_reason = finish_reason_of(request, token, self.config.eos_token_ids, complete=row.complete)
        if request.guard is not None:
            return self._guarded(request, row, prompt_logprobs, finish_reason, stop_reason)
        logprobs = None if row.logprobs is None else [row.logprobs]
        traces = None if row.trace is None else [row.trace]
        if finish_reason is not None:
            return self._end(request, finish_reason, [token], logprobs, prompt_logprobs, stop_reason, traces=traces)
        return RequestUpdate(
            request.request_id, [token], logprobs, prompt_logprobs, None, None, request.num_cached_tokens, None, traces
        )

    def _guarded(
        self,
        request: Request,
        row: RowResult,
        prompt_logprobs: list[TokenLogprobs] | None,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> RequestUpdate | None:
        """`_apply` for the new last token of a request whose guard decides what leaves."""
        assert request.guard is not None
        assert row.token_id is not None
        token = OutputToken(row.token_id, row.logprobs, row.trace)
        verdict = request.guard.push(token, finish_reason, complete=stop_reason == GRAMMAR_COMPLETE)
        if isinstance(verdict, Rewind):
            self._go_back(request, verdict)
            verdict, finish_reason = [], None
        token_ids = [held.token_id for held in verdict]
        logprobs = [held.logprobs for held in verdict if held.logprobs is not None] or None
        traces = [held.trace for held in verdict if held.trace is not None] or None
        if finish_reason is not None:
            update = self._end(request, finish_reason, token_ids, logprobs, prompt_logprobs, stop_reason, traces=traces)
        elif token_ids or prompt_logprobs is not None:
            cached, name = request.num_cached_tokens, request.request_id
            update = RequestUpdate(name, token_ids, logprobs, prompt_logprobs, None, None, cached, None, traces)
        else:
            return None
        return update._replace(warning=request.guard.warning)

    def _go_back(self, request: Request, rewind: Rewind) -> None:
        """Take back the request's last tokens, wherever it stands; a step in flight is dropped when it comes."""
        for sequence in request.sequences:
            self._pool.release(sequence.go_back(rewind, self.config.block_size))
        if request.shadow is not None:
            request.shadow.rewind, request.shadow.untold = None, True  # it has nothing to sample anew
        if request.status is RequestStatus.ENDING:  # it had all its tokens, and now lacks some
            request.status = RequestStatus.PREEMPTED
            self._preempted.push(request)

    def _end(
        self,
        request: Request,
        finish_reason: FinishReason,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
        stop_reason: int | str | None = None,
        error: str | None = None,
        traces: list[TokenTrace] | None = None,
    ) -> RequestUpdate:
        """Finish a request wherever it stands.

        Its blocks are free at once, although a plan in flight may still write to them. That is harmless: the
        device runs plans in order, so whoever gets such a block writes it later and reads it after that; and
        the wasted writes go to positions at or behind `num_committed`, so never to a block that the cache knows.
        Its row is released only when nothing of it is in flight, so no late result meets the row's next owner.
        """
        del self._requests[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
            self._num_guided -= request.shadow is not None
        elif request.status is RequestStatus.PREEMPTED:
            self._preempted.discard(request)
        elif request.status is RequestStatus.WAITING and not (
            self._held.discard(request) or self._adapters.holds(request)
        ):
            self._waiting.discard(request)
        self._adapters.release(request)
        for sequence in request.sequences:
            sequence.status = RequestStatus.FINISHED
            self._pool.release(sequence.blocks)
            sequence.blocks = []
            sequence.num_committed = 0
            if sequence.num_inflight == 0:
                self._release_row(sequence)
        self._held.note(request)
        return RequestUpdate(
            request.request_id,
            token_ids or [],
            logprobs,
            prompt_logprobs,
            finish_reason,
            stop_reason,
            request.num_cached_tokens,
            error,
            traces,
        )

    def _release_row(self, request: Request) -> None:
        if request.row is not None:
            heappush(self._free_rows, request.row)
            self._ended_rows.append(request.row)
            request.row = None

    # Refusals.

    def _refuse_duplicates(self, group: list[Request]) -> None:
        ids = [request.request_id for request in group]
        for request_id in ids:
            if request_id in self._requests or ids.count(request_id) > 1:
                raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")

    def _refuse_overflow(self, count: int) -> None:
        limit = self.config.max_queued_requests
        if limit is None:
            return
        queued = len(self._waiting) + len(self._held) + self._adapters.num_aside
        if queued + count - len(self._free_rows) > limit:
            raise QueueFullError(
                f"{queued} requests are waiting and at most {limit} may wait for a free place; try again later",
                retry_after=_RETRY_AFTER_SECONDS,
            )

    def check(self) -> None:
        """Verify that blocks, references, rows and queues add up. O(everything); for tests and idle moments.

        Raises:
            RuntimeError: an invariant is broken.
        """
        inflight = [request for entry in self._inflight for request, *_ in entry.requests]
        self._pool.check(sequence.blocks for request in self._running for sequence in request.sequences)
        check_requests(
            self._requests,
            running=self._running,
            waiting=[*self._waiting.requests(), *self._adapters.aside],
            preempted=self._preempted.requests(),
            inflight=inflight,
        )
        self._held.check(self._requests.values())
        self._adapters.check()
        if sum(request.shadow is not None for request in self._running) != self._num_guided:
            raise RuntimeError("running guided requests are miscounted")
        unfinished = [sequence for request in self._requests.values() for sequence in request.sequences]
        rows = [r.row for r in {id(r): r for r in (*unfinished, *inflight)}.values()] + self._free_rows
        if sorted(r for r in rows if r is not None) != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"rows are lost or owned twice: {rows}")
