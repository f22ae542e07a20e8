"""Low-rank adapters on a GPU, around whatever Linear a layer has (`kernels/triton/lora.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import numpy as np
import torch

from aphrodite.kernels.triton.activation import Activation
from aphrodite.kernels.triton.launch import next_power_of_2
from aphrodite.kernels.triton.lora import LEAST_RANK, AdapterStack, add_adapters, gated_groups, result_blocks
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.layers.dense import to_dense
from aphrodite.layers.linear import Linear, RmsNorm
from aphrodite.layers.lora import AdaptedProduct, AdapterRoom

if TYPE_CHECKING:
    from aphrodite.loading.lora import Adapter


class GpuLinear(Linear, Protocol):
    """A Linear on a GPU that can leave out its activation."""

    def unactivated(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """x W^T + b of a gated weight `[T, 2 * inner]`, and how its columns lie: so many of gate, as many of up, and so
        on; 0 for all gates, then all ups."""


class _Held(NamedTuple):
    """What an adapter puts into a layer's stack, in pinned host memory; no matrices where it adds nothing."""

    a: torch.Tensor | None  # [parts * rank, in]
    b: torch.Tensor | None  # [out, rank]
    scales: torch.Tensor  # [parts] float32


class DeviceAdapters:
    """The adapters of one model: all in host memory, those in slots on the device, too. Implements `AdapterStore`.

    Attributes:
        tiles: rows of the step that is being computed, by adapter; None where none has one.
    """

    def __init__(self, room: AdapterRoom, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = room.slots
        self._rank = max(LEAST_RANK, next_power_of_2(room.rank))
        self._dtype = dtype
        self._device = device
        self._stacks: dict[AdaptedProduct, AdapterStack] = {}
        self._held: dict[int, Mapping[AdaptedProduct, _Held]] = {}
        self.tiles: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the slots on the device."""
        return sum(tensor.nbytes for stack in self._stacks.values() for tensor in (stack.a, stack.b, stack.scales))

    def add(self, number: int, adapter: Adapter) -> None:
        self._held[number] = {product: self._hold(product, adapter) for product in self._stacks}

    def remove(self, number: int) -> None:
        del self._held[number]  # what lies in a slot stays until another takes it

    def place(self, slot: int, number: int) -> None:
        """Copies behind all steps that were launched before."""
        for product, held in self._held[number].items():
            stack = self._stacks[product]
            for target, source in ((stack.a, held.a), (stack.b, held.b)):
                if source is None:
                    target[slot].zero_()
                else:
                    target[slot].copy_(source, non_blocking=True)
            stack.scales[slot].copy_(held.scales, non_blocking=True)

    @contextmanager
    def step(self, tiles: torch.Tensor | None) -> Iterator[None]:
        """While a step is computed whose rows have the adapters that `tiles` (`adapter_tiles`) names."""
        self.tiles = tiles
        try:
            yield
        finally:
            self.tiles = None

    def wrap(self, linear: Linear, product: AdaptedProduct) -> AdaptedGpuLinear:
        parts, out = len(product.rows), sum(product.rows)
        shapes = ((self.num_slots, parts * self._rank, product.columns), (self.num_slots, out, self._rank))
        a, b = (torch.zeros(shape, dtype=self._dtype, device=self._device) for shape in shapes)
        stack = self._stacks[product] = AdapterStack(
            a,
            b,
            torch.zeros((self.num_slots, parts), dtype=torch.float32, device=self._device),
            torch.from_numpy(result_blocks(product.rows)).to(self._device),
            self._rank,
        )
        return AdaptedGpuLinear(linear, stack, self)

    def _hold(self, product: AdaptedProduct, adapter: Adapter) -> _Held:
        pairs = [adapter.pairs.get(module) for module in product.modules]
        scales = torch.tensor([0.0 if pair is None else pair.scale for pair in pairs], dtype=torch.float32)
        if not any(pairs):
            return _Held(None, None, self._pinned(scales))
        host = torch.device("cpu")
        a = torch.zeros((len(pairs) * self._rank, product.columns), dtype=self._dtype)
        b = torch.zeros((sum(product.rows), self._rank), dtype=self._dtype)
        first = np.cumsum([0, *product.rows])
        for part, pair in enumerate(pairs):
            if pair is not None:
                a[part * self._rank : part * self._rank + pair.rank] = to_dense(pair.a, self._dtype, host)
                b[first[part] : first[part + 1], : pair.rank] = to_dense(pair.b, self._dtype, host)
        return _Held(self._pinned(a), self._pinned(b), self._pinned(scales))

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


class AdaptedGpuLinear:
    """A Linear, and what the adapters of the current step add to its product."""

    def __init__(self, base: Linear, stack: AdapterStack, adapters: DeviceAdapters) -> None:
        self.base = base
        self.choice = base.choice
        self._stack = stack
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
        """act(norm(x) W^T + b + adapter(norm(x))) + residual; the result takes residual's place."""
        tiles = self._adapters.tiles
        if tiles is None:
            return self.base(x, norm=norm, activation=activation, residual=residual)
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        if activation is None:
            out = self.base(x, residual=residual)
            add_adapters(x, out, tiles, self._stack)
            return out
        product, group = cast(GpuLinear, self.base).unactivated(x)
        add_adapters(x, product, tiles, self._stack, group)
        out = gated_groups(product, activation, group)
        return out if residual is None else residual.add_(out)
