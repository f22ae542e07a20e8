"""Requests that wait, in order of service."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from aphrodite.core.request import Request, RequestStatus


class WaitingQueue:
    """A heap by `Request.key` with lazy deletion: each operation costs O(log n), amortized.

    A request that finishes while it waits is discarded: its entry stays behind and is skipped, and the heap is
    rebuilt once such entries are the majority.
    """

    __slots__ = ("_heap", "_live")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def requests(self) -> list[Request]:
        """The waiting requests in no particular order. O(n)."""
        return [request for _, request in self._heap if request.status is not RequestStatus.FINISHED]

    def push(self, request: Request) -> None:
        heappush(self._heap, (request.key, request))
        self._live += 1

    def peek(self) -> Request | None:
        """The request to serve next."""
        heap = self._heap
        while heap:
            request = heap[0][1]
            if request.status is not RequestStatus.FINISHED:
                return request
            heappop(heap)
        return None

    def pop(self) -> None:
        """Remove the request that `peek` has just returned."""
        heappop(self._heap)
        self._live -= 1

    def discard(self, request: Request) -> None:
        """Remove a waiting request, marking it finished."""
        request.status = RequestStatus.FINISHED
        self._live -= 1
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[1].status is not RequestStatus.FINISHED]
            heapify(self._heap)
