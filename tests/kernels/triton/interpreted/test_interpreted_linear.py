"""GEMV, skinny GEMM and TritonLinear against float64, under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import linear
from aphrodite.kernels.triton.activation import Activation
from aphrodite.kernels.triton.epilogue import WORKSPACE_TILES, WORKSPACE_VALUES, Epilogue, split_workspace
from aphrodite.kernels.triton.gated_gemm import GatedConfig, gated_gemm, gated_gemm_supports
from aphrodite.kernels.triton.linear import (
    GemvConfig,
    SkinnyConfig,
    choose_kernel,
    gemv,
    gemv_config,
    skinny_config,
    skinny_gemm,
)
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear, interleave_gate_up

# The interpreter cuts bfloat16 off where hardware rounds, and its dot takes it for integers: that one gets float16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ACTIVATIONS = {"silu": reference.silu_mul, "gelu_tanh": reference.gelu_tanh_mul}
CHOICE = Choice("dense", ())

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def expected_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: RmsNorm | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float64, for a weight whose rows are gate, then up."""
    values = x.double()
    if norm is not None:
        values = reference.rms_norm(values, norm.weight.double(), norm.eps)
    out = values @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual.double()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(1, 10, 192), (2, 7, 520), (4, 6, 136)])
def test_gemv(dtype: torch.dtype, rows: int, out_features: int, in_features: int) -> None:
    x, weight = (
        random(rows, 2 * in_features, dtype=dtype)[:, :in_features],
        random(out_features, in_features, dtype=dtype),
    )
    bias, residual = random(out_features, dtype=dtype), random(rows, out_features, dtype=dtype)
    norm = RmsNorm(random(in_features, dtype=dtype), 1e-5)
    expected = expected_linear(x, weight, bias, norm, residual=residual)
    config = GemvConfig(rows=4, chunk=128, depth=2, warps=4)
    out = gemv(x, weight, Epilogue(bias, None, residual), norm, config)
    assert out is residual
    assert distance(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gemv_writes_every_result_whatever_the_queue(depth: int) -> None:
    x, weight = random(1, 384), random(6, 384)
    out = gemv(x, weight, config=GemvConfig(2, 128, depth, 4))
    assert distance(out, expected_linear(x, weight)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gemv_of_gated_pairs(activation: str) -> None:
    x, weight, bias = random(2, 128), random(24, 128), random(24)
    norm = RmsNorm(random(128), 1e-6)
    out = gemv(
        x, interleave_gate_up(weight), Epilogue(interleave_gate_up(bias), activation), norm, GemvConfig(4, 64, 1, 4)
    )
    assert out.shape == (2, 12)
    assert distance(out, expected_linear(x, weight, bias, norm, activation)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (5, 2), (20, 3), (20, 1)])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 256), (40, 200)])
def test_skinny_gemm(rows: int, splits: int, out_features: int, in_features: int) -> None:
    dtype = torch.float16
    x, weight = random(rows, in_features, dtype=dtype), random(out_features, in_features, dtype=dtype)
    bias, residual = random(out_features, dtype=dtype), random(rows, out_features, dtype=dtype)
    expected = expected_linear(x, weight, bias, residual=residual)
    out = skinny_gemm(x, weight, Epilogue(bias, None, residual), SkinnyConfig(32, 64, splits, 2, 4))
    assert out is residual
    assert distance(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("splits", "ahead"), [(1, False), (2, False), (1, True), (2, True)])
def test_skinny_gemm_of_gated_pairs(splits: int, ahead: bool) -> None:
    x, weight = random(6, 128, dtype=torch.float16), random(48, 128, dtype=torch.float16)
    out = skinny_gemm(
        x, interleave_gate_up(weight), Epilogue(activation="silu"), SkinnyConfig(32, 32, splits, 2, 4, ahead=ahead)
    )
    assert out.shape == (6, 24)
    assert distance(out, expected_linear(x, weight, activation="silu")) < TOLERANCE[torch.float16]


def test_counters_are_zero_between_launches() -> None:
    x, weight = random(3, 128, dtype=torch.float16), random(70, 128, dtype=torch.float16)
    config = SkinnyConfig(32, 32, 4, 2, 4)
    first, second = skinny_gemm(x, weight, config=config), skinny_gemm(x, weight, config=config)
    assert torch.equal(first, second)
    assert not split_workspace(x.device)[1].any()


