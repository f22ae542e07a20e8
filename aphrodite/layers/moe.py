"""Mixture of experts in torch operations: the router, its choice, and experts that compute the tokens that chose them.

Cost: the weights of the experts that were chosen are read once each, however many tokens chose them; the others are
not touched. In float32 on the CPU a token's result does not depend on the others: products are batch-invariant, and
the experts' results are added in the order of the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from aphrodite.layers.activation import Activation
from aphrodite.layers.linear import Linear
from aphrodite.layers.mlp import GatedMlp, Weighted
from aphrodite.layers.norm import Norm
from aphrodite.models.spec import MoeSpec

_TINY = 1e-20  # keeps sums of scores above 0, as DeepSeek-V3 does


class Routing(NamedTuple):
    """Which experts a token goes to, best first, and what their results are multiplied by."""

    experts: torch.Tensor  # [T, top_k] int64
    weights: torch.Tensor  # [T, top_k] float32


def route(logits: torch.Tensor, correction: torch.Tensor | None, moe: MoeSpec) -> Routing:
    """The router's choice; of experts with equal scores the first.

    Args:
        logits: `[T, experts]` float32.
        correction: `[experts]` float32, added for the choice only.
    """
    if moe.scoring == "sigmoid":
        scores = 1.0 / torch.exp(-logits).add_(1.0)
    else:
        scores = logits if moe.scoring == "softmax_of_chosen" else logits.softmax(dim=-1)
    wanted = scores if correction is None else scores + correction
    if moe.top_groups < moe.num_groups:
        wanted = _of_best_groups(wanted, moe)
    chosen = _best(wanted, moe.top_k)
    weights = scores.gather(1, chosen)
    if moe.scoring == "softmax_of_chosen":
        weights = weights.softmax(dim=-1)
    if moe.normalize:
        weights = weights / (_in_order(weights)[:, None] + _TINY)
    return Routing(chosen, weights * moe.weight_scale)


def _of_best_groups(wanted: torch.Tensor, moe: MoeSpec) -> torch.Tensor:
    """`wanted`, -inf for experts of groups that are not among the best."""
    grouped = wanted.view(wanted.shape[0], moe.num_groups, -1)
    best = grouped.amax(dim=-1) if moe.group_score == "max" else _in_order(grouped.topk(2, dim=-1).values)
    barred = torch.ones_like(best, dtype=torch.bool).scatter_(1, _best(best, moe.top_groups), value=False)
    return grouped.masked_fill(barred[..., None], float("-inf")).flatten(1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest along the last dimension, equal ones by their index, which topk does not promise."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Sums over the few values of the last dimension, in their order whatever the number of rows."""
    total = values[..., 0]
    for index in range(1, values.shape[-1]):
        total = total + values[..., index]
    return total


class SharedExperts:
    """Experts that every token goes to, as one block; `gate`, hidden -> 1, weighs them where the family has it."""

    def __init__(self, mlp: GatedMlp, gate: Linear | None) -> None:
        self.mlp = mlp
        self.gate = gate

    @property
    def products(self) -> tuple[Weighted, ...]:
        return self.mlp.products if self.gate is None else (*self.mlp.products, self.gate)

    def __call__(self, x: torch.Tensor, activation: Activation, residual: torch.Tensor) -> torch.Tensor:
        """`x` `[T, hidden]`, normalised; the result takes in `residual`."""
        inner = self.mlp.gate_up(x, activation=activation)
        if self.gate is not None:  # before the last product, which is linear, there is less to multiply
            inner = inner * (1.0 / torch.exp(-self.gate(x.float())).add_(1.0)).to(inner.dtype)
        return self.mlp.down(inner, residual=residual)


class MixtureOfExperts:
    """A layer's experts on the host, one Linear pair each, so that every layout of weights serves."""

    def __init__(
        self,
        moe: MoeSpec,
        router: Linear,
        correction: torch.Tensor | None,
        experts: Sequence[GatedMlp],
        shared: SharedExperts | None,
    ) -> None:
        """
        Args:
            router: hidden -> experts, float32.
            correction: `[experts]` float32.
        """
        self._moe = moe
        self._router = router
        self._correction = correction
        self._experts = tuple(experts)
        self._shared = shared

    @property
    def products(self) -> tuple[Weighted, ...]:
        shared = () if self._shared is None else self._shared.products
        return (self._router, *(product for expert in self._experts for product in expert.products), *shared)

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None, activation: Activation, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """As `FeedForward`; waits for the device, for it is made for the host."""
        normed = x if norm is None else norm(x)
        routing = route(self._router(normed.float()), self._correction, self._moe)
        out = self._routed(normed, routing, activation)
        if residual is not None:
            out = residual + out
        return out if self._shared is None else self._shared(normed, activation, out)

    def _routed(self, x: torch.Tensor, routing: Routing, activation: Activation) -> torch.Tensor:
        top_k = self._moe.top_k
        results = x.new_empty(x.shape[0] * top_k, x.shape[1])
        for expert, pairs in _by_expert(routing.experts):
            inner = self._experts[expert].gate_up(x.index_select(0, pairs // top_k), activation=activation)
            results[pairs] = self._experts[expert].down(inner)
        weighted = results.view(-1, top_k, x.shape[1]).float() * routing.weights[..., None]
        return _in_order(weighted.transpose(1, 2)).to(x.dtype)


def _by_expert(experts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that was chosen and its (token, choice) pairs, numbers into the flattened `[T, top_k]`."""
    flat = experts.flatten()
    order = flat.sort(stable=True).indices
    found, counts = flat.unique(return_counts=True)
    yield from zip(found.tolist(), order.split(counts.tolist()), strict=True)
