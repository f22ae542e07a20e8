"""Latent attention (DeepSeek-V2's MLA, arXiv 2405.04434): what its back ends must support, and what they are given.

The step's input is `[rows, heads * head_dim + latent_dim]`: every head's query, whose last `qk_rope_head_dim`
dimensions turn, then the latent of the token's keys and values and the part of the key that turns, which all heads
share. A back end normalises the latent, turns both parts, writes one vector of `latent_dim` to the cache and returns
`[rows, heads * v_head_dim]`.

Attention over the cache is "absorbed": a query that was taken to the latent meets the cached vectors themselves, as
one key that all heads share, of which the first `kv_lora_rank` dimensions are also the value; the attended latent
becomes a value afterwards. With softmax in between this is the same as expanding keys and values first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from aphrodite.attention.backend import KVCache
from aphrodite.models.spec import MlaSpec

GROUP_POSITIONS = 65_536  # of contexts that a GPU expands together, unless a single one is longer
EXPANDED_BYTES = 256 << 20  # that their keys and values may take at once, unless one head needs more


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """What a back end must support: heads and their sizes, the cache's blocks, dtypes of both, the device.

    Attributes:
        scale: of the scores, positive.
    """

    num_layers: int
    num_heads: int
    mla: MlaSpec
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    scale: float

    @property
    def bytes_per_block(self) -> int:
        """Latents of one block over all layers."""
        return self.num_layers * self.mla.latent_dim * self.cache_dtype.itemsize * self.block_size

    def allocate(self, num_blocks: int) -> KVCache:
        """A cache `[layers, num_blocks, block_size, latent_dim]`, of whose vectors the beginning is also the value."""
        size = (self.num_layers, num_blocks, self.block_size, self.mla.latent_dim)
        cache = torch.zeros(size, dtype=self.cache_dtype, device=self.device)
        return KVCache(cache, cache[..., : self.mla.kv_lora_rank])


class LatentTransform(NamedTuple):
    """What becomes of queries, latents and attended latents, layer by layer.

    Attributes:
        cos, sin: `[max_model_len, qk_rope_head_dim / 2]` float32, as in `RotaryTable`.
        norms: `[kv_lora_rank]` a layer, RMSNorm of the latent.
        norm_eps: of these norms.
        key_up: `[heads, kv_lora_rank, qk_nope_head_dim]` a layer.
        value_up: `[heads, v_head_dim, kv_lora_rank]` a layer.
        query_scales: `[max_model_len]` float32, factor of a query by its position, None for none.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    norms: tuple[torch.Tensor, ...]
    norm_eps: float
    key_up: tuple[torch.Tensor, ...]
    value_up: tuple[torch.Tensor, ...]
    query_scales: torch.Tensor | None = None

    def scales_at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """`[T, 1]` float32, the queries' factors at `positions` `[T]`, None for none."""
        return None if self.query_scales is None else self.query_scales.index_select(0, positions)[:, None]
