"""Small mixtures of experts for kernels, and what they come to in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.expert_weights import ExpertWeights
from aphrodite.layers.activation import Activation
from aphrodite.layers.mlp import GatedMlp
from aphrodite.layers.norm import RmsNorm
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.layers.triton_moe import TritonExperts, TritonGate, TritonMixture, TritonRouter, TritonShared
from aphrodite.models.spec import MoeSpec
from aphrodite.quantization.layouts import GgufBlocks, Int4Groups, PackedLayout
from aphrodite.quantization.noise import noise_blocks
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

LAYERS = ("dense", "shared", "mxfp4", "int4")
GGUF_LAYERS = ("q4_k", "q6_k", "iq2_xs", "iq3_s", "iq1_m", "tq1_0")
DTYPES = (torch.float16, torch.float32)
CHOICE = Choice("test", ())


@dataclass(frozen=True)
class Experts:
    """A mixture and its weights in float64: gate and up `[experts, 2 * intermediate, hidden]` alternating."""

    moe: MoeSpec
    mixture: TritonMixture
    activation: Activation
    dtype: torch.dtype
    hidden: int
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor
    down_bias: torch.Tensor
    shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # gate over up, down, gate of the result

    @property
    def tolerance(self) -> float:
        return 2e-6 if self.dtype == torch.float32 else 2e-3


def make_experts(
    kind: str,
    dtype: torch.dtype,
    *,
    hidden: int = 96,
    inner: int = 32,
    count: int = 5,
    device: str = "cpu",
) -> Experts:
    """A layer with experts of a kind of LAYERS."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    moe = MoeSpec(
        num_experts=count,
        top_k=2,
        intermediate_size=inner,
        normalize=True,
        router_bias=kind == "mxfp4",
        shared_intermediate_size=24 if kind == "shared" else 0,
    )
    if kind in GGUF_LAYERS:  # whole super-blocks
        hidden, inner = 256, 256
    sizes = ((2 * inner, hidden), (hidden, inner))
    made = [_weights(kind, dtype, random(count, *size) / size[1] ** 0.5, device) for size in sizes]
    biases = [random(count, size[0]) if kind == "mxfp4" else torch.zeros(count, size[0]) for size in sizes]
    packed = [
        TritonExperts(replace(weights, bias=bias.to(device) if kind == "mxfp4" else None), CHOICE)
        for (weights, _), bias in zip(made, biases, strict=True)
    ]
    router_bias = random(count).to(device) if moe.router_bias else None
    router = TritonRouter(random(count, hidden).to(device), router_bias, None, dtype=dtype, exact=False)
    shared, parts = None, None
    if kind == "shared":
        first, second, last = random(48, hidden) / hidden**0.5, random(hidden, 24) / 5, random(1, hidden) / hidden**0.5
        parts = (first.to(dtype), second.to(dtype), last.to(dtype))
        mlp = GatedMlp(
            TritonLinear(parts[0].to(device), None, CHOICE, gated=True), TritonLinear(parts[1].to(device), None, CHOICE)
        )
        shared = TritonShared(mlp, TritonGate(parts[2].float().to(device)))
    return Experts(
        moe,
        TritonMixture(moe, router, packed[0], packed[1], shared),
        "swiglu_oai" if kind == "mxfp4" else "silu",
        dtype,
        hidden,
        made[0][1],
        made[1][1],
        biases[0].double(),
        biases[1].double(),
        parts,
    )


def _weights(kind: str, dtype: torch.dtype, values: torch.Tensor, device: str) -> tuple[ExpertWeights, torch.Tensor]:
    """Weights near `values` `[experts, out, in]`, and what they stand for in float64."""
    if kind in ("dense", "shared"):
        dense = values.to(dtype)
        return ExpertWeights(dense.to(device), len(values)), dense.double()
    layout = _packed(kind, values.flatten(0, 1))
    planes = planes_of(layout.to(torch.device(device)))
    return ExpertWeights(planes, len(values), is_e2m1=kind == "mxfp4"), (
        layout.dequantize().double().view(values.shape)
    )


def _packed(kind: str, values: torch.Tensor) -> PackedLayout:
    if kind in GGUF_LAYERS[2:]:
        qtype = QuantType[kind.upper()]
        return GgufBlocks(noise_blocks(qtype, (values.shape[0], values.shape[1]), 0.06, 3, torch.device("cpu")), qtype)
    generator = torch.Generator().manual_seed(values.shape[0])
    if kind in ("mxfp4", "q4_k", "q6_k"):
        qtype = {"mxfp4": QuantType.MXFP4, "q4_k": QuantType.Q4_K, "q6_k": QuantType.Q6_K}[kind]
        rows, blocks = values.shape[0], values.shape[1] // qtype.block_size
        data = torch.randint(0, 256, (rows, blocks, qtype.block_bytes), generator=generator, dtype=torch.uint8)
        small = torch.full((rows, blocks, 1), 5e-4).half().view(torch.uint8)
        if kind == "mxfp4":
            data[..., 0] = 120 + data[..., 0] % 4  # the exponent
        elif kind == "q4_k":
            data[..., :2] = data[..., 2:4] = small
        else:
            data[..., -2:] = small
        return GgufBlocks(data.flatten(1), qtype)
    groups = (values.shape[0], values.shape[1] // 32)
    codes = torch.randint(0, 256, (values.shape[0], values.shape[1] // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=generator) / 32 + 0.01).half()
    return Int4Groups(codes, scales, torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8), 32)


def expected_mixture(
    experts: Experts, x: torch.Tensor, norm: RmsNorm | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """In float64, with the kernels' own choice (which is tested by itself)."""
    x = x.cpu()
    normed = x.double()
    if norm is not None:
        weight = norm.weight.cpu().double()
        normed = normed / torch.sqrt(normed.square().mean(-1, keepdim=True) + norm.eps) * weight
        normed = normed.to(x.dtype).double()  # as the norm's kernel leaves it
    router = experts.mixture.products[0]
    assert isinstance(router, TritonRouter)
    device = router.weight.device
    chosen, weights = router(normed.to(x.dtype).to(device), experts.moe)
    out = torch.zeros_like(normed) if residual is None else residual.cpu().double()
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            pairs = experts.gate_up[expert] @ normed[token] + experts.gate_up_bias[expert]
            inner = _activated(pairs[0::2], pairs[1::2], experts.activation)
            out[token] += weight * (experts.down[expert] @ inner + experts.down_bias[expert])
    if experts.shared is not None:
        gate_up, down, gate = (part.cpu().double() for part in experts.shared)
        first, second = (normed @ gate_up.T).chunk(2, dim=-1)
        out += torch.sigmoid(normed @ gate.T) * (_activated(first, second, "silu") @ down.T)
    return out


def _activated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return gate * torch.sigmoid(gate) * up


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((actual.cpu().double() - expected).norm() / expected.norm())
