"""Copies between host and accelerator that never make the host wait, except where it asks for a result.

Host memory of a copy is pinned and comes from torch's caching allocator, which hands a buffer out again only
after the copies from it have ended. Without an accelerator (tests of the device path) all of this is immediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class HostCopy(NamedTuple):
    """Tensors on their way to the host."""

    tensors: list[torch.Tensor]
    ready: torch.cuda.Event | None

    def wait(self) -> list[torch.Tensor]:
        """The tensors in host memory, once they are there."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tensors


class StepClock(NamedTuple):
    """Begin and end of a step's work on the device."""

    began: torch.cuda.Event | None
    ended: torch.cuda.Event | None

    def seconds(self) -> float:
        """Between the two; of meaning once a copy made after `ended` has arrived."""
        if self.began is None or self.ended is None:
            return 0.0
        return float(self.began.elapsed_time(self.ended)) / 1e3


class Transfers:
    """The compute stream of a device, and copies to and from it in that stream's order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, values: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of `values` on the device, in `out` where given."""
        host = torch.from_numpy(values)
        if self.stream is not None:
            host = host.pin_memory()
        if out is None:
            return host.to(self.device, non_blocking=True)
        return out.copy_(host, non_blocking=True)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> HostCopy:
        """Start copying what the work launched so far leaves in `tensors`."""
        if self.stream is None:
            return HostCopy([tensor.clone() for tensor in tensors], None)
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        ready = torch.cuda.Event()
        ready.record(self.stream)
        return HostCopy(copies, ready)

    def mark(self) -> torch.cuda.Event | None:
        """A point in time of the compute stream."""
        if self.stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event
