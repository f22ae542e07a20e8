"""The native library's reading of row histories (`native/history.cpp`): DRY penalties and n-gram bans."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aphrodite.kernels.cpu import library

BREAKER, HEAD = 1, 2  # DryBreakers.flags

# DryRow and DryBreakers of native/history.h; `align` makes the offsets those of C.
DRY_ROW = np.dtype(
    [
        ("breakers", np.uint64),
        ("multiplier", np.float64),
        ("base", np.float64),
        ("max_exponent", np.int32),
        ("allowed_length", np.int32),
        ("window", np.int32),
    ],
    align=True,
)
_DRY_BREAKERS = np.dtype(
    [
        ("flags", np.uint64),
        ("heads", np.uint64),
        ("first_tail", np.uint64),
        ("tail_start", np.uint64),
        ("tail_tokens", np.uint64),
        ("head_count", np.int32),
    ],
    align=True,
)


class BreakerArrays(NamedTuple):
    """What `DryBreakers` points to: flags [vocab], the tokens with tails ascending, and their tails."""

    flags: npt.NDArray[np.uint8]
    heads: npt.NDArray[np.int32]
    first_tail: npt.NDArray[np.int32]
    tail_start: npt.NDArray[np.int32]
    tail_tokens: npt.NDArray[np.int32]

    def descriptor(self) -> npt.NDArray[np.void]:
        """The C structure; it points into these arrays, which have to outlive it."""
        pointers = tuple(array.ctypes.data for array in self)
        return np.array((*pointers, len(self.heads)), dtype=_DRY_BREAKERS)


class NativeHistory:
    """Calls into the library. Tensors are on the CPU; `history` [num_rows, positions] int32 holds the token ids of
    all rows, of which row `rows[i]`'s first `lengths[i]` count; logits [R, vocab] float32 are changed in place."""

    def __init__(self, native: library.NativeLibrary) -> None:
        self._cdll: Any = native.cdll
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._cdll.aph_dry_penalties.argtypes = [pointer, i64, i32, i64, pointer, i64, *[pointer] * 3]
        self._cdll.aph_dry_penalties.restype = None
        self._cdll.aph_ngram_bans.argtypes = [pointer, i64, i64, pointer, i64, *[pointer] * 3]
        self._cdll.aph_ngram_bans.restype = None
        sizes = (self._cdll.aph_dry_row_bytes(), self._cdll.aph_dry_breakers_bytes())
        if sizes != (DRY_ROW.itemsize, _DRY_BREAKERS.itemsize):
            raise RuntimeError("the native CPU library lays out DRY parameters differently; reinstall the package")

    def dry_penalties(
        self,
        logits: torch.Tensor,
        history: torch.Tensor,
        rows: Sequence[int],
        lengths: Sequence[int],
        table: npt.NDArray[np.void],
    ) -> None:
        """Subtract the penalties of `table` [R] DRY_ROW."""
        places = np.array((rows, lengths), dtype=np.int32)
        self._cdll.aph_dry_penalties(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            len(rows),
            history.data_ptr(),
            history.stride(0),
            places.ctypes.data,
            places.ctypes.data + places.strides[0],
            table.ctypes.data,
        )

    def ngram_bans(
        self,
        logits: torch.Tensor,
        history: torch.Tensor,
        rows: Sequence[int],
        lengths: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        """Mask the tokens that would repeat an n-gram of `sizes` [R] tokens."""
        places = np.array((rows, lengths, sizes), dtype=np.int32)
        first, step = places.ctypes.data, places.strides[0]
        self._cdll.aph_ngram_bans(
            logits.data_ptr(),
            logits.stride(0),
            len(rows),
            history.data_ptr(),
            history.stride(0),
            first,
            first + step,
            first + 2 * step,
        )


@functools.cache
def load() -> NativeHistory | None:
    """The library's history functions; None where it cannot be used."""
    native = library.load()
    return None if native is None else NativeHistory(native)
