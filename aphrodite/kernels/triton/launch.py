"""Programmatic dependent launch: a kernel starts while its predecessor still runs, and waits where it needs the result.

CUDA 9.0 and later (PTX ISA, "griddepcontrol"). A kernel of the chain

1. calls `launch_dependents` first, so that its successor's blocks become resident as soon as there is room;
2. loads what no kernel of the step writes (weights, tables);
3. calls `wait_for_producer`: from here on everything that earlier kernels wrote is visible.

Every kernel launched with `launch_options` must wait in every block, even one that reads no activations: completion is
only transitive through the waits. Before the wait nothing may be written and no producer's output read.

    kernel[grid](..., PDL=pdl, **launch_options(pdl))      # pdl = pdl_supported(x.device)

With `PDL=False` (HIP, older cards, the interpreter) both calls vanish.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aphrodite.platforms import platform_of


@functools.cache
def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched before their predecessor ends."""
    return device.type == "cuda" and platform_of(device).has_dependent_launch


def launch_options(pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a kernel launch that takes part in dependent launch, or none."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel's blocks start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and their writes are visible."""
    if PDL:
        gdc_wait()
