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
from aphrodite.kernels.cpu.sampler_ops import NativeStep

# Structures of native/sampling.h; `align` makes the offsets those of C.
MAX_VALUES = 8
OP = np.dtype(
    [
        ("code", np.int32),
        ("count", np.int32),
        ("ids", np.uint64),
        ("amounts", np.uint64),
        ("data", np.uint64),
        ("values", np.float32, MAX_VALUES),
    ],
    align=True,
)
ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("ops", np.uint64),
        ("barred", np.uint64),
        ("op_count", np.int32),
        ("barred_count", np.int32),
        ("greedy", np.int32),
        ("num_prompt", np.int32),
        ("logprobs", np.int32),
        ("processed", np.int32),
    ],
    align=True,
)


class Batch(ctypes.Structure):
    """What one call samples, and where it writes."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("vocab", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("entries", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("history", ctypes.c_void_p),
        ("history_stride", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("ok", ctypes.c_void_p),
        ("exhausted", ctypes.c_void_p),
        ("top", ctypes.c_int32),
        ("logprobs", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
    )


class Program:
    """A row's operations in the library's layout, with the memory that they point to.

    Args:
        max_positions: that the row may have, the one behind its last token included.
    """

    def __init__(self, steps: Sequence[NativeStep], max_positions: int) -> None:
        self.ops = np.zeros(len(steps), OP)
        self._memory: list[npt.NDArray[Any]] = []
        for op, step in zip(self.ops, steps, strict=True):
            op["code"], op["count"] = step.op, len(step.token_ids)
            op["values"][: len(step.values)] = step.values
            op["ids"] = self._keep(np.array(step.token_ids, np.int32))
            op["amounts"] = self._keep(np.array(step.amounts, np.float32))
            data = np.zeros(max_positions, np.float32) if step.numbers else step.data
            op["data"] = 0 if data is None else self._keep(data)

    def _keep(self, values: npt.NDArray[Any]) -> int:
        self._memory.append(values)
        return values.ctypes.data if values.size else 0


class NativeSampling:
    """Calls into the library; tensors are on the CPU, logits float32 with contiguous rows."""

    def __init__(self, native: library.NativeLibrary, isa: str) -> None:
        self._cdll: Any = native.cdll
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._cdll.aph_sampler_kernels.argtypes = [ctypes.c_char_p]
        self._cdll.aph_sampler_kernels.restype = pointer
        self._cdll.aph_sample.argtypes = [pointer, pointer]
        self._cdll.aph_sample.restype = None
        self._cdll.aph_logprobs.argtypes = [pointer, pointer, i64, i32, i64, pointer, i32, *[pointer] * 4]
        self._cdll.aph_logprobs.restype = None
        self._cdll.aph_uniforms.argtypes = [pointer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, i32, pointer]
        self._cdll.aph_uniforms.restype = None
        sizes = (i32 * 3)()
        self._cdll.aph_sampler_sizes.restype = None
        self._cdll.aph_sampler_sizes(sizes)
        if list(sizes) != [ROW.itemsize, OP.itemsize, ctypes.sizeof(Batch)]:
            raise RuntimeError("the native CPU library lays out sampler rows differently; reinstall the package")
        self._kernels: int = self._cdll.aph_sampler_kernels(isa.encode())

    def sample(self, batch: Batch) -> None:
        """Sample the batch's rows of logits in place; all memory that it points to is the caller's."""
        self._cdll.aph_sample(self._kernels, ctypes.byref(batch))

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
