"""Dense products on wgmma on the GPU against float64, each way to cut them."""

from __future__ import annotations

import pytest
import torch
from gpu_graphs import check_replays

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.dense_cuts import MEASURED, NARROW, WIDE, DenseConfig, dense_cut
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.int4_linear import gluon_reason
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.layers.triton_linear import TritonLinear

ACTIVATIONS = {"silu": reference.silu_mul, "gelu_tanh": reference.gelu_tanh_mul}
CUTS = [
    NARROW,
    WIDE,
    *(cut for cuts in MEASURED.values() for _, cut in cuts),
    DenseConfig(1, 64, 32, 8, 64, 4),
    DenseConfig(3, 64, 64, 7, 64, 4, rotated=True),
]
CHAINED = [(48, NARROW), (128, DenseConfig(1, 128, 32, 5, 128, 8)), (160, DenseConfig(3, 64, 64, 7, 64, 4, True))]


@pytest.fixture(autouse=True)
def needs_gluon(device: torch.device) -> None:
    if (reason := gluon_reason(device)) is not None:
        pytest.skip(reason)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def product(x: torch.Tensor, weight: torch.Tensor, cut: DenseConfig, epilogue: Epilogue = Epilogue()) -> torch.Tensor:
    from aphrodite.kernels.triton.dense_wgmma import dense_wgmma  # Gluon is not in every Triton

    return dense_wgmma(x, weight, cut, epilogue)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 144, 256, 300])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut(device: torch.device, dtype: torch.dtype, rows: int, cut: DenseConfig) -> None:
    """Edges of tiles on all sides: 2,000 outputs, 1,992 inputs."""
    torch.manual_seed(rows)
    weight = (torch.randn(2000, 1992, device=device) / 32).to(dtype)
    x = torch.randn(rows, 2000, device=device).to(dtype)[:, :1992]  # strided
    bias = torch.randn(2000, device=device).to(dtype)
    sums = x.double() @ weight.double().T
    tolerance = 4e-3 if dtype == torch.bfloat16 else 6e-4
    assert distance(product(x, weight, cut), sums) < tolerance
    residual = torch.randn(rows, 2000, device=device).to(dtype)
    expected = sums + bias.double() + residual.double()
    out = product(x, weight, cut, Epilogue(bias, None, residual))
    assert out is residual
    assert distance(out, expected) < tolerance
    for name, activation in ACTIVATIONS.items():
        pairs = (sums + bias.double()).unflatten(1, (-1, 2))
        expected = activation(torch.cat((pairs[..., 0], pairs[..., 1]), dim=1))
        assert distance(product(x, weight, cut, Epilogue(bias, name, None)), expected) < tolerance  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [40, 100, 144, 256])
@pytest.mark.parametrize("shape", [(28672, 4096), (128256, 4096), (6144, 4096), (4096, 14336)], ids=str)
def test_layers_that_take_it_repeat_themselves(device: torch.device, rows: int, shape: tuple[int, int]) -> None:
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    layer = TritonLinear(torch.randn(shape, device=device).bfloat16(), None, Choice("dense", ()))
    if dense_cut(*shape, rows) is None:
        pytest.skip("another kernel serves")
    first = layer(x)
    assert distance(first, x.double() @ layer.weight.double().T) < 4e-3
    assert all(torch.equal(first, layer(x)) for _ in range(20))


@pytest.mark.parametrize(("rows", "cut"), CHAINED, ids=str)
def test_a_captured_chain_gives_what_eager_calls_give(device: torch.device, rows: int, cut: DenseConfig) -> None:
    """Every product starts to load its weight before its predecessors end, and needs their results."""
    hidden = 1024
    norm = torch.randn(hidden, device=device).bfloat16()
    wide = [(torch.randn(4096, hidden, device=device) / 32).bfloat16() for _ in range(8)]
    back = [(torch.randn(hidden, 2048, device=device) / 64).bfloat16() for _ in range(8)]
    start = torch.randn(rows, hidden, device=device).bfloat16()

    def chain(states: torch.Tensor) -> torch.Tensor:
        for up, down in zip(wide, back, strict=True):
            inner = product(rms_norm(states, norm, 1e-5), up, cut, Epilogue(None, "silu"))
            states = product(inner, down, cut, Epilogue(None, None, states))
        return states

    check_replays(chain, start)
