"""Mixture of experts on a GPU: router, choice and experts as a few kernels, none of which waits for the host.

Up to `ALONE_TOKENS` tokens every pair of token and expert is computed by itself; more are put together by expert first.
Which it is depends on the number of tokens only, so that steps can be captured in graphs.
"""

from __future__ import annotations

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.expert_weights import ExpertWeights
from aphrodite.kernels.triton.grouped_gemm import (
    ALONE_TOKENS,
    combine,
    experts_of_pairs,
    grouped_product,
    pairs_of_tile,
    scale_by_gate,
    tile_config,
)
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.kernels.triton.routing import choose_experts, group_tokens, router_logits
from aphrodite.layers.activation import Activation
from aphrodite.layers.mlp import GatedMlp, Weighted
from aphrodite.layers.norm import Norm, RmsNorm
from aphrodite.models.spec import MoeSpec


class TritonRouter:
    """The router's product in float32, over operands of the compute type."""

    choice = Choice("router in float32", ())

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        correction: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        exact: bool,
    ) -> None:
        """
        Args:
            weight: `[experts, hidden]` float32.
            bias: `[experts]` float32, of the product.
            correction: `[experts]` float32, added to scores for the choice only.
            dtype: of the activations.
            exact: the weight fits that type; otherwise what it loses is kept as a second weight.
        """
        self.weight = weight.to(dtype)
        self.rest = None if exact else (weight - self.weight.float()).to(dtype)
        self.bias = bias
        self.correction = correction

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        found = (self.weight, self.rest, self.bias, self.correction)
        return tuple(tensor for tensor in found if tensor is not None)

    def __call__(self, x: torch.Tensor, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, hidden]` -> the chosen experts `[T, top_k]` int32 and their weights, alike in float32."""
        return choose_experts(router_logits(x, self.weight, self.rest, self.bias), self.correction, moe)


class TritonExperts:
    """One projection of all experts."""

    def __init__(self, weights: ExpertWeights, choice: Choice) -> None:
        self.weights = weights
        self.choice = choice

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.weights.tensors


class TritonGate:
    """What weighs the shared experts' result: the sigmoid of a product in float32."""

    choice = Choice("gate in float32", ())

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight`: `[1, hidden]` float32."""
        self.weight = weight

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)


class TritonShared:
    """Experts that every token goes to, as one block."""

    def __init__(self, mlp: GatedMlp, gate: TritonGate | None) -> None:
        self.mlp = mlp
        self.gate = gate

    @property
    def products(self) -> tuple[Weighted, ...]:
        return self.mlp.products if self.gate is None else (*self.mlp.products, self.gate)

    def __call__(self, x: torch.Tensor, activation: Activation, residual: torch.Tensor) -> torch.Tensor:
        inner = self.mlp.gate_up(x, activation=activation)
        if self.gate is not None:  # before the last product, which is linear
            inner = scale_by_gate(inner, x, self.gate.weight)
        return self.mlp.down(inner, residual=residual)


class TritonMixture:
    """A layer's experts, behind `FeedForward`'s interface."""

    def __init__(
        self,
        moe: MoeSpec,
        router: TritonRouter,
        gate_up: TritonExperts,
        down: TritonExperts,
        shared: TritonShared | None,
    ) -> None:
        """
        Args:
            gate_up: hidden -> 2 * intermediate, rows of gate and up alternating.
        """
        self._moe = moe
        self._router = router
        self._gate_up = gate_up
        self._down = down
        self._shared = shared

    @property
    def products(self) -> tuple[Weighted, ...]:
        shared = () if self._shared is None else self._shared.products
        return (self._router, self._gate_up, self._down, *shared)

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None, activation: Activation, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """As `FeedForward`."""
        if isinstance(norm, RmsNorm):
            normed = rms_norm(x, norm.weight, norm.eps)
        else:
            normed = x if norm is None else norm(x)
        chosen, weights = self._router(normed, self._moe)
        out = self._routed(normed, chosen, weights, activation, residual)
        return out if self._shared is None else self._shared(normed, activation, out)

    def _routed(
        self,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_up, down = self._gate_up.weights, self._down.weights
        if x.shape[0] <= ALONE_TOKENS:
            return experts_of_pairs(x, chosen, weights, gate_up, down, activation, residual)
        experts, hip = self._moe.num_experts, torch.version.hip is not None
        size = pairs_of_tile(chosen.numel(), experts)
        if x.itemsize == 4:
            size = min(size, 32)
        tiles = group_tokens(chosen, experts, size)
        first, second = (
            tile_config(size, weight.in_features, x.itemsize, weight.packed, hip) for weight in (gate_up, down)
        )
        inner = grouped_product(x, tiles, gate_up, first, activation)
        return combine(grouped_product(inner, tiles, down, second), weights, residual)
