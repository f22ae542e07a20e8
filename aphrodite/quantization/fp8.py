"""Weights in fp8 (e4m3) with a scale for each output channel, quantized at load.

A row is scaled so that its largest magnitude is the format's largest value; what is lost is the rounding to four
significant bits, about 2.6 % of each weight (root mean square 2.2 % of a normal distribution's spread).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aphrodite.kernels.dispatch import Declined

_MULTIPLE = 16  # of both sides of a matrix, which the library's fp8 products want
_PIECE_ROWS = 4096  # quantized at a time, which bounds the float32 copy


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix `[out, in]`: `values` times `scale`, row by row."""

    values: torch.Tensor  # [out, in] of an e4m3 type
    scale: torch.Tensor  # [out] float32


def decline_fp8(weight: torch.Tensor, fp8_dtype: torch.dtype | None) -> Declined | None:
    """Why `weight` `[out, in]` cannot be multiplied in fp8; None if it can.

    Args:
        fp8_dtype: the type that the device multiplies (`Platform.fp8_dtype`), None for none.
    """
    if fp8_dtype is None:
        return Declined("this device has no fp8 products with a scale a row")
    if weight.dtype != torch.bfloat16:
        return Declined(f"fp8 products give bfloat16, not {weight.dtype}")
    if any(size % _MULTIPLE for size in weight.shape):
        return Declined(f"needs multiples of {_MULTIPLE}, not {list(weight.shape)}")
    return None


def quantize_fp8(weight: torch.Tensor, fp8_dtype: torch.dtype) -> Fp8Weight:
    """`weight` `[out, in]` in fp8, to nearest, on its device."""
    largest = torch.finfo(fp8_dtype).max
    values = torch.empty(weight.shape, dtype=fp8_dtype, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for first in range(0, weight.shape[0], _PIECE_ROWS):
        rows = slice(first, first + _PIECE_ROWS)
        exact = weight[rows].float()
        peak = exact.abs().amax(dim=1)
        scale[rows] = torch.where(peak > 0, peak, largest).div_(largest)
        values[rows] = exact.div_(scale[rows, None]).clamp_(-largest, largest).to(fp8_dtype)
    return Fp8Weight(values, scale)
