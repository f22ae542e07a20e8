"""GEMV, skinny GEMM, norms and activations on the GPU against float64, at the shapes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_graphs import check_replays

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.activation import gated_pairs
from aphrodite.kernels.triton.epilogue import split_workspace
from aphrodite.kernels.triton.linear import SkinnyConfig, skinny_gemm
from aphrodite.kernels.triton.norm import add_rms_norm, rms_norm
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
ACTIVATIONS = {"silu": reference.silu_mul, "gelu_tanh": reference.gelu_tanh_mul}
CASES = [(torch.bfloat16, rows) for rows in (1, 2, 3, 8, 17, 64, 65, 1100)]
CASES += [(torch.float16, 2), (torch.float16, 16), (torch.float32, 4), (torch.float32, 65)]
CHOICE = Choice("dense", ())
LAYERS: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((6144, 4096), {"norm": True}),
    ((4096, 4096), {"residual": True}),
    ((28672, 4096), {"norm": True, "activation": "silu"}),
    ((6080, 1000), {"activation": "gelu_tanh"}),  # tiles at the edges
    ((4096, 14336), {"residual": True}),
    ((1152, 896), {"norm": True, "bias": True}),  # Qwen2.5-0.5B
    ((3072, 576), {"norm": True, "activation": "gelu_tanh", "bias": True}),
    ((576, 1536), {"residual": True, "bias": True}),
    ((1001, 200), {}),  # neither a multiple of a tile nor of a vector
]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize(("dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize(("shape", "parts"), LAYERS, ids=lambda value: "+".join(map(str, value)) or "plain")
def test_layer(
    device: torch.device, dtype: torch.dtype, rows: int, shape: tuple[int, int], parts: dict[str, Any]
) -> None:
    out_features, in_features = shape
    activation = parts.get("activation")
    x = random(rows, in_features, dtype=dtype, device=device)
    weight = random(out_features, in_features, dtype=dtype, device=device)
    bias = random(out_features, dtype=dtype, device=device) if "bias" in parts else None
    norm = RmsNorm(random(in_features, dtype=dtype, device=device), 1e-5) if "norm" in parts else None
    residual = random(rows, out_features, dtype=dtype, device=device) if "residual" in parts else None

    values = x.double() if norm is None else reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
    expected = values @ weight.double().T
    if bias is not None:
        expected += bias.double()
    if activation is not None:
        expected = ACTIVATIONS[activation](expected)
    if residual is not None:
        expected += residual.double()

    layer = TritonLinear(weight, bias, CHOICE, gated=activation is not None)
    out = layer(x, norm=norm, activation=activation, residual=residual)
    assert out.dtype == dtype
    # Between separate kernels 16-bit dtypes are rounded more than once.
    assert distance(out, expected) < (2 if rows > 1 else 1) * TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_equal_inputs_give_equal_results(device: torch.device, splits: int) -> None:
    x = random(8, 4096, dtype=torch.bfloat16, device=device)
    weight = random(1024, 4096, dtype=torch.bfloat16, device=device)
    config = SkinnyConfig(64, 128, splits, 3, 4)
    first = skinny_gemm(x, weight, config=config)
    assert all(torch.equal(first, skinny_gemm(x, weight, config=config)) for _ in range(50))
    assert not split_workspace(device)[1].any()


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_a_captured_chain_gives_what_eager_calls_give(device: torch.device, rows: int) -> None:
    """Every kernel of the chain starts before its predecessor ends and needs its result."""
    dtype, hidden = torch.bfloat16, 1024
    norm = RmsNorm(random(hidden, dtype=dtype, device=device), 1e-5)
    wide = [
        TritonLinear(random(4096, hidden, dtype=dtype, device=device) / 32, None, CHOICE, gated=True) for _ in range(8)
    ]
    back = [TritonLinear(random(hidden, 2048, dtype=dtype, device=device) / 64, None, CHOICE) for _ in range(8)]
    start = random(rows, hidden, dtype=dtype, device=device)

    def chain(hidden_states: torch.Tensor) -> torch.Tensor:
        for up, down in zip(wide, back, strict=True):
            hidden_states = down(up(hidden_states, norm=norm, activation="silu"), residual=hidden_states)
        return hidden_states

    check_replays(chain, start)


@DTYPES
@pytest.mark.parametrize(("rows", "hidden"), [(1, 576), (7, 4096), (3000, 1024), (2, 16384)])
def test_norms(device: torch.device, dtype: torch.dtype, rows: int, hidden: int) -> None:
    x, residual = (random(rows, hidden, dtype=dtype, device=device) for _ in range(2))
    weight = random(hidden, dtype=dtype, device=device)
    summed = (x.double() + residual.double()).to(dtype)
    assert distance(rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)) < TOLERANCE[dtype]
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert distance(residual, summed.double()) < 1e-4
    assert distance(out, reference.rms_norm(summed.double(), weight.double(), 1e-5)) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    gate, up = (3 * random(300, 1731, dtype=dtype, device=device) for _ in range(2))
    expected = ACTIVATIONS[activation](torch.cat((gate, up), dim=-1).double())
    pairs = torch.stack((gate, up), dim=-1).flatten(1)
    assert distance(gated_pairs(pairs, activation), expected) < TOLERANCE[dtype]
