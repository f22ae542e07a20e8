"""Which kernel multiplies a 4-bit weight, by the number of activation rows: act(norm(x) W^T + b) + residual."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from aphrodite.kernels.triton.activation import Activation, gated_pairs
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.gated_gemm import gated_gemm, gated_gemm_supports
from aphrodite.kernels.triton.half_rows import HalfRows, half_rows
from aphrodite.kernels.triton.int4_expand import expand_int4
from aphrodite.kernels.triton.int4_words import STRIP, Int4Words
from aphrodite.kernels.triton.launch import gluon_version_reason
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.platforms import platform_of

Kernel = Literal["mma", "wgmma", "half", "library"]
MMA_MAX_ROWS = 8
WGMMA_MAX_ROWS = 64  # but for weights whose scales float16 cannot hold
HALF_MAX_ROWS = 1024
# Rows from which the fused gated product is faster than the library's and the activation's own kernel.
GATED_GEMM_ROWS = 1024

# What results are divided by that stay in float16 for the next product: no activation reaches a million, and of those
# above a thousandth no digit is lost.
HANDED_ON = 16.0

Norm = tuple[torch.Tensor, float]


def choose_int4_kernel(rows: int, device: torch.device, fits_half: bool) -> Kernel:
    """The fastest kernel for 16-bit activations `[rows, in]`, as measured on an H100."""
    if not 0 < rows <= HALF_MAX_ROWS or gluon_reason(device) is not None:
        return "library"
    if rows <= MMA_MAX_ROWS:
        return "mma"
    return "wgmma" if rows <= WGMMA_MAX_ROWS or not fits_half else "half"


@functools.cache
def gluon_reason(device: torch.device) -> str | None:
    """Why Gluon kernels do not run on `device`; None if they do."""
    if (reason := gluon_version_reason()) is not None:
        return reason
    if device.type != "cuda" or platform_of(device).kind != "cuda" or platform_of(device).capability[0] != 9:
        return "they are written for compute capability 9.0"
    return None


def int4_linear(
    x: torch.Tensor, weight: Int4Words, scratch: torch.Tensor, epilogue: Epilogue = Epilogue(), norm: Norm | None = None
) -> torch.Tensor:
    """act(norm(x) W^T + b) + residual.

    Args:
        x: `[T, in]` bfloat16 or float16, rows may be strided; `in` is a multiple of 8.
        weight: (gate, up) pairs when there is an activation. It is read before the kernels of the same stream have
            ended, so none of them may write it (copies may).
        scratch: `[n]` of x's dtype, 16 rows of the weight or more, for what the library multiplies.
        norm: RMSNorm of x: weight `[in]` and epsilon.

    Returns:
        `[T, out]`, or `[T, out / 2]` with an activation, of x's dtype; `residual` itself where one is given.
    """
    kernel = choose_int4_kernel(x.shape[0], x.device, weight.fits_half)
    if kernel == "half":
        return _gluon_half(x, weight, epilogue, norm)
    if x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # what fetches it moves 16 bytes
    if kernel == "mma" and x.shape[0] == 1:
        return _gluon_mma(x, weight, epilogue, norm)
    x = x if norm is None else rms_norm(x, *norm)
    if kernel == "mma":
        return _gluon_mma(x, weight, epilogue, None)
    if kernel == "wgmma":
        return _gluon_wgmma(x, weight, epilogue)
    return by_library(x, weight, scratch, epilogue)


def _gluon_mma(x: torch.Tensor, weight: Int4Words, epilogue: Epilogue, norm: Norm | None) -> torch.Tensor:
    from aphrodite.kernels.triton.int4_mma import int4_mma  # Gluon is not in every Triton

    return int4_mma(x, weight, epilogue, norm)


def _gluon_wgmma(x: torch.Tensor, weight: Int4Words, epilogue: Epilogue) -> torch.Tensor:
    from aphrodite.kernels.triton.int4_wgmma import int4_wgmma

    return int4_wgmma(x, weight, epilogue)


def _gluon_half(x: torch.Tensor, weight: Int4Words, epilogue: Epilogue, norm: Norm | None) -> torch.Tensor:
    from aphrodite.kernels.triton.int4_half import int4_half

    return int4_half(half_rows(x, norm), weight, x.dtype, epilogue)


def is_half_product(x: torch.Tensor, weight: Int4Words) -> bool:
    """Whether `int4_linear` of `x` has operands in float16 though `x` is not."""
    return x.dtype == torch.bfloat16 and choose_int4_kernel(x.shape[0], x.device, weight.fits_half) == "half"


def hand_on(x: torch.Tensor, weight: Int4Words, epilogue: Epilogue, norm: Norm | None) -> HalfRows:
    """act(norm(x) W^T + b) for another such product; `is_half_product` has been asked."""
    from aphrodite.kernels.triton.int4_half import int4_half

    values = int4_half(half_rows(x, norm), weight, torch.float16, epilogue, None, HANDED_ON)
    return HalfRows(values, _scales_of_handed_on(x.device)[: x.shape[0]])


@functools.cache
def _scales_of_handed_on(device: torch.device) -> torch.Tensor:
    """Made once: filling them would stand between kernels that start before others end."""
    return torch.full((HALF_MAX_ROWS,), HANDED_ON, dtype=torch.float32, device=device)


def of_handed_on(x: HalfRows, weight: Int4Words, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """x W^T + b + residual, which takes residual's place."""
    from aphrodite.kernels.triton.int4_half import int4_half

    return int4_half(x, weight, residual.dtype, Epilogue(bias, None, residual))


