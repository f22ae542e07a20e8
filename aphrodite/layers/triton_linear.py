"""A dense linear layer on a GPU: one fused kernel for few rows, the vendor's library and small kernels for many.

Up to about 64 rows the time goes to reading the weight, and the kernels of `kernels/triton/linear.py` and `dense_wgmma`
read it faster than the library does, the operations around the product included. Above, it goes to arithmetic, where
the library wins for most shapes, except that a gated product of many rows is too much to write and read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.activation import Activation, gated_pairs
from aphrodite.kernels.triton.dense_cuts import DenseConfig, dense_cut, dense_supports
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.gated_gemm import gated_gemm, gated_gemm_pays, gated_gemm_supports
from aphrodite.kernels.triton.linear import choose_kernel, gemv, skinny_gemm
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
    out = product(_normed(x, norm))
    if activation is not None:
        out = gated_pairs(out, activation)
    return out if residual is None else residual.add_(out)


def _normed(x: torch.Tensor, norm: RmsNorm | None) -> torch.Tensor:
    return x if norm is None else rms_norm(x, norm.weight, norm.eps)


def _dense_wgmma(x: torch.Tensor, weight: torch.Tensor, cut: DenseConfig, epilogue: Epilogue) -> torch.Tensor:
    from aphrodite.kernels.triton.dense_wgmma import dense_wgmma  # Gluon is not in every Triton

    return dense_wgmma(x, weight, cut, epilogue)


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

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

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
        return self._multiplied(x, norm, activation, residual)

    def unactivated(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """See `GpuLinear`."""
        return self._multiplied(x, None, None, None), 1

    def _multiplied(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None,
        activation: Activation | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        kernel = choose_kernel(*self.weight.shape, x.shape[0], self.weight.itemsize, gated=self.gated)
        epilogue = Epilogue(self.bias, activation, residual)
        if kernel == "gemv":
            return gemv(x, self.weight, epilogue, norm)
        x = _normed(x, norm)
        cut = dense_cut(*self.weight.shape, x.shape[0])
        if cut is not None and dense_supports(x, self.weight):
            return _dense_wgmma(x, self.weight, cut, epilogue)
        if kernel == "skinny":
            return skinny_gemm(x, self.weight, epilogue)
        if activation is not None and self._fuses_gate(x, residual):
            return gated_gemm(x, self.weight, activation)
        return self.by_library(x, None, activation, residual)

    def _fuses_gate(self, x: torch.Tensor, residual: torch.Tensor | None) -> bool:
        alone = self.bias is None and residual is None
        return alone and gated_gemm_pays(x.shape[0], *self.weight.shape) and gated_gemm_supports(x, self.weight)

    def by_library(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None,
        activation: Activation | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same as a call, whatever the number of rows, without our products."""
        if residual is None or self.bias is not None:
            return unfused_pairs(self._product, x, norm, activation, residual)
        return residual.addmm_(_normed(x, norm), self.weight.t())

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)
