"""A process that compiles kernels for a card without touching it; see compile_ahead.py.

The first line of its input is the target as JSON `[backend, architecture, warp size]`, each further one a job of
`compile_ahead.encode`. For each job it writes a line: `null`, or why it failed as a JSON string.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from aphrodite.kernels.triton.launch import DirectKernel, Tiles

LAUNCHERS = {
    "cuda": ("triton.backends.nvidia.driver", "CudaLauncher"),
    "hip": ("triton.backends.amd.driver", "HIPLauncher"),
}


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Triton asks of a tensor when it compiles.

    Attributes:
        address: any that is aligned as the tensor's.
    """

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        """Bytes that lie behind the pointer: few, as of the allocations that were compiled for."""
        return 0


class WithoutDevice:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_job(job: str, target: GPUTarget) -> None:
    """Compile a job of `encode` and its launcher's stub into Triton's cache."""
    module, name, arguments, options = json.loads(job)
    kernel = getattr(importlib.import_module(module), name)
    if not isinstance(kernel, DirectKernel):
        raise TypeError(f"{module}.{name} is no kernel that is launched directly")
    compiled: Any = kernel.warmup(*map(_decode_argument, arguments), grid=(1,), **options)
    backend, launcher = LAUNCHERS[target.backend]
    driver_module = importlib.import_module(backend)
    if hasattr(driver_module, "make_launcher"):  # until Triton 3.6; later launchers are no programs of their own
        getattr(driver_module, launcher)(compiled.src, compiled.metadata)


def _decode_argument(encoded: list[Any]) -> object:
    kind, *rest = encoded
    if kind == "value":
        return rest[0]
    dtype = getattr(torch, rest[0])
    if kind == "pointer":
        return Pointer(dtype, rest[1])
    block = rest[1]
    if kind == "gluon tiles":
        return _gluon_tiles(dtype, block)
    return Tiles(Pointer(dtype, 0), block, [1] * len(block), block)


def _gluon_tiles(dtype: torch.dtype, block: list[int]) -> object:
    from triton.experimental.gluon.language import NVMMASharedLayout  # not in every Triton
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width = min(block[-1] * dtype.itemsize, 128)
    layout = NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * dtype.itemsize)
    return TensorDescriptor(Pointer(dtype, 0), block, [block[-1], 1], block, layout)


def main() -> None:
    # What libraries print must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.CRITICAL)
    backend, architecture, warp_size = json.loads(sys.stdin.readline())
    target = GPUTarget(backend, architecture, warp_size)
    driver.set_active(WithoutDevice(target))
    for job in sys.stdin:
        try:
            compile_job(job, target)
            failure = None
        except Exception as error:  # whatever it is, the next job may fare better
            failure = f"{job[:200].strip()}: {type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(failure), file=answers, flush=True)


if __name__ == "__main__":
    main()
