"""The feed-forward half of a decoder layer, behind one interface whether it is dense or a mixture of experts."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.activation import Activation
from aphrodite.layers.linear import Linear
from aphrodite.layers.norm import LayerNorm, Norm, RmsNorm


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


@runtime_checkable
class HandsOn(Protocol):
    """A Linear that may hand its result to another in a form of their own, which saves converting it."""

    def hands_on(self, x: torch.Tensor) -> bool:
        """Whether that is so for as many rows as `x` `[T, in]` has."""

    def hand_on(self, x: torch.Tensor, norm: RmsNorm | None, activation: Activation) -> Any:
        """act(norm(x) W^T + b)."""

    def of_handed_on(self, x: Any, residual: torch.Tensor) -> torch.Tensor:
        """x W^T + b + residual."""


class GatedMlp:
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """`gate_up`: hidden -> 2 * intermediate, gate first; `down`: intermediate -> hidden."""
        self.gate_up = gate_up
        self.down = down
        self._handing: tuple[HandsOn, HandsOn] | None = None
        if isinstance(gate_up, HandsOn) and isinstance(down, HandsOn):
            self._handing = gate_up, down

    @property
    def products(self) -> tuple[Weighted, ...]:
        return self.gate_up, self.down

    def __call__(
        self, x: torch.Tensor, *, norm: Norm | None, activation: Activation, residual: torch.Tensor | None
    ) -> torch.Tensor:
        if self._handing is not None and residual is not None:
            gate_up, down = self._handing
            if gate_up.hands_on(x) and down.hands_on(x):
                x, before = (norm(x), None) if isinstance(norm, LayerNorm) else (x, norm)
                return down.of_handed_on(gate_up.hand_on(x, before, activation), residual)
        return self.down(project(self.gate_up, x, norm, activation), residual=residual)


def project(linear: Linear, x: torch.Tensor, norm: Norm | None, activation: Activation | None = None) -> torch.Tensor:
    """`linear` of the normalised `x`; linear layers fuse RMSNorm, another norm goes before."""
    if isinstance(norm, LayerNorm):
        return linear(norm(x), activation=activation)
    return linear(x, norm=norm, activation=activation)
