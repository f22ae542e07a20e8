"""Linear layers over the canonical weight layouts, and the choice between them.

Several projections of the same input are one Linear whose rows are stacked at load (q, k, v; gate, up).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from aphrodite import platforms
from aphrodite.kernels.dispatch import Choice, Declined, choose, log_once
from aphrodite.layers.activation import Activation, gated_activation
from aphrodite.layers.dense import short_name, stack_dense, to_dense
from aphrodite.layers.invariant import decline_invariant, invariant_matmul
from aphrodite.layers.norm import RmsNorm as RmsNorm
from aphrodite.quantization.fp8 import decline_fp8
from aphrodite.quantization.layouts import Int4Groups, PackedLayout, stack_layouts
from aphrodite.quantization.linear_int4 import Int4Weight, decline_int4, matmul_int4, pack_int4
from aphrodite.quantization.planes import decline_planes
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import RawTensor

if TYPE_CHECKING:
    from aphrodite.layers.fp8_linear import Fp8Linear
    from aphrodite.layers.int4_gpu_linear import Int4GpuLinear
    from aphrodite.layers.packed_linear import PackedLinear
    from aphrodite.layers.triton_linear import TritonLinear


class Linear(Protocol):
    """A product with a weight, and what stands before and behind it, so that a kernel may do all at once."""

    choice: Choice

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that was loaded, in an order that is the same for every Linear of one layout and shape."""

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) W^T + b) + residual, all of the compute dtype.

        Args:
            x: `[T, in]`.
            norm: applied to `x` first.
            activation: the weight is (gate, up) and the result is act(gate) * up.
            residual: `[T, out]`, added last; its memory may become the result's.

        Returns:
            `[T, out]`, or `[T, out / 2]` with an activation.
        """


def unfused(
    product: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    norm: RmsNorm | None,
    activation: Activation | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`Linear.__call__`, one operation after the other; `product` is x W^T + b."""
    out = product(x if norm is None else norm(x))
    if activation is not None:
        out = gated_activation(out, activation)
    return out if residual is None else residual + out


