"""Which adapters (`loading/lora.py`) lie in the slots that a step computes with, and who waits for one.

A request has a slot from its first step to its end, as it has a row, so its plans need not name it again. An adapter
that nobody uses stays in its slot until another needs it, the least recently used first. What is put into a slot comes
with the plan of the step that first needs it, so it never overtakes a step in flight.

Fairness: a request whose adapter has no slot is set aside, and those behind it that want any adapter too, for their
use of the slots could keep it waiting for ever. Requests without an adapter pass.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from operator import attrgetter

from aphrodite.core.plan import NO_ADAPTER, AdapterPlacement
from aphrodite.core.request import Request, RequestStatus

_by_key = attrgetter("key")


class AdapterSlots:
    """`num_slots` places for adapters, which are known by the numbers that `Request.adapter` holds."""

    __slots__ = ("_aside", "_free", "_released", "_slot_of", "_users", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # adapter -> slot, the least recently used first
        self._users: dict[int, int] = {}  # adapter -> requests that have begun with it
        self._aside: list[Request] = []  # waiting for a slot, in order of service
        self._released = False  # a slot may have come free since they were set aside

    @property
    def aside(self) -> list[Request]:
        """Waiting requests that are in no queue."""
        return list(self._aside)

    @property
    def num_aside(self) -> int:
        return len(self._aside)

    def admits(self, request: Request) -> bool:
        """Whether a request that has not begun may begin now; otherwise it is set aside, and the caller forgets it."""
        adapter = request.adapter
        if adapter is None:
            return True
        blocked = bool(self._aside) and self._aside[0].key < request.key
        if not blocked and (adapter in self._slot_of or self._free or self._idle() is not None):
            return True
        insort(self._aside, request, key=_by_key)
        return False

    def take(self, request: Request) -> AdapterPlacement | None:
        """Give a request that begins its slot; returns what has to be put there first."""
        adapter = request.adapter
        if adapter is None:
            return None
        placement = None
        if adapter not in self._slot_of:
            placement = AdapterPlacement(self._make_room(), adapter)
            self._slot_of[adapter] = placement.slot
        self._slot_of.move_to_end(adapter)
        self._users[adapter] = self._users.get(adapter, 0) + 1
        request.adapter_slot = self._slot_of[adapter]
        return placement

    def release(self, request: Request) -> None:
        """A request has ended, wherever it stood."""
        if request.adapter is None:
            return
        if request.adapter_slot == NO_ADAPTER:
            self._aside = [other for other in self._aside if other is not request]
            self._released = True  # whoever was set aside behind it
            return
        request.adapter_slot = NO_ADAPTER
        self._users[request.adapter] -= 1
        if not self._users[request.adapter]:
            del self._users[request.adapter]
            self._released = True

    def holds(self, request: Request) -> bool:
        """Whether a waiting request was set aside."""
        return any(other is request for other in self._aside)

    def take_back(self) -> list[Request]:
        """Those that were set aside, to be queued again, if a slot may have come free for one of them."""
        if not self._released:
            return []
        self._released = False
        waiting, self._aside = self._aside, []
        return waiting

    def forget(self, adapter: int) -> None:
        """An adapter that nobody uses is gone; its slot is free."""
        if adapter in self._users:
            raise RuntimeError(f"adapter {adapter} is in use")
        if adapter in self._slot_of:
            self._free.append(self._slot_of.pop(adapter))

    def check(self) -> None:
        """Verify that slots, users and waiting requests add up.

        Raises:
            RuntimeError: they do not.
        """
        slots = [*self._free, *self._slot_of.values()]
        if sorted(slots) != list(range(self.num_slots)) or not self._users.keys() <= self._slot_of.keys():
            raise RuntimeError(f"adapter slots are lost or owned twice: {self._free}, {dict(self._slot_of)}")
        if any(request.status is not RequestStatus.WAITING for request in self._aside):
            raise RuntimeError("a request waits for an adapter's slot that has begun or ended")

    def _idle(self) -> int | None:
        """The adapter that nobody uses, and nobody has for the longest time."""
        return next((adapter for adapter in self._slot_of if adapter not in self._users), None)

    def _make_room(self) -> int:
        if self._free:
            return self._free.pop()
        idle = self._idle()
        if idle is None:
            raise RuntimeError("no slot is free for an adapter")
        return self._slot_of.pop(idle)
