"""The native library's sampling of CPU rows (`native/sampling.cpp`): its memory layouts and calls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aphrodite.kernels.cpu import library

# SamplerRow of native/sampling.h; `align` makes the offsets those of C.
ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("bias_ids", np.uint64),
        ("bias", np.uint64),
        ("ending_ids", np.uint64),
        ("bias_count", np.int32),
        ("ending_count", np.int32),
        ("free_from", np.int32),
        ("counts_slot", np.int32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("mask_dropped", np.int32),
    ],
    align=True,
)


class NativeSampling:
    """Calls into the library; tensors are on the CPU, logits float32 with contiguous rows."""

    def __init__(self, native: library.NativeLibrary, isa: str) -> None:
        self._cdll: Any = native.cdll
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._cdll.aph_sampler_kernels.argtypes = [ctypes.c_char_p]
        self._cdll.aph_sampler_kernels.restype = pointer
        self._cdll.aph_sample.argtypes = [pointer, pointer, i64, i32, i64, *[pointer] * 7]
        self._cdll.aph_sample.restype = None
        self._cdll.aph_logprobs.argtypes = [pointer, pointer, i64, i32, i64, pointer, i32, *[pointer] * 4]
        self._cdll.aph_logprobs.restype = None
        self._cdll.aph_uniforms.argtypes = [pointer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, i32, pointer]
        self._cdll.aph_uniforms.restype = None
        if self._cdll.aph_sampler_row_bytes() != ROW.itemsize:
            raise RuntimeError("the native CPU library lays out sampler rows differently; reinstall the package")
        self._kernels: int = self._cdll.aph_sampler_kernels(isa.encode())

    def sample(
        self,
        logits: torch.Tensor,
        entries: Sequence[int],
        rows: Sequence[int],
        positions: Sequence[int],
        table: npt.NDArray[np.void],
        counts: torch.Tensor | None,
        token_ids: torch.Tensor,
        ok: torch.Tensor,
    ) -> None:
        """Sample `entries` of `logits` [L, vocab] in place, with parameters `table[rows]`.

        Args:
            counts: [slots, vocab] int32, `TokenCounts.table`, if any of the rows has a slot.
            token_ids: [L] int32, ok: [L] bool; written at `entries`.
        """
        indices = np.array((entries, rows, positions), dtype=np.int32)
        first, step = indices.ctypes.data, indices.strides[0]
        self._cdll.aph_sample(
            self._kernels,
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            len(entries),
            first,
            first + step,
            first + 2 * step,
            table.ctypes.data,
            None if counts is None else counts.data_ptr(),
            token_ids.data_ptr(),
            ok.data_ptr(),
        )

    def logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of `token_ids` [W] int64 under softmax(`logits` [W, vocab]), which is finite or -inf, not all -inf.

        Returns:
            logprob [W] float32, rank [W] int32, the k most likely: ids [W, k] int32, logprobs [W, k] float32.
        """
        count, vocab = logits.shape
        logprob, rank = torch.empty(count, dtype=torch.float32), torch.empty(count, dtype=torch.int32)
        top_ids, top = torch.empty(count, k, dtype=torch.int32), torch.empty(count, k, dtype=torch.float32)
        self._cdll.aph_logprobs(
            self._kernels,
            logits.data_ptr(),
            logits.stride(0),
            vocab,
            count,
            token_ids.data_ptr(),
            k,
            logprob.data_ptr(),
            rank.data_ptr(),
            top_ids.data_ptr(),
            top.data_ptr(),
        )
        return logprob, rank, top_ids, top

    def uniforms(self, seed: int, position: int, use: int, count: int) -> npt.NDArray[np.float32]:
        """[count] float32: what `sampling.random.uniforms_numpy` defines."""
        out = np.empty(count, np.float32)
        self._cdll.aph_uniforms(self._kernels, seed, position, use, count, out.ctypes.data)
        return out


@functools.cache
def load(isa: str | None = None) -> NativeSampling | None:
    """The library's sampling on an instruction set (None: the chosen one); None where it cannot be used."""
    native = library.load()
    if native is None:
        return None
    selected = native.isa if isa is None else native.select_isa(isa)
    return None if selected is None else NativeSampling(native, selected)
