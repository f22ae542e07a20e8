"""Mixtures of experts on the GPU against float64: routing, single pairs, grouped tiles, dense and packed weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton"))

from experts_case import GGUF_LAYERS, LAYERS, distance, expected_mixture, make_experts

from aphrodite.kernels.triton.routing import choose_experts, group_tokens
from aphrodite.layers.moe import route
from aphrodite.layers.norm import RmsNorm
from aphrodite.models.spec import MoeSpec

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 9e-3}


@pytest.mark.parametrize("kind", LAYERS + GGUF_LAYERS)
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (4, torch.bfloat16), (33, torch.bfloat16)])
def test_mixture(device: torch.device, kind: str, tokens: int, dtype: torch.dtype) -> None:
    check(device, kind, tokens, dtype, hidden=256, inner=160)


@pytest.mark.parametrize("kind", ["dense", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [2, 40])
def test_other_types(device: torch.device, kind: str, dtype: torch.dtype, tokens: int) -> None:
    check(device, kind, tokens, dtype, hidden=288, inner=96)


@pytest.mark.parametrize("kind", ["dense", "int4", "mxfp4"])
@pytest.mark.parametrize("tokens", [60, 130, 300])
def test_larger_tiles(device: torch.device, kind: str, tokens: int) -> None:
    check(device, kind, tokens, torch.bfloat16, hidden=192, inner=64)


def check(device: torch.device, kind: str, tokens: int, dtype: torch.dtype, *, hidden: int, inner: int) -> None:
    experts = make_experts(kind, dtype, hidden=hidden, inner=inner, device=str(device))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, experts.hidden), generator=generator).to(dtype)
    norm = RmsNorm((torch.rand(experts.hidden, generator=generator) + 0.5).to(dtype).to(device), 1e-5)
    residual = torch.randn(x.shape, generator=generator).to(dtype)
    expected = expected_mixture(experts, x, norm, residual)
    actual = experts.mixture(
        x.to(device), norm=norm, activation=experts.activation, residual=residual.clone().to(device)
    )
    assert actual.dtype == dtype
    assert distance(actual, expected) < TOLERANCE[dtype]


def test_equal_inputs_give_equal_results(device: torch.device) -> None:
    experts = make_experts("dense", torch.bfloat16, device=str(device))
    x = torch.randn((64, experts.hidden), device=device).bfloat16()
    first, second = (experts.mixture(x, norm=None, activation="silu", residual=None) for _ in range(2))
    assert torch.equal(first, second)
    order = torch.randperm(64, device=device)
    shuffled = experts.mixture(x[order], norm=None, activation="silu", residual=None)
    assert torch.equal(shuffled, first[order])


def test_steps_can_be_captured(device: torch.device) -> None:
    experts = make_experts("shared", torch.bfloat16, device=str(device))
    x = torch.randn((16, experts.hidden), device=device).bfloat16()
    expected = experts.mixture(x, norm=None, activation="silu", residual=None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts.mixture(x, norm=None, activation="silu", residual=None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, experts.mixture(x, norm=None, activation="silu", residual=None))
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [1, 77, 5000])
def test_choice_and_grouping(device: torch.device, tokens: int) -> None:
    moe = MoeSpec(
        num_experts=160, top_k=6, intermediate_size=1, num_groups=8, top_groups=3, scoring="sigmoid",
        group_score="top2_sum", correction_bias=True, normalize=True, weight_scale=16.0,
    )  # fmt: skip
    logits = torch.randint(-20, 20, (tokens, 160)).float() / 4
    correction = torch.randint(-4, 5, (160,)) / 8
    chosen, weights = choose_experts(logits.to(device), correction.to(device), moe)
    expected = route(logits, correction, moe)
    # Sigmoids of the two devices may differ in their last bit, which turns a tie around.
    assert (chosen.cpu() == expected.experts).float().mean() > 0.99
    torch.testing.assert_close(weights.cpu().sum(1), expected.weights.sum(1), rtol=1e-5, atol=0)
    tiles = group_tokens(chosen, 160, 32)
    flat = chosen.flatten().long()
    assert torch.equal(tiles.order.long(), flat.sort(stable=True).indices)
    used = tiles.experts >= 0
    assert int((tiles.ends - tiles.starts)[used].sum()) == tokens * 6
    assert torch.equal(flat[tiles.order[tiles.starts[used]].long()], tiles.experts[used].long())
