"""Routing, grouped products and TritonMixture against plain torch in float64, under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from experts_case import Experts, distance, expected_mixture, make_experts

from aphrodite.kernels.triton import grouped_gemm
from aphrodite.kernels.triton.grouped_gemm import PairConfig
from aphrodite.kernels.triton.routing import choose_experts, group_tokens, router_logits
from aphrodite.layers.expert_stack import stack_experts
from aphrodite.layers.moe import route
from aphrodite.layers.norm import RmsNorm
from aphrodite.models.spec import MoeSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor

SPECS = {
    "softmax": MoeSpec(num_experts=12, top_k=3, intermediate_size=1),
    "normalized": MoeSpec(num_experts=12, top_k=3, intermediate_size=1, normalize=True, weight_scale=2.5),
    "chosen": MoeSpec(num_experts=12, top_k=4, intermediate_size=1, scoring="softmax_of_chosen"),
    "sigmoid": MoeSpec(num_experts=12, top_k=3, intermediate_size=1, scoring="sigmoid", correction_bias=True),
    "groups": MoeSpec(num_experts=12, top_k=3, intermediate_size=1, num_groups=4, top_groups=2),
    "groups by two": MoeSpec(
        num_experts=15, top_k=3, intermediate_size=1, scoring="sigmoid", num_groups=3, top_groups=2,
        group_score="top2_sum", correction_bias=True, normalize=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("moe", SPECS.values(), ids=SPECS.keys())
def test_choice_equals_the_plain_one_and_ties_go_to_the_first(moe: MoeSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-3, 4, (9, moe.num_experts), generator=generator).float()
    correction = torch.randint(-2, 3, (moe.num_experts,), generator=generator) / 8 if moe.correction_bias else None
    chosen, weights = choose_experts(logits, correction, moe)
    expected = route(logits, correction, moe)
    assert chosen.tolist() == expected.experts.tolist()
    torch.testing.assert_close(weights, expected.weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("rest", [False, True])
def test_router_makes_float32_of_16_bit_operands(tokens: int, rest: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((tokens, 72), generator=generator).half()
    exact = torch.randn((20, 72), generator=generator)
    weight = exact.half()
    bias = torch.randn(20, generator=generator)
    lost = (exact - weight.float()).half() if rest else None
    logits = router_logits(x, weight, lost, bias)
    expected = x.double() @ (exact if rest else weight).double().T + bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tokens", "tile"), [(1, 16), (7, 16), (300, 32), (600, 128)])
def test_tokens_are_grouped_by_expert_in_their_order(tokens: int, tile: int) -> None:
    experts, top_k = 11, 3
    scores = torch.rand((tokens, experts), generator=torch.Generator().manual_seed(3))
    scores[:, 4] = 0.0  # nobody's
    chosen = scores.topk(top_k).indices.int()
    tiles = group_tokens(chosen, experts, tile)
    used = tiles.experts >= 0
    assert used.tolist() == sorted(used.tolist(), reverse=True)
    found = {expert: [] for expert in range(experts)}
    for expert, start, end in zip(*(table[used].tolist() for table in tiles[1:4]), strict=True):
        assert 0 < end - start <= tile
        found[expert] += tiles.order[start:end].tolist()
    flat = chosen.flatten().numpy()
    assert found == {expert: np.flatnonzero(flat == expert).tolist() for expert in range(experts)}
    assert sum(map(len, found.values())) == tokens * top_k


@pytest.mark.parametrize("kind", ["dense", "shared", "mxfp4"])
@pytest.mark.parametrize("tokens", [2, 7])
def test_mixture_equals_float64(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    check(make_experts(kind, torch.float16), tokens)


@pytest.mark.parametrize("kind", ["dense", "int4"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_mixture_is_exact_in_float32(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    check(make_experts(kind, torch.float32), tokens)


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aphrodite.layers.triton_moe.pairs_of_tile", lambda pairs, experts: 64)
    check(make_experts("dense", torch.float16), 40)


@pytest.mark.parametrize(
    ("kind", "hidden", "tokens"),
    [("int4", 288, 6), ("q4_k", 256, 1), ("q6_k", 256, 5), ("iq1_m", 256, 5)],
)
def test_packed_rows_of_several_chunks(kind: str, hidden: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Super-blocks, groups shorter than a run, and scales that are loaded a chunk ahead."""
    monkeypatch.setattr(grouped_gemm, "pair_config", lambda out, columns, packed: PairConfig(128, 128, 4))
    check(make_experts(kind, torch.float16, hidden=hidden, count=2), tokens)


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each."""
    monkeypatch.setattr(grouped_gemm, "pair_config", lambda out, columns, packed: PairConfig(32, 64, 4))


def check(experts: Experts, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn((tokens, experts.hidden), generator=generator).to(experts.dtype)
    norm = RmsNorm(torch.rand(experts.hidden, generator=generator).to(experts.dtype) + 0.5, 1e-5)
    residual = torch.randn(x.shape, generator=generator).to(experts.dtype)
    expected = expected_mixture(experts, x, norm, residual)
    actual = experts.mixture(x, norm=norm, activation=experts.activation, residual=residual.clone())
    assert distance(actual, expected) < experts.tolerance
    alone = expected_mixture(experts, x, None, None)
    assert distance(experts.mixture(x, norm=None, activation=experts.activation, residual=None), alone) < (
        experts.tolerance
    )


def test_a_token_alone_and_among_others_chooses_alike() -> None:
    experts = make_experts("dense", torch.float32)
    x = torch.randn((9, experts.hidden), generator=torch.Generator().manual_seed(7))
    together = experts.mixture(x, norm=None, activation="silu", residual=None)
    alone = experts.mixture(x[5:6], norm=None, activation="silu", residual=None)
    assert distance(alone, together[5:6].double()) < 1e-6


def test_config_of_pairs_fits_every_shape() -> None:
    for shape in ((1536, 2048), (2048, 768), (5760, 2880), (2880, 2880), (28672, 4096), (4096, 14336)):
        cut = grouped_gemm.pair_config(*shape, False)
        assert cut.rows % 2 == 0
        assert cut.chunk & (cut.chunk - 1) == 0


def test_tiles_hold_the_average_expert() -> None:
    assert [grouped_gemm.pairs_of_tile(pairs, 8) for pairs in (1, 64, 100, 500, 4096)] == [16, 16, 32, 64, 128]


def test_experts_of_a_checkpoint_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    random = np.random.default_rng(5)
    experts, hidden, inner = 3, 64, 32
    values = {part: random.standard_normal((experts, inner, hidden)).astype(np.float32) for part in ("gate", "up")}
    dense = [
        RawTensor(part, x.shape, QuantType.F32, x.reshape(-1, hidden).view(np.uint8)) for part, x in values.items()
    ]
    apart = [StackedTensor(raw.name, [raw.part(expert) for expert in range(experts)]) for raw in dense]
    blocks = random.integers(0, 256, (experts * hidden, 17), dtype=np.uint8)
    blocks[:, 0] = 120
    down = RawTensor("down", (experts, hidden, inner), QuantType.MXFP4, blocks)
    bias = RawTensor("bias", (experts, inner), QuantType.F32, values["up"][:, :, 0].copy().view(np.uint8))
    device = torch.device("cpu")
    for parts in (dense, apart):
        stacked = stack_experts(parts, [bias, bias], torch.float32, device)
        assert torch.equal(stacked.weights.weight[:, 0::2], torch.from_numpy(values["gate"]))
        assert torch.equal(stacked.weights.weight[:, 1::2], torch.from_numpy(values["up"]))
        assert stacked.weights.bias.tolist() == np.repeat(values["up"][:, :, 0], 2, axis=1).tolist()
    halved = stack_experts(dense, [], torch.float32, device, fp8=True)
    assert halved.choice.name == "experts in fp8"
    assert halved.weights.tensors[0].nbytes == experts * 2 * inner * hidden
    x = torch.from_numpy(random.standard_normal((1, hidden)).astype(np.float32))
    out = grouped_gemm.grouped_product(
        x, group_tokens(torch.tensor([[2]], dtype=torch.int32), experts, 16), halved.weights,
        grouped_gemm.tile_config(16, hidden, 4, True),
    )  # fmt: skip
    for number, exact in enumerate(values.values()):
        assert distance(out[0, number::2], torch.from_numpy(exact[2]).double() @ x[0].double()) < 0.04
    packed = stack_experts([down], [], torch.float32, device)
    assert packed.choice.name == "packed experts"
    tiles = group_tokens(torch.tensor([[1], [2]], dtype=torch.int32), experts, 16)
    x = torch.from_numpy(random.standard_normal((2, inner)).astype(np.float32))
    out = grouped_gemm.grouped_product(x, tiles, packed.weights, grouped_gemm.tile_config(16, inner, 4, True))
    expected = torch.from_numpy(dequantize(down)).double()[[1, 2]] @ x.double()[:, :, None]
    assert distance(out, expected[:, :, 0]) < 2e-6
