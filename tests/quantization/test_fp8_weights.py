"""fp8 weights: what they stand for, and what is declined."""

from __future__ import annotations

import pytest
import torch

from aphrodite.kernels.dispatch import Declined
from aphrodite.quantization.fp8 import decline_fp8, quantize_fp8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_quantized_weights_are_the_nearest_values(dtype: torch.dtype) -> None:
    spread = torch.logspace(-4, 2, 5000, dtype=torch.float64)[:, None]
    weight = (torch.randn(5000, 48, generator=torch.Generator().manual_seed(0)) * spread).bfloat16()
    weight[7] = 0.0
    quantized = quantize_fp8(weight, dtype)
    assert (quantized.values.dtype, quantized.scale.shape) == (dtype, (5000,))
    largest = torch.finfo(dtype).max
    peak = weight.double().abs().amax(1)
    some = peak > 0
    torch.testing.assert_close(quantized.scale[some].double(), peak[some] / largest, rtol=1e-6, atol=0)
    restored = quantized.values.double() * quantized.scale.double()[:, None]
    error = (restored - weight.double()).abs()
    least = quantized.scale.double()[:, None] * torch.finfo(dtype).smallest_normal
    assert bool((error <= weight.double().abs() * 2.0**-4 + least * 2.0**-4).all())
    assert torch.equal(restored[7], torch.zeros(48, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "dtype", "fp8", "reason"),
    [
        ((32, 32), torch.bfloat16, None, "no fp8"),
        ((32, 32), torch.float16, torch.float8_e4m3fn, "float16"),
        ((24, 32), torch.bfloat16, torch.float8_e4m3fn, "24, 32"),
    ],
)
def test_what_cannot_be_multiplied_is_declined(
    shape: tuple[int, int], dtype: torch.dtype, fp8: torch.dtype | None, reason: str
) -> None:
    declined = decline_fp8(torch.zeros(shape, dtype=dtype), fp8)
    assert isinstance(declined, Declined)
    assert reason in declined.reason
    assert decline_fp8(torch.zeros(32, 32, dtype=torch.bfloat16), torch.float8_e4m3fn) is None
