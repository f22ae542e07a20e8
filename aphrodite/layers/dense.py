"""Checkpoint tensors as dense tensors of the compute dtype, converted piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from aphrodite.errors import ModelFormatError
from aphrodite.kernels.dispatch import log_once
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor

_PIECE_VALUES = 4 * 1024 * 1024  # float32 values in flight; bounds what conversion needs above its result


def to_dense(raw: RawTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`raw` dequantized, `[*raw.shape]` of `dtype` on `device`."""
    return stack_dense([raw], dtype, device)


def stack_dense(parts: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Tensors that agree in all but their first dimension, dequantized and stacked along it.

    Raises:
        ModelFormatError: a value does not fit float16.
    """
    _warn_of_loss(parts, dtype)
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


def _warn_of_loss(parts: Sequence[RawTensor], dtype: torch.dtype) -> None:
    kept = {torch.bfloat16: QuantType.BF16, torch.float16: QuantType.F16}.get(dtype)
    if dtype == torch.float32:
        return
    for part in parts:
        if part.qtype is not kept:
            log_once(
                logging.WARNING, f"{part.qtype.name} weights: rounded to {short_name(dtype)}; --dtype float32 is exact"
            )


def _convert(raw: RawTensor, out: torch.Tensor) -> None:
    if len(raw.shape) == 1:
        _store(raw, out)
        return
    step = max(1, _PIECE_VALUES // raw.shape[1])
    for first in range(0, raw.shape[0], step):
        data = raw.data[first : first + step]
        _store(RawTensor(raw.name, (data.shape[0], raw.shape[1]), raw.qtype, data), out[first : first + step])


def _store(raw: RawTensor, out: torch.Tensor) -> None:
    out.copy_(torch.from_numpy(dequantize(raw)))
    if out.dtype == torch.float16 and not bool(torch.isfinite(out).all()):
        raise ModelFormatError(
            f"tensor {raw.name} has values outside the range of float16; use --dtype bfloat16 or float32"
        )
