"""Launching kernels: without Triton's dispatch where it is known, and before their predecessor has ended.

Direct launches. Triton binds, specialises and looks up a kernel's compiled variant at every launch in Python, 15 to 40
us for the kernels here, which is more than many of them run. `direct_launch`, over `triton.jit` of an entry point,
keeps a variant under what tells it apart and hands later launches straight to Triton's compiled launcher.

Programmatic dependent launch: a kernel starts while its predecessor still runs, and waits where it needs the result.
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
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from aphrodite.kernels.dispatch import Declined, log_once
from aphrodite.platforms import platform_of

logger = logging.getLogger(__name__)

# Versions whose compiled kernels' `run` was read: it takes grid, stream, function, metadata, three hooks, then all
# parameters in order, constants included.
DIRECT_VERSIONS = ("3.6.", "3.7.")
# Gluon is marked experimental: its kernels run with the versions of Triton that they were checked with.
GLUON_VERSIONS = ("3.6.",)
INT32 = 1 << 31
SLOW_SECONDS = 0.1  # of a first launch, which a compiled kernel takes a tenth of


def _let_keys_be_reproducible() -> None:
    """Give a kernel the same key of Triton's cache in every process.

    The key takes in the global constants of the functions that a kernel calls. Triton merges a function's constants
    before it has looked for them, so only those are in it that another kernel's key had asked for earlier; a launch
    then does not find what a worker has compiled that came to the kernel by another way.
    """
    finder: Any = getattr(triton.runtime.jit, "DependenciesFinder", None)
    merge = getattr(finder, "_update_hash", None)
    if merge is None:
        return

    def merge_what_was_found(self: Any, function: Any) -> None:
        _ = function.cache_key  # looks for the constants
        merge(self, function)

    finder._update_hash = merge_what_was_found


_let_keys_be_reproducible()


class _Variant(NamedTuple):
    """A compiled kernel: its launcher, the device's handle, and the constants behind its arguments."""

    run: Callable[..., object]
    function: int
    metadata: object
    constants: tuple[object, ...]


# What to do with a launch instead of making it, while `recording`: kernel, arguments by position, all others.
Recorder = Callable[["DirectKernel", Sequence[Any], Mapping[str, Any]], None]
_recorder: Recorder | None = None


