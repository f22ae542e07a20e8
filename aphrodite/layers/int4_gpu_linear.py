"""A linear layer with 4-bit weights in groups on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aphrodite.kernels.dispatch import Choice, Declined
from aphrodite.kernels.triton.activation import Activation
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.half_rows import HalfRows
from aphrodite.kernels.triton.int4_linear import (
    by_library,
    choose_int4_kernel,
    gluon_reason,
    hand_on,
    int4_linear,
    is_half_product,
    of_handed_on,
)
from aphrodite.kernels.triton.int4_words import STRIP, pack_int4, unsupported_group
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.layers.packed_linear import shared_scratch
from aphrodite.layers.triton_linear import interleave_gate_up
from aphrodite.quantization.layouts import Int4Groups

if TYPE_CHECKING:
    from aphrodite.layers.linear import RmsNorm


PAIR_ROWS = STRIP // 2  # of a gated weight's strip: as many gates, then as many ups


def decline_int4_gpu(weight: Int4Groups, dtype: torch.dtype) -> Declined | None:
    """Why `weight` cannot be an Int4GpuLinear of the compute dtype; None if it can."""
    if dtype == torch.float32:
        return Declined("activations of float32 want a weight of float32")
    reason = gluon_reason(weight.codes.device) or unsupported_group(weight.group_size, weight.shape[1])
    if reason is not None:
        return Declined(reason)
    if weight.shape[1] % 8:
        return Declined(f"needs a multiple of 8 inputs, not {weight.shape[1]}")
    return Declined("zeros that are no integers") if weight.zeros.dtype.is_floating_point else None


class Int4GpuLinear:
    """A weight of 4-bit codes, multiplied with 16-bit activations."""

    def __init__(
        self,
        weight: Int4Groups,
        bias: torch.Tensor | None,
        choice: Choice,
        *,
        dtype: torch.dtype,
        gated: bool = False,
    ) -> None:
        """
        Args:
            weight: on the GPU; `decline_int4_gpu` has been asked. It is not kept.
            bias: `[out]`.
            dtype: of inputs and outputs.
            gated: the rows of weight and bias are gate, then up.
        """
        self.weight = pack_int4(weight.codes, weight.scales, weight.zeros, weight.group_size, paired=gated)
        self.bias = interleave_gate_up(bias) if gated and bias is not None else bias
        self.permutation = weight.permutation
        self.gated = gated
        # Layers of one name may be computed in each other's tensors, but not by another kernel.
        self.choice = choice if self.weight.fits_half else choice._replace(name=f"{choice.name}, scales beyond float16")
        # Made now, for graphs keep its address and the memory plan has to see it.
        self.scratch = shared_scratch(weight.codes.device, dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        others = tuple(tensor for tensor in (self.bias, self.permutation) if tensor is not None)
        return (*self.weight.tensors, *others)

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
            raise ValueError("an activation goes with a gated weight, whose rows are paired, and with no other")
        return self._multiplied(x, norm, activation, residual)

    def unactivated(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """See `GpuLinear`."""
        whole = self.weight.out_features % (2 * PAIR_ROWS) == 0
        kernel = choose_int4_kernel(x.shape[0], x.device, self.weight.fits_half)
        if kernel != "library" and whole and self.bias is None:
            return self._multiplied(x, None, None, None), PAIR_ROWS  # as rows lie in a strip
        x = x if self.permutation is None else x.index_select(1, self.permutation)
        return by_library(x, self.weight, self.scratch, Epilogue(self.bias, None, None)), 1

    def hands_on(self, x: torch.Tensor) -> bool:
        """Whether a product of as many rows as `x` has would have its operands in float16."""
        return is_half_product(x, self.weight)

    def hand_on(self, x: torch.Tensor, norm: RmsNorm | None, activation: Activation) -> HalfRows:
        """act(norm(x) W^T + b) for `of_handed_on` of the next layer."""
        x, before = self._ordered(x, norm)
        return hand_on(x, self.weight, Epilogue(self.bias, activation, None), before)

    def of_handed_on(self, x: HalfRows, residual: torch.Tensor) -> torch.Tensor:
        """x W^T + b + residual, which takes residual's place."""
        if self.permutation is not None:
            x = x._replace(values=x.values.index_select(1, self.permutation))
        return of_handed_on(x, self.weight, self.bias, residual)

    def _multiplied(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None,
        activation: Activation | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        x, before = self._ordered(x, norm)
        return int4_linear(x, self.weight, self.scratch, Epilogue(self.bias, activation, residual), before)

    def _ordered(self, x: torch.Tensor, norm: RmsNorm | None) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
        """`x` in the order of the weight's columns, and the norm where it is still to be applied."""
        before = None if norm is None else (norm.weight, norm.eps)
        if self.permutation is None:
            return x, before
        x = x if before is None else rms_norm(x, *before)
        return x.index_select(1, self.permutation), None
