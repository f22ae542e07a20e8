"""Low-rank adapters (arXiv 2106.09685) in torch operations, for the CPU: y += s (x A^T) B^T for the rows that have one.

Rows without an adapter go through the layer as if there were none, bit for bit, and a step in which no row has one
takes no other path than without this module. In float32 a row's result does not depend on the rows beside it.

Cost: 2 rank (in + out) operations a row and module; the rows of a step are gathered once for each adapter in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from aphrodite.layers.activation import Activation
from aphrodite.layers.dense import to_dense
from aphrodite.layers.invariant import decline_invariant, invariant_matmul
from aphrodite.layers.linear import Linear, RmsNorm, unfused
from aphrodite.quantization.types import RawTensor

if TYPE_CHECKING:
    from aphrodite.loading.lora import Adapter


class AdaptedProduct(NamedTuple):
    """The modules that are stacked in one Linear, by the names of `Adapter.pairs`, and the rows of each."""

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


class AdapterRoom(NamedTuple):
    """How many adapters a step may be computed with, and the largest rank that fits."""

    slots: int
    rank: int


class _Pair(NamedTuple):
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float


class _Group(NamedTuple):
    """The rows `[n]` of a step that one adapter computes."""

    pairs: Mapping[str, _Pair]
    rows: torch.Tensor


class TorchAdapters:
    """The adapters of one model on the CPU; slots only point at them. Implements `AdapterStore`."""

    def __init__(self, num_slots: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[int, Mapping[str, _Pair]] = {}
        self.num_slots = num_slots
        self._slots: list[Mapping[str, _Pair]] = [{}] * num_slots
        self._changing = threading.Lock()
        self.groups: list[_Group] = []  # of the step that is being computed

    def add(self, number: int, adapter: Adapter) -> None:
        def dense(raw: RawTensor) -> torch.Tensor:
            return to_dense(raw, self._dtype, torch.device("cpu"))

        pairs = {name: _Pair(dense(pair.a), dense(pair.b), pair.scale) for name, pair in adapter.pairs.items()}
        self._held[number] = pairs

    def remove(self, number: int) -> None:
        pairs = self._held.pop(number)
        with self._changing:
            self._slots = [{} if held is pairs else held for held in self._slots]

    def place(self, slot: int, number: int) -> None:
        with self._changing:
            self._slots = [self._held[number] if at == slot else held for at, held in enumerate(self._slots)]

    @contextmanager
    def step(self, slots: torch.Tensor | None, query_start: torch.Tensor) -> Iterator[None]:
        """While a step is computed: `slots` `[R]` of its sequences, whose token rows `query_start` `[R + 1]` tells."""
        if slots is None:
            yield
            return
        token_slots = slots.repeat_interleave(query_start.diff())
        present = [slot for slot in token_slots.unique().tolist() if slot >= 0]
        self.groups = [_Group(self._slots[slot], (token_slots == slot).nonzero()[:, 0]) for slot in present]
        try:
            yield
        finally:
            self.groups = []

    def wrap(self, linear: Linear, product: AdaptedProduct) -> AdaptedLinear:
        return AdaptedLinear(linear, product, self)


class AdaptedLinear:
    """A Linear, and what the adapters of the current step add to its product."""

    def __init__(self, base: Linear, product: AdaptedProduct, adapters: TorchAdapters) -> None:
        self.base = base
        self.choice = base.choice
        self._product = product
        self._adapters = adapters

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.base.tensors

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._adapters.groups:
            return self.base(x, norm=norm, activation=activation, residual=residual)
        return unfused(self._adapted, x, norm, activation, residual)

    def _adapted(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        for pairs, rows in self._adapters.groups:
            own = x.index_select(0, rows)
            for module, part in zip(self._product.modules, out.split(self._product.rows, dim=1), strict=True):
                pair = pairs.get(module)
                if pair is not None:
                    low = _rows_product(own, pair.a).mul_(pair.scale)
                    part.index_add_(0, rows, _rows_product(low, pair.b))
        return out


def _rows_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, each row as if it were alone where that can be had."""
    if decline_invariant(x.dtype, x.device) is None:
        return invariant_matmul(x.contiguous(), weight)
    return F.linear(x, weight)
