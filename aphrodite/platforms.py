"""Which accelerator this machine has, and what it can do: the one place that tells CUDA from HIP.

torch calls AMD's devices "cuda" too, so code that only moves data or launches Triton kernels need not ask.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

MINIMUM_CAPABILITY = (7, 5)  # of the cards that Triton compiles for
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

Kind = Literal["cuda", "hip", "none"]


class DeviceMemory(NamedTuple):
    """Bytes, as the driver counts them: other processes' share included."""

    free: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """One accelerator, or its absence.

    Attributes:
        architecture: `sm_90` or `gfx942`; the instruction set that kernels are compiled for.
        capability: CUDA's compute capability; (0, 0) elsewhere.
        multiprocessors: streaming multiprocessors or compute units.
    """

    kind: Kind
    name: str
    architecture: str = ""
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start while the one before it still runs."""
        return self.kind == "cuda" and self.capability >= (9, 0)

    @property
    def has_bfloat16(self) -> bool:
        """Whether bfloat16 is multiplied in hardware, and kernels with it compile."""
        return self.kind == "hip" or self.capability >= (8, 0)

    @property
    def has_cudnn_attention(self) -> bool:
        """Whether torch's attention can be cuDNN's, which compiles for Ampere and later."""
        return self.kind == "cuda" and self.capability >= (8, 0) and torch.backends.cudnn.is_available()

    @property
    def fp8_dtype(self) -> torch.dtype | None:
        """The e4m3 type that this card multiplies with a scale per row and column, or None.

        CDNA 3 (gfx94x) has a type of its own: no negative zero, and a bias of 8 instead of 7.
        """
        if self.kind == "cuda":
            return torch.float8_e4m3fn if self.capability >= (8, 9) else None
        if self.architecture.startswith("gfx94"):
            return torch.float8_e4m3fnuz
        return torch.float8_e4m3fn if self.architecture.startswith(("gfx95", "gfx12")) else None

    def describe(self) -> str:
        """One line for people."""
        if self.kind == "none":
            return self.name
        return f"{self.name} ({self.architecture}, {self.multiprocessors} multiprocessors)"


@functools.cache
def current() -> Platform:
    """The accelerator that torch uses by default."""
    if not torch.cuda.is_available():
        return Platform(kind="none", name="none")
    return platform_of(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def platform_of(device: torch.device) -> Platform:
    """What `device`, one of torch's "cuda" devices, is."""
    properties = torch.cuda.get_device_properties(device)
    if is_hip():
        architecture = properties.gcnArchName.partition(":")[0]  # what follows are features, as in gfx942:sramecc+
        return Platform(
            kind="hip",
            name=properties.name,
            architecture=architecture,
            multiprocessors=properties.multi_processor_count,
        )
    return Platform(
        kind="cuda",
        name=properties.name,
        architecture=f"sm_{properties.major}{properties.minor}",
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
    )


@functools.cache
def unusable_reason() -> str | None:
    """Why models cannot run on a GPU here; None if they can."""
    platform = current()
    if platform.kind == "none":
        return f"torch finds no GPU: {_why_there_is_none()}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if platform.kind == "cuda" and platform.capability < MINIMUM_CAPABILITY:
        return f"{platform.name} is older than compute capability 7.5, which the kernels need"
    return None


def _why_there_is_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only; pytorch.org has builds for GPUs"
    hidden = [f"{name} is {os.environ[name]!r}" for name in _VISIBLE if name in os.environ]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old for this torch, no card
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return f"{reason} ({', '.join(hidden)})" if hidden else reason
    return "the driver shows none"


def is_hip() -> bool:
    """Whether torch's "cuda" devices are AMD's."""
    return torch.version.hip is not None


def memory(device: torch.device) -> DeviceMemory:
    """Free and total memory of a GPU."""
    return DeviceMemory(*torch.cuda.mem_get_info(device))