class _Zeroed(TorchFunctionMode):
    """Memory that would hold anything holds zeros, which are an index, an address within a table and a number."""

    _FILLED: ClassVar = {
        torch.empty: torch.zeros,
        torch.empty_like: torch.zeros_like,
        torch.Tensor.new_empty: torch.Tensor.new_zeros,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._FILLED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of launches of kernels under `direct_launch` instead of making them; all else runs, on zeros.

    It had better keep no tensor: a step's memory is used again and again, and all of a model's would not fit.
    """
    global _recorder
    _recorder = recorder
    try:
        with _Zeroed():
            yield
    finally:
        _recorder = None


class DirectKernel:
    """A kernel that Triton compiles and launches the first time, and that is launched directly afterwards.

    Attributes:
        jitted: the kernel as Triton knows it.
        arg_names: of its parameters, as Triton's kernels tell them.
    """

    def __init__(self, jitted: JITFunction[Any], *, direct: bool = True) -> None:
        """Args:
        direct: whether variants may be launched directly; otherwise Triton launches every time.
        """
        self.jitted = jitted
        self.arg_names: list[str] = jitted.arg_names
        self.__name__: str = jitted.fn.__name__
        self._direct = direct
        self._variants: dict[tuple[object, ...], _Variant | None] = {}  # None: this one only Triton can launch
        self._is_constant = [parameter.is_constexpr for parameter in jitted.params]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> object:
        """Compile what a launch with these arguments would."""
        return self.jitted.warmup(*args, grid=grid, **options)

    def _launch(self, grid: tuple[int, ...], *args: object, **options: Any) -> None:
        if _recorder is not None:
            _recorder(self, args, options)
            return
        active = driver.active
        device = active.get_current_device()
        described = _describe(args, self._is_constant) if self._direct else None
        if described is None:
            self.jitted[grid](*args, **options)
            return
        kinds, values = described
        key = (device, *kinds, *options, *options.values())
        variant = self._variants.get(key, _UNKNOWN)
        if variant is None:
            self.jitted[grid](*args, **options)
        elif variant is _UNKNOWN:
            began = time.perf_counter()
            self._variants[key] = self._variant(self.jitted[grid](*args, **options), len(args), options)
            seconds = time.perf_counter() - began
            if seconds > SLOW_SECONDS:
                logger.debug("the first launch of %s took %.2f s: %s", self.__name__, seconds, options)
        else:
            count = len(grid)
            variant.run(
                grid[0],
                grid[1] if count > 1 else 1,
                grid[2] if count > 2 else 1,
                active.get_current_stream(device),
                variant.function,
                variant.metadata,
                None,
                None,
                None,
                *values,
                *variant.constants,
            )

    def _variant(self, compiled: Any, count: int, options: Mapping[str, object]) -> _Variant | None:
        """What launches `compiled` for `count` arguments by position; None if others than constants came by name."""
        rest = self.jitted.params[count:]
        if not all(parameter.is_constexpr and parameter.name in options for parameter in rest):
            return None
        constants = tuple(options[parameter.name] for parameter in rest)
        return _Variant(compiled.run, compiled.function, compiled.packed_metadata, constants)


_UNKNOWN = _Variant(lambda *args: None, 0, None, ())


def _describe(args: Sequence[Any], is_constant: Sequence[bool]) -> tuple[list[object], list[object]] | None:
    """What Triton tells variants apart by, or more, and the values to launch with; None for what is not known here.

    Triton specialises pointers and integers by whether they are multiples of 16, integers also by whether they are 1
    and by their width, and descriptors by their type and block.
    """
    kinds: list[object] = []
    values = list(args)
    for at, arg in enumerate(args):
        kind = type(arg)
        if kind is Tensor:
            pointer = values[at] = arg.data_ptr()
            kinds.append((arg.dtype, 16) if pointer & 15 else arg.dtype)
        elif is_constant[at]:
            kinds.append(arg)
        elif kind is int:
            if not -INT32 <= arg < INT32:
                return None
            kinds.append(1 if arg == 1 else 0 if arg & 15 else 16)
        elif kind is float or arg is None:
            kinds.append(kind)
        elif hasattr(arg, "block_shape"):  # a descriptor, Gluon's with a layout
            kinds.append((arg.base.dtype, *arg.block_shape, getattr(arg, "layout", None)))
        else:
            return None
    return kinds, values


class Tiles(TensorDescriptor):  # type: ignore[misc]
    """A descriptor for the copy engine whose alignment the caller answers for: checking takes as long as launching."""

    def __post_init__(self) -> None:
        pass


def tiles(tensor: torch.Tensor, block: Sequence[int]) -> TensorDescriptor:
    """`tensor` `[rows, columns]` as blocks that the copy engine moves: base and rows are multiples of 16 bytes."""
    return Tiles(tensor, tensor.shape, tensor.stride(), block)


def direct_launch(jitted: Any) -> Any:
    """The kernel, launched directly where that is known to work; in the interpreter as it is."""
    if not isinstance(jitted, JITFunction):
        return jitted
    declined = _declines_direct_launches()
    if declined is not None:
        log_once(logging.INFO, f"kernels are launched by Triton itself, which takes the host longer: {declined.reason}")
    return DirectKernel(jitted, direct=declined is None)


def _declines_direct_launches() -> Declined | None:
    if torch.version.hip is not None:
        return Declined("on HIP variants depend on more than is known here")
    if not triton.__version__.startswith(DIRECT_VERSIONS):
        checked = " and ".join(f"{version}x" for version in DIRECT_VERSIONS)
        return Declined(f"Triton {triton.__version__} is not one of those that were checked, {checked}")
    return None


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's own on the host is wrapped for kernels and takes 2 us, as does the next one."""
    return -(-a // b)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is at least `count`, which is positive."""
    return 1 << (count - 1).bit_length()


def gluon_version_reason() -> str | None:
    """Why kernels in Gluon do not run with this Triton; None if they do."""
    if triton.__version__.startswith(GLUON_VERSIONS):
        return None
    return f"they were checked with Triton {'x, '.join(GLUON_VERSIONS)}x, not {triton.__version__}"


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
