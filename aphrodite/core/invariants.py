"""What must hold of all requests between two actions of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from aphrodite.core.guidance import check_shadow
from aphrodite.core.request import Request, RequestStatus


def check_requests(
    requests: Mapping[str, Request],
    *,
    running: Sequence[Request],
    waiting: Sequence[Request],
    preempted: Sequence[Request],
    inflight: Sequence[Request],
) -> None:
    """Verify that every unfinished request stands in exactly one place, and that its counters agree.

    Args:
        requests: all unfinished ones.
        running, waiting, preempted: the scheduler's queues, each in its order.
        inflight: the request of every step in flight.

    Raises:
        RuntimeError: an invariant is broken.
    """
    if any(a.key >= b.key for a, b in pairwise(running)):
        raise RuntimeError("running requests are out of order")
    held = [r for r in requests.values() if r.group is not None and r in r.group.held]
    ending = [r for r in requests.values() if r.status is RequestStatus.ENDING]
    places = [*running, *waiting, *preempted, *held, *ending]
    if len(places) != len(requests) or {r.request_id for r in places} != requests.keys():
        raise RuntimeError("a request stands in two places, or in none")
    if any(r.row is not None for r in (*waiting, *held)):
        raise RuntimeError("a request that has not begun has a row")
    for request in (*running, *preempted, *ending):
        flights = sum(r is request for r in inflight)
        if flights != request.num_inflight or not 0 <= request.num_pending <= flights:
            raise RuntimeError(f"request {request.request_id}: steps in flight miscounted")
        if request.num_committed > len(request.tokens) or request.num_committed > request.num_computed:
            raise RuntimeError(f"request {request.request_id}: progress is inconsistent")
        check_shadow(request, inflight)
