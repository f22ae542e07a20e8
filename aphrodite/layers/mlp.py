"""The feed-forward half of a decoder layer, behind one interface whether it is dense or a mixture of experts."""

from __future__ import annotations

from typing import Protocol

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.activation import Activation
from aphrodite.layers.linear import Linear
from aphrodite.layers.norm import LayerNorm, Norm


class Weighted(Protocol):
    """What was loaded for one product."""

    choice: Choice

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of its tensors, in an order that is the same for every one of one layout and shape."""


class FeedForward(Protocol):
    """Feed-forward block of a layer."""

    @property
    def products(self) -> tuple[Weighted, ...]:
        """All that has weights."""

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None, activation: Activation, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """mlp(norm(x)) + residual.

        Args:
            x: `[T, hidden]`.
            residual: `[T, hidden]`, None for none; its memory may become the result's.

        Returns:
            `[T, hidden]`.
        """


class GatedMlp:
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """`gate_up`: hidden -> 2 * intermediate, gate first; `down`: intermediate -> hidden."""
        self.gate_up = gate_up
        self.down = down

    @property
    def products(self) -> tuple[Weighted, ...]:
        return self.gate_up, self.down

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None, activation: Activation, residual: torch.Tensor | None
    ) -> torch.Tensor:
        return self.down(project(self.gate_up, x, norm, activation), residual=residual)


def project(linear: Linear, x: torch.Tensor, norm: Norm | None, activation: Activation | None = None) -> torch.Tensor:
    """`linear` of the normalised `x`; linear layers fuse RMSNorm, another norm goes before."""
    if isinstance(norm, LayerNorm):
        return linear(norm(x), activation=activation)
    return linear(x, norm=norm, activation=activation)
