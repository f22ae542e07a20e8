"""An H100 that is not there: Triton compiles for it, and what would be launched is noted."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

LAUNCHES: list[tuple[Any, ...]] = []


make_launcher = None  # what `compile_worker` looks for in a driver whose launchers are compiled


class Launcher:
    """Notes launches instead of making them."""

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        LAUNCHES.append(tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))


class Utils:
    handles = itertools.count(1)  # of functions; each variant is loaded once

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, next(self.handles), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}


class PretendedDriver:
    """An H100 that is not there."""

    launcher_cls = Launcher
    utils = Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77
