"""fp8 on the GPU: quantized activations, and layers against float64 products of what was quantized."""

from __future__ import annotations

import pytest
import torch

from aphrodite import platforms
from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice

FP8 = platforms.current().fp8_dtype
pytestmark = pytest.mark.skipif(FP8 is None, reason="this GPU has no fp8 products")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_features", [576, 4096, 14336])
@pytest.mark.parametrize("with_norm", [False, True])
def test_quantized_rows_are_the_nearest(
    device: torch.device, dtype: torch.dtype, in_features: int, with_norm: bool
) -> None:
    from aphrodite.kernels.triton.quantize import quantize_rows

    assert FP8 is not None
    x = torch.randn(5, 2 * in_features, device=device).to(dtype)[:, :in_features]
    x *= torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0], device=device)[:, None]
    weight = torch.rand(in_features, device=device).add_(0.5).to(dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5) if with_norm else x.double()
    values, scales = quantize_rows(x, FP8, (weight, 1e-5) if with_norm else None)
    largest = torch.finfo(FP8).max
    peaks = expected.abs().amax(1)
    torch.testing.assert_close(scales[peaks > 0, 0].double(), peaks[peaks > 0] / largest, rtol=1e-5, atol=0)
    error = (values.double() * scales.double() - expected).abs()
    assert bool((error <= 1.001 * 2.0**-4 * expected.abs() + scales * 2.0**-10).all())
    assert values.float().abs().amax() == largest


def test_a_row_that_is_not_finite_stays_so(device: torch.device) -> None:
    from aphrodite.kernels.triton.quantize import quantize_rows

    assert FP8 is not None
    x = torch.ones(3, 64, device=device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    values, scales = quantize_rows(x, FP8)
    restored = values.float() * scales
    assert torch.allclose(restored[0], x[0], rtol=1e-3)
    assert not bool(torch.isfinite(restored[1]).all())
    assert not bool(torch.isfinite(restored[2]).all())


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 128, 2000])
@pytest.mark.parametrize("case", ["norm", "bias", "gated", "residual"])
def test_layers_equal_products_in_float64(device: torch.device, case: str, rows: int) -> None:
    from aphrodite.kernels.triton.linear import GEMV_MAX_ROWS
    from aphrodite.kernels.triton.quantize import quantize_rows
    from aphrodite.layers.fp8_linear import Fp8Linear
    from aphrodite.layers.linear import RmsNorm

    assert FP8 is not None
    generator = torch.Generator(device).manual_seed(rows)
    x = torch.randn(rows, 1024, device=device, generator=generator).bfloat16()
    weight = torch.randn(1536, 1024, device=device, generator=generator).mul_(0.02).bfloat16()
    bias = torch.randn(1536, device=device).bfloat16() if case in ("bias", "gated") else None
    norm = RmsNorm(torch.rand(1024, device=device).add_(0.5).bfloat16(), 1e-5) if case in ("norm", "gated") else None
    residual = torch.randn(rows, 1536, device=device).bfloat16() if case == "residual" else None
    linear = Fp8Linear(weight, bias, Choice("fp8", ()), fp8_dtype=FP8, gated=case == "gated")
    unquantized = x.double() if norm is None else reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
    exact = unquantized
    if rows > GEMV_MAX_ROWS:
        values, scales = quantize_rows(x, FP8, norm)
        exact = values.double() * scales.double()
        assert (exact - unquantized).norm() / unquantized.norm() < 0.04
    expected = exact @ (linear.weight.values.double() * linear.weight.scale.double()[:, None]).T
    if linear.bias is not None:
        expected += linear.bias.double()
    if case == "gated":
        expected = reference.silu_mul(torch.cat((expected[:, ::2], expected[:, 1::2]), dim=1))
    if residual is not None:
        expected += residual.double()
    out = linear(x, norm=norm, activation="silu" if case == "gated" else None, residual=residual)
    assert (out.double() - expected).norm() / expected.norm() < 0.01