def test_unequal_splits_cannot_load_ahead() -> None:
    with pytest.raises(ValueError, match="evenly"):
        skinny_gemm(random(5, 96), random(32, 96), config=SkinnyConfig(32, 32, 2, 2, 4, ahead=True))


def test_a_split_that_outgrows_the_workspace_is_refused() -> None:
    x = random(64, 8)
    with pytest.raises(ValueError, match="split less"):
        skinny_gemm(x, torch.empty(65536, 8, dtype=x.dtype), config=SkinnyConfig(64, 64, 2, 2, 4))


@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 14336), (128256, 4096), (1024, 2048), (8192, 28672), (576, 576)]
)
def test_default_cuts_cover_the_shape_and_fit_the_workspace(shape: tuple[int, int]) -> None:
    for rows in range(1, linear.GEMV_MAX_ROWS + 1):
        config = gemv_config(*shape, rows)
        assert config.depth * config.chunk < shape[1] + config.chunk
        assert config.rows % 2 == 0  # pairs stay together
    for rows in (5, 16, 17, 64):
        cut = skinny_config(*shape, rows)
        tiles = -(-shape[0] // cut.rows)
        assert cut.splits == 1 or tiles * cut.splits * cut.rows * linear.padded_rows(rows) <= WORKSPACE_VALUES
        assert cut.splits == 1 or tiles <= WORKSPACE_TILES


@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 14336), (128256, 4096), (1024, 2048), (576, 576)])
@pytest.mark.parametrize("gated", [False, True])
def test_each_kernel_gets_only_the_rows_and_values_that_it_can_do(shape: tuple[int, int], gated: bool) -> None:
    for rows in range(200):
        exact = choose_kernel(*shape, rows, 4, gated=gated)
        assert exact == ("gemv" if 1 <= rows <= linear.GEMV_MAX_ROWS else "library")
        fast = choose_kernel(*shape, rows, 2, gated=gated)
        assert fast != "gemv" or 1 <= rows <= linear.GEMV_MAX_ROWS
        assert fast != "skinny" or 1 <= rows <= linear.SKINNY_MAX_ROWS
        assert (fast == "library") >= (rows == 0 or rows > linear.SKINNY_MAX_ROWS)
    assert choose_kernel(*shape, 1, 2, gated=gated) == "gemv"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(70, 96, 64), (5, 80, 40)])
def test_gated_gemm(activation: Activation, rows: int, out_features: int, in_features: int) -> None:
    """Tiles at the edges of rows, columns and sums, and blocks that do several tiles."""
    x, weight = random(rows, in_features, dtype=torch.float16), random(out_features, in_features, dtype=torch.float16)
    out = gated_gemm(x, interleave_gate_up(weight), activation, GatedConfig(32, 32, 32, 2, 2, 4))
    assert out.shape == (rows, out_features // 2)
    assert distance(out, expected_linear(x, weight, activation=activation)) < TOLERANCE[torch.float16]


def test_the_gated_gemm_is_for_the_copy_engine_only() -> None:
    assert not gated_gemm_supports(random(4, 64), random(32, 64))


LAYERS: list[dict[str, Any]] = [
    {},
    {"bias": True, "norm": True},
    {"activation": "silu", "norm": True},
    {"activation": "gelu_tanh", "bias": True},
    {"residual": True},
    {"residual": True, "bias": True, "norm": True},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 80])
@pytest.mark.parametrize("parts", LAYERS, ids=lambda parts: "+".join(parts) or "plain")
def test_triton_linear(dtype: torch.dtype, rows: int, parts: dict[str, Any]) -> None:
    activation = parts.get("activation")
    x, weight = random(rows, 64, dtype=dtype), random(32, 64, dtype=dtype)
    bias = random(32, dtype=dtype) if "bias" in parts else None
    norm = RmsNorm(random(64, dtype=dtype), 1e-5) if "norm" in parts else None
    residual = random(rows, 32, dtype=dtype) if "residual" in parts else None
    expected = expected_linear(x, weight, bias, norm, activation, residual)
    layer = TritonLinear(weight, bias, CHOICE, gated=activation is not None)
    out = layer(x, norm=norm, activation=activation, residual=residual)
    assert distance(out, expected) < 2 * TOLERANCE[dtype]


def test_triton_linear_without_rows() -> None:
    assert TritonLinear(random(32, 64), None, CHOICE)(random(0, 64)).shape == (0, 32)


def test_an_activation_needs_a_gated_weight() -> None:
    with pytest.raises(ValueError, match="gated"):
        TritonLinear(random(32, 64), None, CHOICE)(random(1, 64), activation="silu")
