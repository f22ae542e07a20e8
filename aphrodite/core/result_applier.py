"""What a step's result means for its requests: tokens appended, blocks made findable, answers ended or taken back."""

from __future__ import annotations

from aphrodite.core.draft import InFlight
from aphrodite.core.finish import GRAMMAR_COMPLETE, finish_reason_of
from aphrodite.core.plan import RowResult, RowStep, StepResult, TokenLogprobs
from aphrodite.core.request import OutputToken, Request, RequestStatus, RequestUpdate, Rewind
from aphrodite.core.scheduler_state import SchedulerState
from aphrodite.outputs import FinishReason


class ResultApplier:
    """Applies results to a scheduler's state."""

    __slots__ = ("_state",)

    def __init__(self, state: SchedulerState) -> None:
        self._state = state

    def apply(self, entry: InFlight, result: StepResult) -> list[RequestUpdate]:
        """Take what the step brought, row by row; returns what became known, by request."""
        updates: list[RequestUpdate] = []
        register, size = self._state.prefixes.register, self._state.config.block_size
        for step, (request, preemptions, rewinds), row in zip(
            entry.plan.steps, entry.requests, result.rows, strict=True
        ):
            if row.row != step.row:
                raise RuntimeError(f"step {result.step_id}: result for row {row.row} in place of row {step.row}")
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
                # `_apply_row` for what most rows of most steps bring, at half its cost.
                request.num_pending -= 1
                committed = request.num_committed = step.start + step.count
                if committed - request.num_registered * size >= size:
                    register(request)
                request.tokens.append(token)
                updates.append(
                    RequestUpdate(request.request_id, [token], None, None, None, None, request.num_cached_tokens)
                )
                continue
            if request.status is RequestStatus.FINISHED:
                if request.num_inflight == 0:
                    self._state.release_row(request)
                continue
            if rewinds != request.num_rewinds:
                continue  # a step of tokens that are taken back, which no longer counts as pending
            request.num_pending -= step.samples
            if row.error is not None:
                update = self._fail(request, row.error)
            else:
                update = self._apply_row(request, preemptions, step, row)
            if update is not None:
                updates.append(update)
        return updates

    def _fail(self, request: Request, error: str) -> RequestUpdate | None:
        """No token could be chosen: end the request, unless what its guard barred may be the reason."""
        if request.owner is not None:
            request = request.owner
        elif request.guard is not None and (relented := request.guard.relent()) is not None:
            self._state.go_back(request, relented)
            return None
        self._state.end(request)
        cached = request.num_cached_tokens
        return RequestUpdate(request.request_id, [], finish_reason="error", num_cached_tokens=cached, error=error)

    def _apply_row(self, request: Request, preemptions: int, step: RowStep, row: RowResult) -> RequestUpdate | None:
        """One row's result, for a request that goes on so far."""
        prompt_logprobs = request.take_prompt_logprobs(step, row.prompt_logprobs) if row.prompt_logprobs else None
        # A preempted request's tokens count, its computed positions are gone.
        if preemptions == request.num_preemptions:
            size = self._state.config.block_size
            request.num_committed = step.start + step.count
            if request.num_committed - request.num_registered * size >= size:
                self._state.prefixes.register(request)
        if not step.samples:
            return self._apply_prompt(request, step, row, prompt_logprobs)
        token = row.token_id
        if token is None:
            raise RuntimeError(f"row {step.row} of request {request.request_id} brought no token")
        request.tokens.append(token)
        if request.shadow is not None:
            self._extend_shadow(request.shadow, token, preemptions)
        eos_token_ids = self._state.config.eos_token_ids
        finish_reason, stop_reason = finish_reason_of(request, token, eos_token_ids, complete=row.complete)
        output = OutputToken(token, row.logprobs, row.trace)
        if request.guard is None:
            return self._tell(request, [output], prompt_logprobs, finish_reason, stop_reason)
        verdict = request.guard.push(output, finish_reason, complete=stop_reason == GRAMMAR_COMPLETE)
        if isinstance(verdict, Rewind):
            self._state.go_back(request, verdict)
            verdict, finish_reason, stop_reason = [], None, None
        return self._tell(request, verdict, prompt_logprobs, finish_reason, stop_reason)

    def _apply_prompt(
        self, request: Request, step: RowStep, row: RowResult, prompt_logprobs: list[TokenLogprobs] | None
    ) -> RequestUpdate | None:
        """`_apply_row` for a step that sampled nothing."""
        if request.owner is not None:
            return None
        end, cached = step.start + step.count, request.num_cached_tokens
        update = RequestUpdate(request.request_id, [], None, prompt_logprobs, num_cached_tokens=cached)
        if not request.samples and end == request.num_prompt_tokens:
            self._state.end(request)
            return update._replace(finish_reason="length", embedding=row.embedding)
        # Of a request that was preempted in its answer, the answer is computed again, too.
        if request.tells_progress and len(request.tokens) == request.num_prompt_tokens:
            return update._replace(num_computed=end)
        return None if prompt_logprobs is None else update

    def _extend_shadow(self, shadow: Request, token: int, preemptions: int) -> None:
        """Take over what the step brought that sampled `token`, before it may end both."""
        if preemptions == shadow.num_preemptions:
            shadow.num_committed = len(shadow.tokens)
            self._state.prefixes.register(shadow)
        shadow.tokens.append(token)
        shadow.num_pending -= 1

    def _tell(
        self,
        request: Request,
        outputs: list[OutputToken],
        prompt_logprobs: list[TokenLogprobs] | None,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> RequestUpdate | None:
        """What is new of a request whose `outputs` leave, and its end if there is a reason; None if nothing is."""
        if finish_reason is not None:
            self._state.end(request)
        elif not outputs and prompt_logprobs is None:
            return None
        return RequestUpdate(
            request.request_id,
            [output.token_id for output in outputs],
            [output.logprobs for output in outputs if output.logprobs is not None] or None,
            prompt_logprobs,
            finish_reason,
            stop_reason,
            request.num_cached_tokens,
            None,
            [output.trace for output in outputs if output.trace is not None] or None,
            None if request.guard is None else request.guard.warning,
        )
