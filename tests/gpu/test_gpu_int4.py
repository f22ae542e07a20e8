"""4-bit linear layers on the GPU against float64 on the dequantized weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from gpu_graphs import check_replays

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import int4_linear
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.int4_words import pack_int4, unpack_int4
from aphrodite.layers.activation import gated_activation
from aphrodite.layers.int4_gpu_linear import Int4GpuLinear
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.mlp import GatedMlp
from aphrodite.quantization.layouts import Int4Groups

# Relative to float64 on the dequantized weights. What makes it more: a norm's or gate's result is rounded on its way,
# and so is a weight that is expanded for the library.
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 5e-4}
CHOICE = Choice("packed 4-bit", ())
ACTIVATIONS = {
    "silu": reference.silu_mul,
    "gelu_tanh": reference.gelu_tanh_mul,
    "swiglu_oai": functools.partial(gated_activation, kind="swiglu_oai"),
}
ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 65, 100, 128, 200, 256, 300, 512, 600, 1100)
LAYERS: list[tuple[tuple[int, int], int, dict[str, Any]]] = [
    ((6144, 4096), 128, {"norm": True}),
    ((4096, 4096), 128, {"residual": True}),
    ((28672, 4096), 128, {"norm": True, "activation": "silu"}),
    ((4096, 14336), 128, {"residual": True}),
    ((2048, 2048), 32, {"norm": True, "bias": True, "residual": True}),
    ((2048, 2048), 64, {"norm": True, "bias": True, "activation": "gelu_tanh"}),
    ((2880, 1024), 64, {"bias": True, "activation": "swiglu_oai"}),
    ((1152, 896), 896, {"norm": True, "bias": True}),  # a scale a row; 7 chunks
    ((1001, 576), 64, {}),  # strips and chunks that end early
    ((1026, 1024), 512, {"activation": "silu"}),  # pairs that end early
    ((512, 1024), 128, {"permuted": True, "norm": True}),
    ((512, 1024), 32, {"residual": True}),
]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def random_groups(
    out_features: int, in_features: int, group: int, device: torch.device, *, permuted: bool = False
) -> Int4Groups:
    codes = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=device)
    shape = (out_features, in_features // group)
    scales = (torch.rand(shape, device=device) + 0.5).half() / 64
    return Int4Groups(
        codes,
        scales,
        torch.randint(5, 12, shape, dtype=torch.uint8, device=device),
        group,
        torch.randperm(in_features, device=device).int() if permuted else None,
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "group", "parts"), LAYERS, ids=str)
def test_layer(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], group: int, parts: dict[str, Any]
) -> None:
    activation = parts.get("activation")
    weight = random_groups(*shape, group, device, permuted="permuted" in parts)
    bias = torch.randn(shape[0], device=device).to(dtype) if "bias" in parts else None
    norm = RmsNorm(torch.randn(shape[1], device=device).to(dtype), 1e-5) if "norm" in parts else None
    layer = Int4GpuLinear(weight, bias, CHOICE, dtype=dtype, gated=activation is not None)
    dense = weight.dequantize().double()
    wrong = []
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device=device).to(dtype)
        residual = torch.randn(rows, shape[0], device=device).to(dtype) if "residual" in parts else None
        values = x.double()
        if norm is not None:
            values = reference.rms_norm(values, norm.weight.double(), norm.eps)
        expected = values @ dense.T
        if bias is not None:
            expected += bias.double()
        if activation is not None:
            expected = ACTIVATIONS[activation](expected)
        if residual is not None:
            expected += residual.double()
        out = layer(x, norm=norm, activation=activation, residual=residual)
        error = distance(out, expected)
        assert out.dtype == dtype
        alone = norm is None and activation is None
        exact = rows <= int4_linear.HALF_MAX_ROWS
        if not error < TOLERANCE[dtype] * (1 if alone else 2) * (1 if exact else 1.6):
            wrong.append((rows, error))
    assert not wrong


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-12])
def test_scales_that_float16_cannot_hold(device: torch.device, factor: float) -> None:
    groups = random_groups(1024, 1024, 64, device)
    groups = dataclasses.replace(groups, scales=groups.scales.float() * factor)
    layer = Int4GpuLinear(groups, None, CHOICE, dtype=torch.bfloat16)
    assert not layer.weight.fits_half
    x = torch.randn(200, 1024, device=device).bfloat16()
    assert distance(layer(x), x.double() @ groups.dequantize().double().T) < 2e-3


def test_rows_of_very_different_sizes(device: torch.device) -> None:
    groups = random_groups(1024, 1024, 128, device)
    layer = Int4GpuLinear(groups, None, CHOICE, dtype=torch.bfloat16)
    x = (torch.randn(200, 1024, device=device) * torch.logspace(-20, 20, 200, device=device)[:, None]).bfloat16()
    x[7], x[9, 5] = 0.0, float("nan")
    expected = x.double() @ groups.dequantize().double().T
    for row, (actual, wanted) in enumerate(zip(layer(x).double(), expected, strict=True)):
        if row in (7, 9):
            assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0))
        else:
            assert distance(actual, wanted) < 2.5e-3, row


@pytest.mark.parametrize("rows", [1, 40, 300, 1100])
def test_feed_forward_blocks(device: torch.device, rows: int) -> None:
    """Whose second product takes the first one's result in float16 where there are many rows."""
    wide, back = random_groups(4096, 1024, 128, device), random_groups(1024, 2048, 128, device)
    layers = [Int4GpuLinear(part, None, CHOICE, dtype=torch.bfloat16, gated=part is wide) for part in (wide, back)]
    norm = RmsNorm(torch.rand(1024, device=device).bfloat16() / 8, 1e-5)
    x, residual = (torch.randn(rows, 1024, device=device).bfloat16() for _ in "12")
    values = reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
    inner = reference.silu_mul(values @ wide.dequantize().double().T)
    expected = inner @ back.dequantize().double().T + residual.double()
    assert distance(GatedMlp(*layers)(x, norm=norm, activation="silu", residual=residual), expected) < 4e-3


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 128, 256])
def test_equal_inputs_give_equal_results(device: torch.device, rows: int) -> None:
    groups = random_groups(4096, 4096, 128, device)
    weight = pack_int4(groups.codes, groups.scales, groups.zeros, 128)
    x = torch.randn(rows, 4096, device=device).bfloat16()
    scratch = torch.empty(0, dtype=x.dtype, device=device)
    first = int4_linear.int4_linear(x, weight, scratch)
    assert all(torch.equal(first, int4_linear.int4_linear(x, weight, scratch)) for _ in range(50))


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 64, 128])
def test_a_captured_chain_gives_what_eager_calls_give(device: torch.device, rows: int) -> None:
    """Every kernel of the chain starts before its predecessor ends and needs its result."""
    hidden = 1024
    norm = RmsNorm(torch.randn(hidden, device=device).bfloat16(), 1e-5)

    def layers(out_features: int, in_features: int, *, gated: bool) -> list[Int4GpuLinear]:
        made = [random_groups(out_features, in_features, 128, device) for _ in "12345678"]
        return [Int4GpuLinear(groups, None, CHOICE, dtype=torch.bfloat16, gated=gated) for groups in made]

    wide, back = layers(4096, hidden, gated=True), layers(hidden, 2048, gated=False)
    start = torch.randn(rows, hidden, device=device).bfloat16()

    def chain(states: torch.Tensor) -> torch.Tensor:
        for up, down in zip(wide, back, strict=True):
            states = down(up(states, norm=norm, activation="silu"), residual=states)
        return states

    check_replays(chain, start)


def test_the_library_expands_piece_by_piece(device: torch.device) -> None:
    scratch = torch.empty(1 << 19, dtype=torch.bfloat16, device=device)
    groups = random_groups(2000, 1024, 128, device)
    weight = pack_int4(groups.codes, groups.scales, groups.zeros, 128)
    x, residual = torch.randn(700, 1024, device=device).bfloat16(), torch.randn(700, 2000, device=device).bfloat16()
    expected = x.double() @ unpack_int4(weight).T + residual.double()
    assert distance(int4_linear.by_library(x, weight, scratch, Epilogue(None, None, residual)), expected) < 3e-3
