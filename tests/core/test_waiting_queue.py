from __future__ import annotations

from aphrodite.core.request import Request, RequestStatus
from aphrodite.core.waiting_queue import WaitingQueue
from aphrodite.sampling.params import SamplingParams


def waiting(queue: WaitingQueue, *keys: tuple[int, int]) -> list[Request]:
    requests = []
    for key in keys:
        request = Request(f"{key}", [1], SamplingParams(), seed=0)
        request.key = key
        queue.push(request)
        requests.append(request)
    return requests


def drain(queue: WaitingQueue) -> list[tuple[int, int]]:
    keys = []
    while (request := queue.peek()) is not None:
        queue.pop()
        keys.append(request.key)
    return keys


def test_order_is_priority_then_arrival():
    queue = WaitingQueue()
    waiting(queue, (1, 0), (0, 3), (1, 1), (0, 2))
    assert drain(queue) == [(0, 2), (0, 3), (1, 0), (1, 1)]


def test_discarded_requests_are_skipped_and_not_counted():
    queue = WaitingQueue()
    requests = waiting(queue, (0, 0), (0, 1), (0, 2))
    queue.discard(requests[0])
    queue.discard(requests[2])
    assert requests[0].status is RequestStatus.FINISHED
    assert len(queue) == 1
    assert queue.requests() == [requests[1]]
    assert drain(queue) == [(0, 1)]
    assert len(queue) == 0


def test_a_flood_of_aborted_requests_leaves_no_memory_behind_a_stuck_head():
    queue = WaitingQueue()
    head = waiting(queue, (0, 0))[0]
    for arrival in range(1, 10_000):
        queue.discard(waiting(queue, (0, arrival))[0])
    assert queue.peek() is head
    assert len(queue._heap) < 200
