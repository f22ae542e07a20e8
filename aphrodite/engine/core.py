"""The engine: scheduler and runner, and the loop that keeps the device one step behind the scheduler."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from aphrodite.core.plan import RowResult, StepPlan, StepResult
from aphrodite.core.request import Request, RequestUpdate
from aphrodite.core.scheduler import Scheduler
from aphrodite.engine.adapters import EngineAdapters
from aphrodite.engine.messages import AddRequest, EngineStats
from aphrodite.engine.phrase_bans import PhraseGuard, has_bans
from aphrodite.engine.preparation import negative_prompt
from aphrodite.errors import EngineDeadError, InvalidRequestError, QueueFullError
from aphrodite.layers.lora import AdapterRoom
from aphrodite.runner.data_plane import DataPlane
from aphrodite.runner.results import Outcome
from aphrodite.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_PATIENCE = 0.01  # seconds to wait for a grammar before looking for other work again
STEP_FAILED = "the engine could not compute this request's step; the server's log has the reason"


class EngineCore:
    """Takes requests, runs steps, returns what each step brought. Not thread-safe: one caller drives it.

    Args:
        tokenizer: for requests with bans on their text; without it those are answered by an error.
        room: what adapters there is room for.

    Attributes:
        adapters: those that are loaded.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: DataPlane,
        tokenizer: Tokenizer | None = None,
        *,
        room: AdapterRoom | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        executor = runner.executor
        self.adapters = EngineAdapters(executor.adapters, executor.spec, room, scheduler, self._wants_adapter)
        self._tokenizer = tokenizer
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        self._refused: list[RequestUpdate] = []
        self._preparing: list[tuple[list[Request], Future[None]]] = []  # requests whose grammars are being compiled
        self._preparer: ThreadPoolExecutor | None = None
        self._came: dict[str, float] = {}  # when each request that has not begun came
        self._queued: dict[str, float] = {}  # seconds that requests had waited, until their first news says so
        self._num_steps = 0
        self._lost = False  # the device
        self._host_seconds: deque[float] = deque(maxlen=64)
        self._forward_seconds: deque[float] = deque(maxlen=64)

    def add(self, message: AddRequest) -> None:
        """Queue a request. One that cannot be taken is answered by an error update from the next step."""
        group = [
            Request(
                request_id=request_id,
                prompt_token_ids=message.prompt_token_ids,
                params=message.params,
                seed=seed,
                priority=message.priority,
                cache_salt=message.cache_salt.encode() if message.cache_salt is not None else None,
                negative_prompt_ids=negative_prompt(message.params, message.prompt_token_ids),
                pooling=message.pooling,
                tells_progress=message.progress,
                adapter=message.adapter,
            )
            for request_id, seed in zip(message.request_ids, message.seeds, strict=True)
        ]
        now = time.perf_counter()
        self._came.update((request_id, now) for request_id in message.request_ids)
        try:
            self.adapters.check(message.adapter)
            if has_bans(message.params):
                for request in group:
                    request.guard = self._phrase_guard(message)
        except InvalidRequestError as error:
            self._refuse(group, error)
            return
        if message.params.grammar is None:
            self._schedule(group)
            return
        if self._preparer is None:
            self._preparer = ThreadPoolExecutor(1, "grammars")
        self._preparing.append((group, self._preparer.submit(self.runner.prepare, message.params)))

    def _schedule(self, group: list[Request]) -> None:
        try:
            self.scheduler.add(group)
        except (InvalidRequestError, QueueFullError) as error:
            self._refuse(group, error)

    def _refuse(self, group: list[Request], error: Exception) -> None:
        for request in group:
            self._came.pop(request.request_id, None)
            self._refused.append(RequestUpdate(request.request_id, [], finish_reason="error", error=str(error)))

    def _take_prepared(self) -> None:
        """Schedule the requests whose grammars are compiled; waits a little for one if there is nothing else to do."""
        if not (self._in_flight or self._refused or self.scheduler.has_unfinished()):
            wait([self._preparing[0][1]], timeout=_PATIENCE)
        preparing, self._preparing = self._preparing, []
        for group, prepared in preparing:
            if not prepared.done():
                self._preparing.append((group, prepared))
                continue
            error = prepared.exception()
            if error is None:
                self._schedule(group)
                continue
            if not isinstance(error, InvalidRequestError):
                logger.error("a grammar could not be compiled", exc_info=error)
                error = InvalidRequestError("the grammar could not be compiled; the server's log has the reason")
            self._refuse(group, error)

    def _phrase_guard(self, message: AddRequest) -> PhraseGuard:
        if self._tokenizer is None:
            raise InvalidRequestError("this engine has no tokenizer, so it cannot ban text", param="banned_strings")
        return PhraseGuard(self._tokenizer, message.prompt_token_ids, message.params)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests now; ids that are unknown or already over are ignored."""
        self.scheduler.abort(request_ids)
        if self._preparing:
            gone = set(request_ids)
            left = (([r for r in group if r.request_id not in gone], future) for group, future in self._preparing)
            self._preparing = [(group, future) for group, future in left if group]
        for request_id in request_ids:
            self._came.pop(request_id, None)
            self._queued.pop(request_id, None)

    def has_work(self) -> bool:
        busy = self._in_flight or self._refused or self._preparing or self.adapters.busy
        return bool(busy) or self.scheduler.has_unfinished()

    def step(self) -> list[RequestUpdate]:
        """Launch as far ahead as the runner's depth allows, then collect and commit the oldest step.

        Raises:
            EngineDeadError: the device computes no more.
        """
        began = time.perf_counter()
        if self._preparing:
            self._take_prepared()
        updates, self._refused = self._refused, []
        while len(self._in_flight) <= self.runner.async_depth:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            for start in plan.starts:
                came = self._came.pop(start.request_id, None)
                if came is not None:  # None: the row of a shadow, which starts with its request's
                    self._queued[start.request_id] = began - came
            self._in_flight.append((plan, self.runner.launch(plan)))
        if self._in_flight:
            plan, pending = self._in_flight.popleft()
            outcome = self._collect(plan, pending)
            updates.extend(self._with_queue_times(self.scheduler.commit(plan, outcome.result)))
            self._num_steps += 1
            self._forward_seconds.append(outcome.forward_seconds)
            self._host_seconds.append(time.perf_counter() - began - outcome.waited_seconds)
        if self.adapters.busy:
            oldest = self._in_flight[0][0].step_id if self._in_flight else None
            self.adapters.advance(oldest, idle=not self.scheduler.has_unfinished())
        return updates

    def _wants_adapter(self, number: int) -> bool:
        """Whether a request that has not ended is computed with the adapter."""
        preparing = (request for group, _ in self._preparing for request in group)
        return self.scheduler.uses_adapter(number) or any(request.adapter == number for request in preparing)

    def _with_queue_times(self, updates: list[RequestUpdate]) -> list[RequestUpdate]:
        if not self._queued:
            return updates
        return [update._replace(queue_seconds=self._queued.pop(update.request_id, None)) for update in updates]

    def _collect(self, plan: StepPlan, pending: Any) -> Outcome:
        try:
            return self.runner.collect(plan, pending)
        except Exception as error:
            reason = self.runner.lost()
            if reason is not None:
                self._lost = True
                raise EngineDeadError(reason) from error
            # Which row is to blame cannot be known here, so the step's rows fail and the engine goes on.
            logger.exception("step %d failed; its %d requests end with an error", plan.step_id, len(plan.steps))
            return Outcome(
                StepResult(plan.step_id, [RowResult(step.row, error=STEP_FAILED) for step in plan.steps]), 0.0, 0.0
            )

    def reset_prefix_cache(self) -> None:
        self.scheduler.reset_prefix_cache()

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        return EngineStats(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv_usage,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            num_preemptions=stats.num_preemptions,
            num_steps=self._num_steps,
            host_ms=_median_ms(self._host_seconds),
            forward_ms=_median_ms(self._forward_seconds),
        )

    def close(self) -> None:
        with suppress(EngineDeadError):
            while self._in_flight and not self._lost:
                self._collect(*self._in_flight.popleft())
        if self._preparer is not None:
            self._preparer.shutdown(wait=True, cancel_futures=True)
        self.adapters.close()
        if not self._lost:
            self.runner.close()


def _median_ms(seconds: deque[float]) -> float:
    return sorted(seconds)[len(seconds) // 2] * 1e3 if seconds else 0.0
