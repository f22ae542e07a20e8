"""Root-mean-square normalisation (arXiv 1910.07467), alone or after adding to the residual stream.

Bound by memory: a row is read and written once, `4 * hidden` bytes in a 16-bit dtype (`8 * hidden` with the addition),
and stays in registers between the sum of squares and the scaling. Arithmetic is float32 for every dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)


@triton.jit
def normed(values, weight, eps, features: tl.constexpr):
    """A row of float32 `values`, 0 beyond `features`, divided by its root mean square and scaled."""
    mean_square = tl.sum(values * values, axis=0) / features
    return values * (1.0 / tl.sqrt(mean_square + eps)) * weight


@triton.jit
def load_row(x, columns, inside, norm_weight, eps, features: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr):
    """A row that a kernel before this one writes, in float32, normed if there is a norm; 0 where not `inside`."""
    if HAS_NORM:
        weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_producer(PDL)
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        values = normed(values, weight, eps, features)
    return values


@direct_launch
@triton.jit
def _rms_norm_kernel(
    x,  # [T, hidden]
    x_stride,
    residual,  # [T, hidden], or anything when not ADD
    residual_stride,
    weight,  # [hidden]
    out,  # [T, hidden], contiguous
    eps,
    hidden: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= hidden
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_producer(PDL)
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        into = residual + row * residual_stride + columns
        summed = (values + tl.load(into, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(into, summed, mask=inside)
        # Normalise what later layers will read, not the unrounded sum.
        values = summed.to(tl.float32)
    tl.store(out + row * hidden + columns, normed(values, scale, eps, hidden).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: `[T, hidden]`, rows may be strided.
        weight: `[hidden]`.

    Returns:
        `[T, hidden]` of x's dtype.
    """
    return _launch(x, None, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm(x + residual)`; the sum replaces `residual`.

    Args:
        x: `[T, hidden]`, rows may be strided.
        residual: `[T, hidden]` of the same dtype, overwritten by the sum.
        weight: `[hidden]`.

    Returns:
        `[T, hidden]` of x's dtype.
    """
    return _launch(x, residual, weight, eps)


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, hidden = x.shape
    out = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    block = next_power_of_2(hidden)
    added = x if residual is None else residual
    pdl = pdl_supported(x.device)
    _rms_norm_kernel[(rows,)](
        x,
        x.stride(0),
        added,
        added.stride(0),
        weight,
        out,
        eps,
        hidden=hidden,
        BLOCK=block,
        ADD=residual is not None,
        PDL=pdl,
        num_warps=norm_warps(block),
        **launch_options(pdl),
    )
    return out


def norm_warps(block: int) -> int:
    """Warps for a row of `block` values: about 16 values a thread, so that a row's loads are all in flight at once."""
    return min(max(block // 512, 1), 16)
