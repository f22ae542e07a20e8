"""A dense linear layer on a GPU: one fused kernel for few rows, the vendor's library and small kernels for many.

Up to about 64 rows the time goes to reading the weight, and the kernels of `kernels/triton/linear.py` read it faster
than the library does, the operations around the product included. Above, it goes to arithmetic, where the library wins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.activation import Activation, gated_pairs
from aphrodite.kernels.triton.linear import GEMV_MAX_ROWS, SKINNY_MAX_ROWS, Epilogue, gemv, skinny_gemm
from aphrodite.kernels.triton.norm import rms_norm

if TYPE_CHECKING:
    from aphrodite.layers.linear import RmsNorm


def interleave_gate_up(stacked: torch.Tensor) -> torch.Tensor:
    """(gate, up) stacked along the first dimension, `[2 * n, ...]`, as pairs: g0, u0, g1, u1, ..."""
    gate, up = stacked.chunk(2, dim=0)
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def unfused_pairs(
    product: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    norm: RmsNorm | None,
    activation: Activation | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`Linear.__call__` by a kernel for each part, for layouts that have no fused one.

    Args:
        product: `[T, in]` -> `[T, out]`, x W^T + b, its columns (gate, up) pairs when there is an activation.
    """
    out = product(x if norm is None else rms_norm(x, norm.weight, norm.eps))
    if activation is not None:
        out = gated_pairs(out, activation)
    return out if residual is None else residual.add_(out)


class TritonLinear:
    """A weight of the compute dtype: bf16, fp16, or fp32 with exact products."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice, *, gated: bool = False) -> None:
        """
        Args:
            weight: `[out, in]`.
            bias: `[out]`.
            gated: the rows of weight and bias are gate, then up; they are kept as interleaved copies.
        """
        self.weight = interleave_gate_up(weight) if gated else weight.contiguous()
        self.bias = interleave_gate_up(bias) if gated and bias is not None else bias
        self.gated = gated
        self.choice = choice
        # Matrix units would round float32 operands to tf32.
        self.skinny_rows = GEMV_MAX_ROWS if weight.dtype == torch.float32 else SKINNY_MAX_ROWS

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) W^T + b) + residual; the result takes residual's place, which must not overlap x."""
        if (activation is not None) != self.gated:
            raise ValueError("an activation goes with a gated weight, whose rows are interleaved, and with no other")
        rows = x.shape[0]
        if not 0 < rows <= self.skinny_rows:
            return self._by_library(x, norm, activation, residual)
        epilogue = Epilogue(self.bias, activation, residual)
        if rows <= GEMV_MAX_ROWS:
            return gemv(x, self.weight, epilogue, norm)
        normed = x if norm is None else rms_norm(x, norm.weight, norm.eps)
        return skinny_gemm(normed, self.weight, epilogue)

    def _by_library(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None,
        activation: Activation | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        if residual is None or self.bias is not None:
            return unfused_pairs(self._product, x, norm, activation, residual)
        normed = x if norm is None else rms_norm(x, norm.weight, norm.eps)
        return residual.addmm_(normed, self.weight.t())

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)
