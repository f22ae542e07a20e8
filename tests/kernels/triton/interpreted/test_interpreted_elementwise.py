"""Normalisation and gated activations against their plain definitions in float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from aphrodite.kernels import reference
from aphrodite.kernels.triton.activation import gated_pairs
from aphrodite.kernels.triton.norm import add_rms_norm, rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Euclidean distance; NaN anywhere gives NaN."""
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """The interpreter cuts bfloat16 off, which for some numbers in a thousand goes beyond the tolerance."""
    torch.manual_seed(0)


@DTYPES
@pytest.mark.parametrize("hidden", [64, 576])
def test_rms_norm_of_strided_rows(dtype: torch.dtype, hidden: int) -> None:
    x = torch.randn(3, 2 * hidden).to(dtype)[:, :hidden]
    weight = torch.randn(hidden).to(dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert distance(rms_norm(x, weight, 1e-5), expected) < TOLERANCE[dtype]


@DTYPES
def test_add_rms_norm_leaves_the_sum_in_the_residual(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(2, 96).to(dtype), torch.randn(2, 96).to(dtype), torch.randn(96).to(dtype)
    summed = x.double() + residual.double()
    out = add_rms_norm(x, residual, weight, 1e-6)
    assert distance(residual, summed) < TOLERANCE[dtype]
    assert distance(out, reference.rms_norm(residual.double(), weight.double(), 1e-6)) < TOLERANCE[dtype]


def test_a_row_of_zeros_stays_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 32), torch.ones(32), 1e-5), torch.zeros(1, 32))


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_pairs(dtype: torch.dtype, activation: str) -> None:
    gate, up = (3 * torch.randn(3, 700)).to(dtype), torch.randn(3, 700).to(dtype)
    plain = {"silu": reference.silu_mul, "gelu_tanh": reference.gelu_tanh_mul}[activation]
    expected = plain(torch.cat((gate, up), dim=-1).double())
    pairs = torch.stack((gate, up), dim=-1).flatten(1)
    assert distance(gated_pairs(pairs, activation), expected) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_pairs_of_large_values(activation: str) -> None:
    pairs = torch.tensor([[-1e4, 1.0, 1e4, 1.0]])
    assert torch.equal(gated_pairs(pairs, activation), torch.tensor([[0.0, 1e4]]))


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 32), torch.ones(32), 1e-5).shape == (0, 32)
    assert gated_pairs(torch.empty(0, 32), "silu").shape == (0, 16)
