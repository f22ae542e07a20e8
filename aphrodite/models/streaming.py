"""Layers whose projections stay in host memory and visit the device in turn, for models larger than it.

Two sets of device tensors of each kind of layer, the slots, take the layers alternately: while one layer computes, the
next is copied.
A forward pass therefore lasts as long as the copies do: bytes offloaded over the bus's bandwidth, some 25 GB/s for
PCIe 4.0 x16.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
SLOTS = 2


def slots_of(kinds: Sequence[Hashable]) -> list[int]:
    """Of each streamed layer the layer in whose tensors it is computed: of its own kind, and not its neighbour.

    Layers of a kind have tensors of the same shapes (a Q4_K_M file has two kinds), and take turns in the first two.
    """
    places: dict[Hashable, list[int]] = {}
    slots = []
    for number, kind in enumerate(kinds):
        alike = places.setdefault(kind, [])
        slots.append(alike[len(alike) % SLOTS] if len(alike) >= SLOTS else number)
        alike.append(number)
    return slots


class LayerStream:
    """Brings the last layers of a model to the device, one after the other.

    Args:
        first: index of the first layer that is streamed.
        host: of each streamed layer its tensors, pinned.
        slots: of each streamed layer the device tensors from which it is computed, of the same shapes; those of two
            neighbours differ.

    Attributes:
        resting: passes copy nothing, for they compute nothing either.
    """

    def __init__(
        self, first: int, host: Sequence[Sequence[torch.Tensor]], slots: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        self._first = first
        self._host = host
        self._slots = slots
        self._copies = torch.cuda.Stream(slots[0][0].device)
        self.resting = False

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(tensor.nbytes for tensors in self._host for tensor in tensors)

    def visit(self, layers: Sequence[T]) -> Iterator[T]:
        """`layers` in order; while one is held, its tensors on the device are its own."""
        if self.resting:
            yield from layers
            return
        current = torch.cuda.current_stream(self._copies.device)
        self._copies.wait_stream(current)  # slots may still be read by the pass before
        arrived = [self._fetch(number) for number in range(min(SLOTS, len(self._host)))]
        yield from layers[: self._first]
        for number, layer in enumerate(layers[self._first :]):
            current.wait_event(arrived[number])
            yield layer
            if number + SLOTS < len(self._host):
                self._copies.wait_stream(current)
                arrived.append(self._fetch(number + SLOTS))

    def _fetch(self, number: int) -> torch.cuda.Event:
        """Start copying a streamed layer into its slot."""
        with torch.cuda.stream(self._copies):
            for slot, host in zip(self._slots[number], self._host[number], strict=True):
                slot.copy_(host, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)
        return arrived
