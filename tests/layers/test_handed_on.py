"""Feed-forward blocks whose first product hands its result to the second in a form of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.activation import Activation
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.mlp import GatedMlp
from aphrodite.layers.norm import LayerNorm


class Product:
    """Adds; what it hands on is a string with the number in it."""

    choice = Choice("adding", ())
    tensors: tuple[torch.Tensor, ...] = ()

    def __init__(self, added: float, most_rows: int) -> None:
        self.added = added
        self.most_rows = most_rows
        self.calls: list[str] = []

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.calls.append("plain")
        return (x if norm is None else norm(x)) + self.added + (0.0 if residual is None else residual)

    def hands_on(self, x: torch.Tensor) -> bool:
        return len(x) <= self.most_rows

    def hand_on(self, x: torch.Tensor, norm: RmsNorm | None, activation: Activation) -> Any:
        self.calls.append("handed on")
        return str(float(((x if norm is None else norm(x)) + self.added)[0, 0]))

    def of_handed_on(self, x: Any, residual: torch.Tensor) -> torch.Tensor:
        self.calls.append("taken")
        return residual + float(x) + self.added


@pytest.mark.parametrize("norm", [None, RmsNorm(torch.ones(1), 0.0), LayerNorm(torch.ones(1), torch.ones(1), 1e-5)])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_both_have_to_agree(rows: int, norm: RmsNorm | LayerNorm | None) -> None:
    first, second = Product(10.0, 2), Product(100.0, 1)
    x, residual = torch.full((rows, 1), 4.0), torch.full((rows, 1), 1000.0)
    normed = 4.0 if norm is None else 1.0
    out = GatedMlp(first, second)(x, norm=norm, activation="silu", residual=residual)
    torch.testing.assert_close(out, torch.full((rows, 1), 1110.0 + normed))
    handed = rows == 1
    assert (first.calls, second.calls) == ((["handed on"], ["taken"]) if handed else (["plain"], ["plain"]))


def test_without_a_residual_nothing_is_handed_on() -> None:
    first, second = Product(10.0, 2), Product(100.0, 2)
    out = GatedMlp(first, second)(torch.ones(1, 1), norm=None, activation="silu", residual=None)
    assert float(out) == 111.0
    assert (first.calls, second.calls) == (["plain"], ["plain"])
