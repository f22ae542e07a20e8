"""Quantized activations and fp8 layers against float64, under Triton's interpreter.

The interpreter rounds to fp8 wrongly (127.8 becomes 64), so activations here are such that nothing has to be rounded;
tests/gpu/test_gpu_fp8.py has the others.
"""

from __future__ import annotations

import pytest
import torch

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.quantize import quantize_rows
from aphrodite.layers.fp8_linear import Fp8Linear
from aphrodite.layers.linear import RmsNorm

FP8 = torch.float8_e4m3fn


def representable(rows: int, columns: int) -> torch.Tensor:
    """Random bfloat16 rows whose values are fp8's once scaled by a power of two."""
    values = (torch.randn(rows, columns) * 60).to(FP8).float()
    values[:, 0] = 448.0
    return (values * torch.tensor([2.0**-9, 1.0, 2.0**5] * rows)[:rows, None]).bfloat16()


def test_quantized_rows_stand_for_the_rows() -> None:
    x = torch.cat((representable(3, 96), torch.full((3, 40), 1e9)), dim=1)[:, :96]
    values, scales = quantize_rows(x, FP8)
    assert (values.dtype, values.shape, scales.dtype) == (FP8, (3, 96), torch.float32)
    assert torch.equal(scales, torch.tensor([[2.0**-9], [1.0], [2.0**5]]))
    assert torch.equal(values.float() * scales, x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_are_those_of_the_normed_rows(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 96).to(dtype), torch.rand(96).add_(0.5).to(dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    scales = quantize_rows(x, FP8, (weight, 1e-5)).scales
    torch.testing.assert_close(scales.double(), expected.abs().amax(1, keepdim=True) / 448, rtol=1e-5, atol=0)


def test_rows_of_zeros_and_no_rows() -> None:
    values, scales = quantize_rows(torch.zeros(2, 32), FP8)
    assert torch.equal(values.float(), torch.zeros(2, 32))
    assert bool(torch.isfinite(scales).all())
    assert quantize_rows(torch.zeros(0, 32), FP8).values.shape == (0, 32)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("case", ["plain", "bias", "gated", "residual"])
def test_layers_equal_products_of_the_dequantized_weight(case: str, rows: int) -> None:
    x, weight = representable(rows, 64), (torch.randn(96, 64) * 0.1).bfloat16()
    bias = torch.randn(96).bfloat16() if case in ("bias", "gated") else None
    residual = torch.randn(rows, 96).bfloat16() if case == "residual" else None
    linear = Fp8Linear(weight, bias, Choice("fp8", ()), fp8_dtype=FP8, gated=case == "gated")
    expected = x.double() @ (linear.weight.values.double() * linear.weight.scale.double()[:, None]).T
    if linear.bias is not None:
        expected += linear.bias.double()
    if case == "gated":
        expected = reference.silu_mul(torch.cat((expected[:, ::2], expected[:, 1::2]), dim=1))
    if residual is not None:
        expected += residual.double()
    out = linear(x, activation="silu" if case == "gated" else None, residual=residual)
    assert out.dtype == torch.bfloat16
    if residual is not None:
        assert out.data_ptr() == residual.data_ptr()
    assert (out.double() - expected).norm() / expected.norm() < 0.01


def test_a_few_rows_are_not_quantized() -> None:
    x, weight, gamma = torch.randn(2, 80).bfloat16(), torch.randn(48, 80).bfloat16(), torch.rand(80).bfloat16()
    linear = Fp8Linear(weight, None, Choice("fp8", ()), fp8_dtype=FP8)
    exact = linear.weight.values.double() * linear.weight.scale.double()[:, None]
    expected = reference.rms_norm(x.double(), gamma.double(), 1e-5) @ exact.T
    out = linear(x, norm=RmsNorm(gamma, 1e-5))
    assert (out.double() - expected).norm() / expected.norm() < 4e-3


def test_an_activation_needs_a_gated_weight() -> None:
    linear = Fp8Linear(torch.randn(32, 32).bfloat16(), None, Choice("fp8", ()), fp8_dtype=FP8)
    with pytest.raises(ValueError, match="gated"):
        linear(torch.randn(1, 32).bfloat16(), activation="silu")
