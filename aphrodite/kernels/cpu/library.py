"""Finds and loads the native CPU library, which `setup.py` builds where a C++ compiler is at hand."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ABI_VERSION = 15
LIBRARY_PATH = Path(__file__).with_name("_native.so")
ISA_VARIABLE = "APHRODITE_CPU_ISA"


@dataclass(frozen=True, slots=True)
class NativeUnavailable:
    """Why the native library cannot be used, in words for `doctor` and logs."""

    reason: str


# What a processor must have for an instruction set, by Linux's names.
ISA_FLAGS = {
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
}


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library.

    Attributes:
        cdll: for declaring and calling further `aph_*` functions; ctypes releases the GIL during calls.
        isa: the instruction set in use: "avx512", "avx2" or "portable".
    """

    cdll: ctypes.CDLL
    isa: str

    def select_isa(self, name: str | None) -> str | None:
        """The instruction set that `name` (None: the best) stands for here, or None if it cannot run."""
        selected: bytes | None = self.cdll.aph_select_isa(name.encode() if name else None)
        return selected.decode() if selected else None

    def left_out(self, flags: Collection[str]) -> list[str]:
        """Instruction sets that a processor with these flags has and the library was built without."""
        there = [isa for isa, needed in ISA_FLAGS.items() if all(flag in flags for flag in needed)]
        return [isa for isa in there if self.select_isa(isa) is None]


@functools.cache
def _load() -> NativeLibrary | NativeUnavailable:
    if not LIBRARY_PATH.exists():
        return NativeUnavailable(
            "the native CPU library was not built at installation, most likely for want of a C++17 compiler; "
            "install g++ or clang++ and reinstall the package"
        )
    try:
        cdll = ctypes.CDLL(str(LIBRARY_PATH))
        version: int = cdll.aph_abi_version()
    except (OSError, AttributeError) as error:
        return NativeUnavailable(f"the native CPU library does not load ({error}); reinstall the package")
    if version != ABI_VERSION:
        return NativeUnavailable(
            f"the native CPU library has interface version {version}, not {ABI_VERSION}; reinstall the package"
        )
    cdll.aph_select_isa.argtypes = [ctypes.c_char_p]
    cdll.aph_select_isa.restype = ctypes.c_char_p
    cdll.aph_set_default_threads.argtypes = [ctypes.c_int32]
    wanted = os.environ.get(ISA_VARIABLE, "")
    isa: bytes | None = cdll.aph_select_isa(wanted.encode())
    if isa is None:
        return NativeUnavailable(f"{ISA_VARIABLE}={wanted!r} names no instruction set that runs on this processor")
    return NativeLibrary(cdll, isa.decode())


def load() -> NativeLibrary | None:
    """The library, loaded once a process; None where it cannot be used (see `unavailable_reason`).

    The environment variable APHRODITE_CPU_ISA chooses a lower instruction set than the best.
    """
    loaded = _load()
    return loaded if isinstance(loaded, NativeLibrary) else None


def unavailable_reason() -> str | None:
    """Why `load` returns None, or None if it does not."""
    loaded = _load()
    return loaded.reason if isinstance(loaded, NativeUnavailable) else None
