"""A linear layer with fp8 weights on a GPU.

For a few rows the time goes to reading the weight, half the bytes of bf16, and one fused kernel multiplies bf16
activations. For more, activations are quantized row by row and the library multiplies at twice bf16's rate. Scales
belong to rows of both operands, so they are applied to the float32 sums and cost no precision.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.activation import Activation, gated_pairs
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.linear import GEMV_MAX_ROWS, gemv
from aphrodite.kernels.triton.quantize import quantize_rows
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import interleave_gate_up
from aphrodite.quantization.fp8 import quantize_fp8


class Fp8Linear:
    """A bf16 layer whose weight is kept and multiplied in fp8."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        choice: Choice,
        *,
        fp8_dtype: torch.dtype,
        gated: bool = False,
    ) -> None:
        """
        Args:
            weight: `[out, in]` bfloat16, both multiples of 16; not kept.
            bias: `[out]` bfloat16.
            fp8_dtype: the e4m3 type that the device multiplies.
            gated: the rows of weight and bias are gate, then up; they are kept interleaved.
        """
        self.weight = quantize_fp8(interleave_gate_up(weight) if gated else weight, fp8_dtype)
        self.bias = interleave_gate_up(bias) if gated and bias is not None else bias
        self.gated = gated
        self.choice = choice

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        quantized = (self.weight.values, self.weight.scale)
        return quantized if self.bias is None else (*quantized, self.bias)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) W^T + b) + residual of bfloat16 `x` `[T, in]`; the result takes residual's place."""
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
        if 0 < x.shape[0] <= GEMV_MAX_ROWS:
            epilogue = Epilogue(self.bias, activation, residual)
            return gemv(x, self.weight.values, epilogue, norm, weight_scale=self.weight.scale)
        values, scales = quantize_rows(x, self.weight.values.dtype, norm)
        out = torch._scaled_mm(
            values,
            self.weight.values.t(),
            scale_a=scales,
            scale_b=self.weight.scale[None],
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if activation is not None:
            out = gated_pairs(out, activation)
        return out if residual is None else residual.add_(out)
