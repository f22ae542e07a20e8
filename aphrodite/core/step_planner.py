"""What the next step computes: a budget of tokens, spent in order of service on those that run and those that begin.

The first request in order takes blocks from the last until it has what it needs. Blocks that someone had to give up, or
that someone still lacks, are not for newcomers.
"""

from __future__ import annotations

from aphrodite.core.draft import Draft
from aphrodite.core.guidance import missing_blocks, pair_counts
from aphrodite.core.plan import RowRewind, RowStart, RowStep
from aphrodite.core.prefix_cache import FoundPrefix
from aphrodite.core.request import Request, RequestStatus
from aphrodite.core.scheduler_state import SchedulerState

_NO_BLOCKS: list[int] = []  # shared by the many steps that need no new block; never changed


class StepPlanner:
    """Plans steps on a scheduler's state, moving requests as it goes."""

    __slots__ = ("_config", "_pool", "_running", "_state")

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._config = state.config
        self._pool = state.pool
        self._running = state.running

    def draft(self, step_id: int) -> Draft:
        """The next step; without any rows if nothing can run before a result arrives or a request comes."""
        state, running = self._state, self._running
        draft = Draft(step_id, self._budget())
        state.requeue()
        candidate = state.next_waiting()
        preemptions = state.num_preemptions
        index = 0
        while draft.budget > 0:
            request = running[index] if index < len(running) else None
            if candidate is not None and (request is None or candidate.key < request.key):
                fits = self._admit(candidate, index, draft)
                if candidate.status is RequestStatus.RUNNING:
                    index += 1
                candidate = state.next_waiting()
            elif request is not None:
                fits = self._advance(request, index, draft)
                index += 1
            else:
                break
            if not fits or state.num_preemptions != preemptions:
                candidate = None
        return draft

    def _budget(self) -> int:
        """Tokens of the next step: fewer of prompts where answers go on, because those wait for the step's end."""
        most, beside = self._config.max_num_batched_tokens, self._config.prompt_tokens_beside_answers
        if beside is None or not any(request.num_computed >= request.num_prompt_tokens for request in self._running):
            return most
        return min(most, len(self._running) + self._state.num_guided + beside)

    def _advance(self, request: Request, index: int, draft: Draft) -> bool:
        """Plan a share of the step for the running request at `index`; False if it lacks blocks."""
        if request.shadow is not None:
            return self._advance_guided(request, index, draft)
        known = len(request.tokens) + request.num_pending
        start = request.num_computed
        count = known - start
        if count == 0 or (known >= request.max_total and request.samples):
            return True  # what ends it is in flight
        size = self._config.block_size
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
        self._state.make_room(missing, index + 1)
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
        state = self._state
        # Those ahead take a block every `block_size` steps: leave them a few steps' worth, so that the newcomer
        # is not preempted at once.
        reserve = (index + 3) // 4
        if self._pool.num_available <= reserve and len(self._running) == index:
            return False
        found = state.prefixes.find(request)
        if found is None:
            state.held.take_first()
            return True
        if request.shadow is not None:
            return self._admit_guided(request, found, index, draft)
        self._lend(request, found)
        known = len(request.tokens) + request.num_pending
        count = self._chunk(request, known - request.num_computed, draft.budget, len(self._running) - index)
        missing = -(-(request.num_computed + count) // self._config.block_size) - len(request.blocks)
        if not state.make_room(missing + reserve, index):
            state.give_back_blocks(request)
            return False
        request.blocks += self._pool.allocate(missing)
        state.prefixes.count_hits(request, found.source)
        self._start(request, draft)
        self._take(request, draft, count, list(request.blocks), reset=True)
        return True

    def _lend(self, sequence: Request, found: FoundPrefix) -> None:
        """Give a sequence that is to start the blocks that are there of its tokens."""
        self._pool.reference(found.blocks)
        sequence.blocks = list(found.blocks)
        sequence.num_computed = sequence.num_committed = len(found.blocks) * self._config.block_size
        sequence.registers = found.source is None or found.source.registers
        sequence.num_registered = len(found.blocks)

    def _start(self, request: Request, draft: Draft) -> None:
        """Move an admitted request among the running ones, and give it rows if it is new."""
        placement = self._state.start(request)
        if placement is not None:
            draft.adapters.append(placement)
        for sequence in request.sequences:
            if sequence.row is None:
                sequence.row = self._state.rows.take()
                draft.starts.append(
                    RowStart(
                        sequence.row,
                        sequence.request_id,
                        sequence.prompt_token_ids,
                        sequence.params,
                        sequence.seed,
                        sequence.pooling,
                        request.adapter_slot,
                    )
                )

    def _chunk(self, request: Request, count: int, budget: int, num_behind: int) -> int:
        """How many of `count` positions to compute now, leaving a token to each of those behind."""
        if request.awaits_prompt_logprobs:
            budget = min(budget, self._config.prompt_logprobs_chunk)
        return min(count, max(1, budget - num_behind - self._state.num_guided))

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

    # Guided requests: `guidance.py`.

    def _advance_guided(self, request: Request, index: int, draft: Draft) -> bool:
        """`_advance` for a guided request, with its shadow; nothing is planned of either if blocks are lacking."""
        if len(request.tokens) + request.num_pending >= request.max_total or draft.budget < 2:
            return True
        num_others = len(self._running) - index + self._state.num_guided - 2
        counts = pair_counts(request, draft.budget, num_others, self._config)
        missing = missing_blocks(request, counts, self._config.block_size)
        if not self._state.make_room(sum(missing), index + 1):
            return False
        self._take_guided(request, draft, counts, missing)
        return True

    def _admit_guided(self, request: Request, found: FoundPrefix, index: int, draft: Draft) -> bool:
        """`_admit` for a guided request and its shadow, of which the first has `found` blocks."""
        state = self._state
        assert request.shadow is not None
        if draft.budget < 2:
            return False
        shadow_found = state.prefixes.find(request.shadow)
        assert shadow_found is not None
        for sequence, its_found in ((request, found), (request.shadow, shadow_found)):
            self._lend(sequence, its_found)
            sequence.untold = True
        num_others = len(self._running) - index + state.num_guided
        counts = pair_counts(request, draft.budget, num_others, self._config)
        missing = missing_blocks(request, counts, self._config.block_size)
        if not state.make_room(sum(missing) + (index + 3) // 4, index):
            for sequence in request.sequences:
                state.give_back_blocks(sequence)
            return False
        state.prefixes.count_hits(request, found.source)
        self._start(request, draft)
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
