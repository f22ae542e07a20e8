"""Members of fork groups (`n` > 1) that wait for their group's prompt, outside the waiting queue."""

from __future__ import annotations

from collections.abc import Iterable

from aphrodite.core.request import ForkGroup, Request, RequestStatus
from aphrodite.core.waiting_queue import WaitingQueue


class HeldRequests:
    """Requests of `waiting` that are kept back until another of their group has computed the prompt for them."""

    __slots__ = ("_block_size", "_count", "_forming", "_waiting")

    def __init__(self, waiting: WaitingQueue, block_size: int) -> None:
        self._waiting = waiting
        self._block_size = block_size
        self._forming: dict[ForkGroup, None] = {}  # groups with held members whose leader has been admitted
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def form_group(self, group: list[Request]) -> None:
        """Hold all but the first of several requests with one prompt, if there are blocks of it to share."""
        num_shared = (group[0].num_prompt_tokens - 1) // self._block_size
        if num_shared == 0 or len(group) == 1:
            for sibling in group[1:]:
                self._waiting.push(sibling)
            return
        fork = ForkGroup(leader=group[0], members=group, held=group[1:], num_shared_blocks=num_shared)
        for request in group:
            request.group = fork
        self._count += len(fork.held)

    def take_first(self) -> None:
        """Take the first waiting request, of a group that forms, out of the queue until its prompt is computed."""
        request = self._waiting.peek()
        assert request is not None
        assert request.group is not None
        self._waiting.pop()
        request.group.held.append(request)
        self._count += 1
        self._forming[request.group] = None

    def note(self, request: Request) -> None:
        """A request was admitted or has ended, so others of its group may go on soon."""
        if request.group is not None and request.group.held:
            self._forming[request.group] = None

    def discard(self, request: Request) -> bool:
        """Forget a request; False if it was not held."""
        if request.group is None or request not in request.group.held:
            return False
        request.group.held.remove(request)
        self._count -= 1
        return True

    def release(self) -> None:
        """Queue the held members of groups whose prompt is computed, or whose leader cannot compute it any more.

        In the second case the first to be admitted leads, and the others are held again unless the cache serves
        them: the leader may have ended with the very step that computed the prompt.
        """
        for group in list(self._forming):
            gone = group.leader.status in (RequestStatus.FINISHED, RequestStatus.ENDING)
            if not gone and group.source(self._block_size) is None:
                continue
            del self._forming[group]
            for request in group.held:
                self._waiting.push(request)
            self._count -= len(group.held)
            group.held = []

    def check(self, requests: Iterable[Request]) -> None:
        """Verify the count against all unfinished requests.

        Raises:
            RuntimeError: it is wrong.
        """
        if sum(request.group is not None and request in request.group.held for request in requests) != self._count:
            raise RuntimeError("groups have lost count")