class DenseLinear:
    """A weight of the compute dtype, multiplied by the vendor's library: batch-invariantly where that can be had."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]
        self.choice = choice
        self.invariant = decline_invariant(weight.dtype, weight.device) is None

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
        return unfused(self._product, x, norm, activation, residual)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not self.invariant:
            return F.linear(x, self.weight, self.bias)
        out = invariant_matmul(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


class Int4Linear:
    """A packed 4-bit weight, multiplied by torch's CPU kernel."""

    def __init__(self, weight: Int4Weight, bias: torch.Tensor | None, choice: Choice) -> None:
        self.weight = weight
        self.bias = bias
        self.choice = choice

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        others = tuple(tensor for tensor in (self.weight.permutation, self.bias) if tensor is not None)
        return (self.weight.packed, self.weight.scales_and_zeros, *others)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return unfused(self._product, x, norm, activation, residual)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        out = matmul_int4(x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


def build_linear(
    parts: Sequence[RawTensor],
    biases: Sequence[RawTensor | None],
    dtype: torch.dtype,
    device: torch.device,
    *,
    gated: bool = False,
    fp8: bool = False,
) -> Linear:
    """A Linear of the stacked `parts` in the first layout that takes them.

    Q8_0 is held dense: torch's 8-bit kernel has one scale per row where the file has one per 32 values,
    which costs more precision than bfloat16 does.

    Args:
        parts: matrices `[out_i, in]`.
        biases: one per part, `[out_i]`; None counts as zeros.
        dtype: of inputs, outputs and dense weights.
        device: where it computes.
        gated: the parts are (gate, up), and it will be called with an activation.
        fp8: quantize dense weights of a GPU to fp8.
    """
    bias = _stack_biases(parts, biases, dtype, device)

    def int4() -> Int4Weight | Declined:
        return decline_int4(parts, dtype, device) or pack_int4(parts)

    def packed() -> list[PackedLayout] | Declined:
        return packed_layouts(parts, device)

    def dense() -> torch.Tensor:
        return stack_dense(parts, dtype, device)

    types = "/".join(sorted({part.type_name for part in parts}))
    candidates: list[tuple[str, Callable[[], torch.Tensor | Int4Weight | list[PackedLayout] | Declined]]]
    candidates = [("packed 4-bit", int4), (f"packed {types}", packed), (f"dense {short_name(dtype)}", dense)]
    chosen: tuple[torch.Tensor | Int4Weight | list[PackedLayout], Choice]
    chosen = choose(f"linear layers of {types}", candidates)
    weight, choice = chosen
    if isinstance(weight, Int4Weight):
        log_once(logging.WARNING, f"{types} weights: scales rounded to bfloat16; --dtype float32 is exact")
        return Int4Linear(weight, bias, choice)
    if isinstance(weight, list):
        return packed_linear(weight, bias, choice, dtype, gated=gated)
    return dense_linear(weight, bias, choice, gated=gated, fp8=fp8)


def packed_layouts(parts: Sequence[RawTensor], device: torch.device) -> list[PackedLayout] | Declined:
    """`parts` stacked in layouts that a GPU multiplies, or why that cannot be."""
    if device.type == "cpu":
        return Declined("only for GPUs")
    for part in parts:
        declined = decline_layout(part)
        if declined is not None:
            return declined
    layouts = stack_layouts([layout_of(part, device) for part in parts])
    for layout in layouts:
        declined = decline_planes(layout)
        if declined is not None:
            return declined
    return layouts


def packed_linear(
    layouts: Sequence[PackedLayout], bias: torch.Tensor | None, choice: Choice, dtype: torch.dtype, *, gated: bool
) -> PackedLinear | Int4GpuLinear:
    """A Linear over matrices that are stacked along their rows, on a GPU, kept as they are."""
    # Triton is there only where a GPU is.
    from aphrodite.layers.int4_gpu_linear import Int4GpuLinear, decline_int4_gpu
    from aphrodite.layers.packed_linear import PackedLinear

    if len(layouts) > 1 or not isinstance(layouts[0], Int4Groups):
        return PackedLinear(layouts, bias, choice, dtype=dtype, gated=gated)
    declined = decline_int4_gpu(layouts[0], dtype)
    if declined is None:
        return Int4GpuLinear(layouts[0], bias, Choice("packed 4-bit", choice.reasons), dtype=dtype, gated=gated)
    log_once(logging.INFO, f"4-bit weights are multiplied by the general kernels of packed layouts: {declined.reason}")
    choice = Choice(choice.name, (*choice.reasons, f"packed 4-bit: {declined.reason}"))
    return PackedLinear(layouts, bias, choice, dtype=dtype, gated=gated)


def dense_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice, *, gated: bool = False, fp8: bool = False
) -> DenseLinear | TritonLinear | Fp8Linear:
    """A Linear over `weight` `[out, in]` for the device that it lies on.

    Args:
        gated: the weight is (gate, up); its rows may be reordered then.
        fp8: quantize the weight of a GPU to fp8.
    """
    if weight.device.type == "cpu":
        return DenseLinear(weight, bias, choice)
    from aphrodite.layers.fp8_linear import Fp8Linear  # Triton is there only where a GPU is
    from aphrodite.layers.triton_linear import TritonLinear

    if not fp8:
        return TritonLinear(weight, bias, choice, gated=gated)
    fp8_dtype = platforms.platform_of(weight.device).fp8_dtype
    declined = decline_fp8(weight, fp8_dtype)
    if declined is None and fp8_dtype is not None:
        return Fp8Linear(weight, bias, Choice("fp8", choice.reasons), fp8_dtype=fp8_dtype, gated=gated)
    reason = "" if declined is None else declined.reason
    log_once(logging.WARNING, f"a weight stays {short_name(weight.dtype)} instead of fp8: {reason}")
    return TritonLinear(weight, bias, Choice(choice.name, (*choice.reasons, f"fp8: {reason}")), gated=gated)


def _stack_biases(
    parts: Sequence[RawTensor], biases: Sequence[RawTensor | None], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            torch.zeros(part.shape[0], dtype=dtype, device=device) if bias is None else to_dense(bias, dtype, device)
            for part, bias in zip(parts, biases, strict=True)
        ]
    )
