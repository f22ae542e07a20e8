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
    """What a back end must support: the model's heads, the cache's blocks, dtypes of both, the device.

    Attributes:
        windows: an entry a layer: how many latest positions a query sees, itself included; None for all.
        query_scale: of the scores; None means 1 / sqrt(head_dim).
        softcap: c where scores become c * tanh(score / c); 0 for none.
    """

    windows: tuple[int | None, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    query_scale: float | None = None
    softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5) if self.query_scale is None else self.query_scale

    @property
    def bytes_per_block(self) -> int:
        """K and V of one block over all layers."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.cache_dtype.itemsize
        return per_token * self.block_size


class KVCache(NamedTuple):
    """Keys and values of all layers; the first dimension is the layer, the rest is the back end's own."""

    keys: torch.Tensor
    values: torch.Tensor


class RotaryTable(NamedTuple):
    """`[max_model_len, rotated / 2]` float32: pairs (i, i + rotated / 2) of the first `rotated` dimensions of a head
    turn by their position's angle (arXiv 2104.09864)."""

    cos: torch.Tensor
    sin: torch.Tensor


class QueryKeyTransform(NamedTuple):
    """What becomes of a layer's queries and keys before they meet: a norm for each head, if any, then rotation.

    Attributes:
        cos, sin: as `RotaryTable`, of every layer unless there are `layer_tables`.
        query_norms, key_norms: a weight `[head_dim]` a layer, or empty where the model has none.
        norm_eps: of these norms.
        layer_tables: one a layer where layers turn by different angles; layers that turn alike share theirs.
        sinks: `[heads]` float32 a layer, scores that take part in the softmax of each head and add no value, or empty
            where the model has none.
        query_scales: `[max_model_len]` float32, factor of a query by its position, None for none; not beside norms.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_norms: tuple[torch.Tensor, ...] = ()
    key_norms: tuple[torch.Tensor, ...] = ()
    norm_eps: float = 0.0
    layer_tables: tuple[RotaryTable, ...] = ()
    sinks: tuple[torch.Tensor, ...] = ()
    query_scales: torch.Tensor | None = None

    def table(self, layer: int) -> RotaryTable:
        """The table of a layer."""
        return self.layer_tables[layer] if self.layer_tables else RotaryTable(self.cos, self.sin)

    def scales_at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """`[T, 1]` float32, the queries' factors at `positions` `[T]`, None for none."""
        return None if self.query_scales is None else self.query_scales.index_select(0, positions)[:, None]


class StepAttention(Protocol):
    """Attention of one step."""

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Transform queries and keys, write K and V of this step's tokens, then attend.

        Args:
            layer: index of the layer.
            qkv: `[rows, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values; it may be overwritten. Rows
                beyond the step's T tokens are padding.

        Returns:
            `[rows, heads * head_dim]`; padding rows are finite and otherwise meaningless.
        """


class AttentionBackend(Protocol):
    """A way to compute attention over a paged cache."""

    name: str

    def allocate(self, num_blocks: int) -> KVCache:
        """A zeroed cache of `num_blocks` blocks for every layer."""

    def begin_step(self, inputs: ForwardInputs, cache: KVCache) -> StepAttention:
        """Prepare a step; `positions` may have rows beyond the step's T tokens, which are padding."""
