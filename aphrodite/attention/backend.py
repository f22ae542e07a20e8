"""The one interface between the decoder and attention, and the choice of who serves it.

A back end owns the layout of the paged KV cache. Once a step it sees the step's inputs and returns a
callable that serves all layers; whatever depends on the step and not on the layer is worked out there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from aphrodite.runner.inputs import ForwardInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What a back end must support: the model's heads, the cache's blocks, dtype and device of both."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def bytes_per_block(self) -> int:
        """K and V of one block over all layers."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size


class KVCache(NamedTuple):
    """Keys and values of all layers; the first dimension is the layer, the rest is the back end's own."""

    keys: torch.Tensor
    values: torch.Tensor


class StepAttention(Protocol):
    """Attention of one step."""

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Write K and V of this step's tokens, then attend.

        Args:
            layer: index of the layer.
            query: `[rows, heads, head_dim]`, rotated; rows beyond the step's T tokens are padding.
            key, value: `[rows, kv_heads, head_dim]`, key rotated.
            window: latest positions that a query sees, itself included; None for all.

        Returns:
            `[rows, heads * head_dim]`; padding rows are finite and otherwise meaningless.
        """


class AttentionBackend(Protocol):
    """A way to compute attention over a paged cache."""

    name: str

    def allocate(self, num_blocks: int) -> KVCache:
        """A zeroed cache of `num_blocks` blocks for every layer."""

    def begin_step(self, inputs: ForwardInputs, cache: KVCache) -> StepAttention:
        """Prepare a step."""
