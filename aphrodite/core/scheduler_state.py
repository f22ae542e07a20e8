"""Where every request stands and what it holds, and its moves from one place to another.

A request waits in a queue (`waiting`; `held` and `adapters` keep some out of it), runs, or was preempted. What runs has
blocks; what has begun keeps its row. Plans (`step_planner.py`), results (`result_applier.py`) and whoever adds and
aborts requests (`scheduler.py`) work on this one state.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from aphrodite.core.adapter_slots import AdapterSlots
from aphrodite.core.block_pool import BlockPool
from aphrodite.core.held_requests import HeldRequests
from aphrodite.core.invariants import check_requests
from aphrodite.core.plan import AdapterPlacement
from aphrodite.core.prefix_cache import PrefixCache
from aphrodite.core.request import Request, RequestStatus, Rewind
from aphrodite.core.row_pool import RowPool
from aphrodite.core.scheduler_config import SchedulerConfig
from aphrodite.core.waiting_queue import WaitingQueue

_by_key = attrgetter("key")


class SchedulerState:
    """All requests that have not finished, the queues they stand in, and the pools they take from.

    Attributes:
        requests: by their id.
        running: in order of service.
        num_guided: running requests with a shadow.
    """

    __slots__ = (
        "adapters", "config", "held", "num_guided", "num_preemptions", "pool", "preempted", "prefixes", "requests",
        "rows", "running", "waiting",
    )  # fmt: skip

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.prefixes = PrefixCache(config, self.pool)
        self.rows = RowPool(config.max_num_seqs)
        self.adapters = AdapterSlots(config.max_loras)
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting = WaitingQueue()
        self.preempted = WaitingQueue()
        self.held = HeldRequests(self.waiting, config.block_size)
        self.num_guided = 0
        self.num_preemptions = 0

    @property
    def num_fresh(self) -> int:
        """Requests that have not begun."""
        return len(self.waiting) + len(self.held) + self.adapters.num_aside

    def requeue(self) -> None:
        """Queue those that were kept out of the queue and may begin now."""
        self.held.release()
        for fresh in self.adapters.take_back():
            self.waiting.push(fresh)

    def next_waiting(self) -> Request | None:
        """The first request in order that is not running and has, or could have, a row."""
        resumed = self.preempted.peek()
        fresh = self.waiting.peek() if self.rows.num_free else None
        while fresh is not None and not self.adapters.admits(fresh):
            self.waiting.pop()
            fresh = self.waiting.peek()
        if fresh is not None and len(fresh.sequences) > self.rows.num_free:
            fresh = None
        if resumed is None or (fresh is not None and fresh.key < resumed.key):
            return fresh
        return resumed

    def start(self, request: Request) -> AdapterPlacement | None:
        """Move the first waiting or preempted request, with its blocks, among the running ones.

        Returns:
            What has to be put into the slot of its adapter first.
        """
        placement = None
        if request.status is RequestStatus.PREEMPTED:
            self.preempted.pop()
        else:
            self.waiting.pop()
            placement = self.adapters.take(request)
            request.num_cached_tokens = request.num_computed
            self.held.note(request)
        request.status = RequestStatus.RUNNING
        self.num_guided += request.shadow is not None
        insort(self.running, request, key=_by_key)
        return placement

    def make_room(self, wanted: int, first: int) -> bool:
        """Preempt the running requests from `first` on until `wanted` blocks are available, and say if they are."""
        while self.pool.num_available < wanted and len(self.running) > first:
            self._preempt(self.running.pop())
        return self.pool.num_available >= wanted

    def _preempt(self, request: Request) -> None:
        """Take the blocks of a request that was removed from `running`; it computes again later.

        Its full blocks stay findable until someone needs them. Its row stays: the sampler's state lives there.
        """
        ending = request.num_wanted == request.num_computed
        for sequence in request.sequences:
            self.give_back_blocks(sequence)
            sequence.num_preemptions += 1
        self.num_guided -= request.shadow is not None
        self.num_preemptions += 1
        if ending:
            request.status = RequestStatus.ENDING
        else:
            request.status = RequestStatus.PREEMPTED
            self.preempted.push(request)

    def give_back_blocks(self, sequence: Request) -> None:
        """Release a sequence's blocks, and with them all its computed positions."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_committed = 0

    def go_back(self, request: Request, rewind: Rewind) -> None:
        """Take back the request's last tokens, wherever it stands; a step in flight is dropped when it comes."""
        for sequence in request.sequences:
            self.pool.release(sequence.go_back(rewind, self.config.block_size))
        if request.shadow is not None:
            request.shadow.rewind, request.shadow.untold = None, True  # it has nothing to sample anew
        if request.status is RequestStatus.ENDING:  # it had all its tokens, and now lacks some
            request.status = RequestStatus.PREEMPTED
            self.preempted.push(request)

    def end(self, request: Request) -> None:
        """Finish a request wherever it stands.

        Its blocks are free at once, although a plan in flight may still write to them. That is harmless: the
        device runs plans in order, so whoever gets such a block writes it later and reads it after that; and
        the wasted writes go to positions at or behind `num_committed`, so never to a block that the cache knows.
        Its row is released only when nothing of it is in flight, so no late result meets the row's next owner.
        """
        del self.requests[request.request_id]
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.num_guided -= request.shadow is not None
        elif request.status is RequestStatus.PREEMPTED:
            self.preempted.discard(request)
        elif request.status is RequestStatus.WAITING and not (
            self.held.discard(request) or self.adapters.holds(request)
        ):
            self.waiting.discard(request)
        self.adapters.release(request)
        for sequence in request.sequences:
            sequence.status = RequestStatus.FINISHED
            self.pool.release(sequence.blocks)
            sequence.blocks = []
            sequence.num_committed = 0
            if sequence.num_inflight == 0:
                self.release_row(sequence)
        self.held.note(request)

    def release_row(self, sequence: Request) -> None:
        if sequence.row is not None:
            self.rows.release(sequence.row)
            sequence.row = None

    def check(self, inflight: Sequence[Request]) -> None:
        """Verify that blocks, references, rows and queues add up. O(everything).

        Args:
            inflight: the request of every step in flight.

        Raises:
            RuntimeError: an invariant is broken.
        """
        self.pool.check(sequence.blocks for request in self.running for sequence in request.sequences)
        check_requests(
            self.requests,
            running=self.running,
            waiting=[*self.waiting.requests(), *self.adapters.aside],
            preempted=self.preempted.requests(),
            inflight=inflight,
        )
        self.held.check(self.requests.values())
        self.adapters.check()
        if sum(request.shadow is not None for request in self.running) != self.num_guided:
            raise RuntimeError("running guided requests are miscounted")
        unfinished = [sequence for request in self.requests.values() for sequence in request.sequences]
        owners = {id(sequence): sequence for sequence in (*unfinished, *inflight)}
        self.rows.check(owner.row for owner in owners.values() if owner.row is not None)
