"""Checkpoint tensors as dense tensors of the compute dtype, converted piece by piece.

For an accelerator, dense values travel as the file has them, through pinned memory, and are converted there; blocks
of quantized values are expanded on the host. Cost: one read of the file and one copy of its bytes (for blocks, of
float32 values), with the copy to the device behind the read of the next piece.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from aphrodite.errors import ModelFormatError
from aphrodite.kernels.dispatch import log_once
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import PackedTensor
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor

_PIECE_VALUES = 4 * 1024 * 1024  # values in flight; bounds what conversion needs above its result
_STORED = {QuantType.F32: torch.float32, QuantType.F16: torch.float16, QuantType.BF16: torch.bfloat16}


def to_dense(raw: RawTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`raw` dequantized, `[*raw.shape]` of `dtype` on `device`."""
    return stack_dense([raw], dtype, device)


def stack_dense(parts: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Tensors that agree in all but their first dimension, dequantized and stacked along it.

    Raises:
        ModelFormatError: a value does not fit float16.
    """
    _tell_of_change(parts, dtype)
    rows = sum(part.shape[0] for part in parts)
    out = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
    at = 0
    for part in parts:
        _convert(part, out[at : at + part.shape[0]])
        at += part.shape[0]
    return out


def short_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _tell_of_change(parts: Sequence[RawTensor], dtype: torch.dtype) -> None:
    """Logs once for each type in blocks what expanding it costs, and for each type what is rounded."""
    kept = {torch.bfloat16: QuantType.BF16, torch.float16: QuantType.F16}.get(dtype)
    for part in parts:
        changes = []
        expanded = part.qtype.block_size > 1 or isinstance(part, PackedTensor)
        if expanded:
            factor = dtype.itemsize * math.prod(part.shape) / part.nbytes
            # Of packed tensors it differs a little from shape to shape, which is no reason to log it again.
            times = f"about {factor:.0f}" if isinstance(part, PackedTensor) else f"{factor:.1f}"
            changes.append(f"expanded to {short_name(dtype)} in {times} times their memory")
        if dtype != torch.float32 and (expanded or part.qtype is not kept):
            changes.append(f"rounded to {short_name(dtype)}; --dtype float32 is exact")
        if changes:
            level = logging.INFO if dtype == torch.float32 else logging.WARNING
            log_once(level, f"{part.type_name} weights: {', '.join(changes)}")


def _convert(raw: RawTensor, out: torch.Tensor) -> None:
    on_host = out.device.type == "cpu"
    if isinstance(raw, NoiseTensor) and not on_host:
        generator = torch.Generator(out.device).manual_seed(raw.seed)
        out.normal_(0.0, raw.standard_deviation, generator=generator)
        return
    for piece, target in _pieces(raw, out):
        target.copy_(torch.from_numpy(dequantize(piece)) if on_host else _send(piece, out.device))
        if out.dtype == torch.float16 and not bool(torch.isfinite(target).all()):
            raise ModelFormatError(
                f"tensor {raw.name} has values outside the range of float16; use --dtype bfloat16 or float32"
            )


def _pieces(raw: RawTensor, out: torch.Tensor) -> Iterator[tuple[RawTensor, torch.Tensor]]:
    """Rows of a matrix, or matrices of a stack, as many at a time as may be in flight, and where they go; a vector is
    one piece."""
    if len(raw.shape) == 1:
        yield raw, out
        return
    inner = math.prod(raw.shape[1:-1])  # rows of a matrix of the stack
    step = max(1, _PIECE_VALUES // (inner * raw.shape[-1]))
    for first in range(0, raw.shape[0], step):
        last = min(first + step, raw.shape[0])
        yield raw.take_rows(slice(first * inner, last * inner)), out[first:last]


def _send(raw: RawTensor, device: torch.device) -> torch.Tensor:
    """`raw` on `device`, as it is stored or, if that is in blocks or packed, as float32. Does not wait for the copy:
    torch's allocator keeps the pinned memory until it is done."""
    dtype = None if isinstance(raw, PackedTensor) else _STORED.get(raw.qtype)
    values = np.ascontiguousarray(raw.data if dtype is not None else dequantize(raw)).reshape(-1).view(np.uint8)
    staged = torch.empty(values.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.copyto(staged.numpy(), values)
    return staged.to(device, non_blocking=True).view(dtype or torch.float32).view(raw.shape)