def by_library(
    x: torch.Tensor, weight: Int4Words, scratch: torch.Tensor, epilogue: Epilogue = Epilogue()
) -> torch.Tensor:
    """act(x W^T + b) + residual by the vendor's library, over rows expanded into `scratch` piece by piece."""
    bias, activation, residual = epilogue
    strips = weight.words.shape[0]
    taken = min(scratch.numel() // (STRIP * weight.in_features), strips)
    scratch = scratch[: taken * STRIP * weight.in_features].view(taken * STRIP, weight.in_features)
    if activation is not None:
        gated = _gated_by_library(x, weight, scratch, bias, activation)
        return gated if residual is None else residual.add_(gated)
    out = residual
    if out is None:
        out = torch.empty((x.shape[0], weight.out_features), dtype=x.dtype, device=x.device)
    for start in range(0, strips, taken):
        part = _strips_of(weight, start, start + taken)
        dense = expand_int4(part, scratch[: part.out_features])
        columns = out[:, start * STRIP : start * STRIP + part.out_features]
        if residual is not None:
            columns.addmm_(x, dense.t())
        else:
            torch.mm(x, dense.t(), out=columns)
    return out if bias is None else out.add_(bias)


def _gated_by_library(
    x: torch.Tensor, weight: Int4Words, scratch: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """act(gate) * up; of the pairs no more are in memory than of one piece, `scratch` `[rows, in]`."""
    strips, taken = weight.words.shape[0], scratch.shape[0] // STRIP
    if taken == strips:
        return _gated_piece(x, weight, scratch, bias, activation)
    out = torch.empty((x.shape[0], weight.out_features // 2), dtype=x.dtype, device=x.device)
    for start in range(0, strips, taken):
        part = _strips_of(weight, start, start + taken)
        first, end = start * STRIP, start * STRIP + part.out_features
        own = None if bias is None else bias[first:end]
        out[:, first // 2 : end // 2] = _gated_piece(x, part, scratch, own, activation)
    return out


def _gated_piece(
    x: torch.Tensor, weight: Int4Words, scratch: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    dense = expand_int4(weight, scratch[: weight.out_features])
    if bias is None and x.shape[0] >= GATED_GEMM_ROWS and gated_gemm_supports(x, dense):
        return gated_gemm(x, dense, activation)
    pairs = torch.mm(x, dense.t())
    return gated_pairs(pairs if bias is None else pairs.add_(bias), activation)


def _strips_of(weight: Int4Words, start: int, end: int) -> Int4Words:
    """The rows of strips `start` to `end`."""
    left = weight.out_features - start * STRIP
    return weight._replace(
        words=weight.words[start:end],
        scales=weight.scales[start:end],
        out_features=min(left, (end - start) * STRIP),
    )
