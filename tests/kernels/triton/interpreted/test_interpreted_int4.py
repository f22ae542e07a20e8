"""The layout of 4-bit weights, their plain kernels and Int4GpuLinear against float64, under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import int4_linear
from aphrodite.kernels.triton.activation import gated_pairs
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.half_rows import half_rows
from aphrodite.kernels.triton.int4_expand import expand_int4
from aphrodite.kernels.triton.int4_words import Int4Words, pack_int4, unpack_int4, unsupported_group, whole_splits
from aphrodite.layers.activation import Activation
from aphrodite.layers.int4_gpu_linear import Int4GpuLinear, decline_int4_gpu
from aphrodite.layers.linear import RmsNorm
from aphrodite.quantization.layouts import Int4Groups

CHOICE = Choice("packed 4-bit", ())
# (out, in, group): padded strips and chunks, groups within, of and across chunks.
SHAPES = [(40, 256, 128), (48, 192, 64), (36, 320, 32), (20, 136, 136), (24, 512, 256)]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def random_groups(out: int, into: int, group: int, permuted: bool = False) -> Int4Groups:
    shape = (out, into // group)
    return Int4Groups(
        torch.randint(0, 256, (out, into // 2), dtype=torch.uint8),
        (torch.randn(shape) / 128).half(),
        torch.randint(0, 17, shape, dtype=torch.uint8),
        group,
        torch.randperm(into).int() if permuted else None,
    )


def packed(groups: Int4Groups, *, paired: bool = False) -> Int4Words:
    return pack_int4(groups.codes, groups.scales, groups.zeros, groups.group_size, paired=paired)


@pytest.mark.parametrize(("out", "into", "group"), SHAPES)
@pytest.mark.parametrize("paired", [False, True])
def test_packing_loses_nothing(out: int, into: int, group: int, paired: bool) -> None:
    groups = random_groups(out, into, group)
    expected = groups.dequantize().double()
    if paired:
        expected = torch.stack(expected.chunk(2), dim=1).flatten(0, 1)
    weight = packed(groups, paired=paired)
    assert torch.equal(unpack_int4(weight), expected)
    expanded = expand_int4(weight, torch.full((out, into), float("nan")))
    assert torch.equal(expanded.double(), expected)


def test_packing_in_pieces_is_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = random_groups(100, 256, 64)
    whole = packed(groups)
    monkeypatch.setattr("aphrodite.kernels.triton.int4_words.PIECE_BYTES", 16 * 128 * 2)
    assert torch.equal(packed(groups).words, whole.words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_16_bits_are_kept_exactly(dtype: torch.dtype) -> None:
    scales = torch.cat((torch.randn(16, 1) * 1e-3, torch.randn(16, 1) * 1e3)).to(dtype)
    codes = torch.full((32, 64), 0x11, dtype=torch.uint8)
    weight = pack_int4(codes, scales, torch.zeros(32, 1, dtype=torch.uint8), 128)
    error = (unpack_int4(weight)[:, :1] - scales.double()).abs() / scales.double().abs()
    assert float(error.max()) <= (2**-16 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_keep_what_16_bits_hold(dtype: torch.dtype) -> None:
    sizes = torch.tensor([[1.0], [2.0**-14], [3e4], [0.0]])
    x = (torch.randn(4, 96).clamp(min=-2, max=2) * sizes).to(dtype)[:, :72]
    values, scales = half_rows(x)
    assert (values.dtype, values.shape, values.is_contiguous(), scales.dtype) == (
        *(torch.float16, (4, 72), True),
        torch.float32,
    )
    lost = (values.double() * scales.double()[:, None] - x.double()).abs().amax(1)
    assert bool((lost <= x.double().abs().amax(1) * 2.0**-38).all())  # far below the largest, under float16's numbers
    assert bool((values[:3].abs().amax(1) >= 2.0**14).all())
    assert half_rows(x[:0]).values.shape == (0, 72)


def test_half_rows_of_normed_rows() -> None:
    x, weight = torch.randn(3, 96).bfloat16(), torch.rand(96).add_(0.5).bfloat16()
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    values, scales = half_rows(x, (weight, 1e-5))
    assert distance(values.double() * scales.double()[:, None], expected) < 3e-4


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_half_rows_that_are_not_finite(value: float) -> None:
    x = torch.ones(2, 32).bfloat16()
    x[0, 3] = value
    values, scales = half_rows(x)
    assert not bool(torch.isfinite(values[0, 3]))
    assert bool(torch.isfinite(scales).all())
    assert torch.equal(values[1].float() * scales[1], x[1].float())


def test_kernels_by_rows_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_linear, "gluon_reason", lambda device: None)
    rows, device = (1, 8, 9, 64, 65, 1024, 1025), torch.device("cpu")
    chosen = [[int4_linear.choose_int4_kernel(count, device, fits) for count in rows] for fits in (True, False)]
    assert chosen[0] == ["mma", "mma", "wgmma", "wgmma", "half", "half", "library"]
    assert chosen[1] == ["mma", "mma", "wgmma", "wgmma", "wgmma", "wgmma", "library"]


def test_layers_with_other_scales_are_of_another_kind() -> None:
    groups = random_groups(32, 128, 128)
    usual, large = groups.scales.abs(), groups.scales.abs() + 16
    layers = [
        Int4GpuLinear(dataclasses.replace(groups, scales=scales), None, CHOICE, dtype=torch.float16)
        for scales in (usual, large)
    ]
    assert [layer.weight.fits_half for layer in layers] == [True, False]
    assert layers[0].choice == CHOICE != layers[1].choice


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("gated", [False, True])
def test_layer(rows: int, gated: bool) -> None:
    """With act-order, norm and bias; many rows go to the library, a few strips at a time."""
    groups = random_groups(72, 256, 64, permuted=True)
    bias = torch.randn(72).half()
    norm = RmsNorm(torch.rand(256).half() + 0.5, 1e-5)
    layer = Int4GpuLinear(groups, bias, CHOICE, dtype=torch.float16, gated=gated)
    layer.scratch = torch.empty(2 * 16 * 256, dtype=torch.float16)
    x = torch.randn(rows, 256).half()
    residual = None if gated else torch.randn(rows, 72).half()
    values = reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
    expected = values @ groups.dequantize().double().T + bias.double()
    expected = reference.silu_mul(expected) if residual is None else expected + residual.double()
    result = layer(x, norm=norm, activation="silu" if gated else None, residual=residual)
    assert distance(result, expected) < 2e-3


def test_pairs_are_in_memory_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a 70B model with a step of 8,192 tokens would take a gigabyte."""
    widths: list[int] = []

    def record(pairs: torch.Tensor, activation: Activation) -> torch.Tensor:
        widths.append(pairs.shape[1])
        return gated_pairs(pairs, activation)

    monkeypatch.setattr(int4_linear, "gated_pairs", record)
    weight = packed(random_groups(80, 128, 64), paired=True)
    x, scratch = torch.randn(40, 128).half(), torch.empty(2 * 16 * 128, dtype=torch.float16)
    out = int4_linear.by_library(x, weight, scratch, Epilogue(None, "silu", None))
    assert widths == [32, 32, 16]
    gate, up = (x.double() @ unpack_int4(weight).T).unflatten(1, (40, 2)).unbind(2)
    assert distance(out, gate * torch.sigmoid(gate) * up) < 2e-3


def test_what_is_declined() -> None:
    assert decline_int4_gpu(random_groups(16, 256, 64), torch.bfloat16) is not None  # not on a Hopper card
    assert unsupported_group(48, 96) is not None
    assert all(unsupported_group(size, 1024) is None for size in (32, 64, 128, 512, 1024))
    assert [whole_splits(8, splits) for splits in (1, 4, 6)] == [1, 4, 4]
