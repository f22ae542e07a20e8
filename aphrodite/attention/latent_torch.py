"""Latent attention in torch ops, always absorbed: one shared key a position, so the products are those of grouped
attention with a single KV head.

Cost per decode step: a context's vectors are read once and written and read once more as a dense copy, for all heads
together. Prompts cost 2 * (latent_dim + kv_lora_rank) operations a head and visible pair, which is more than expanded
keys would, but a row's result is the same however its prompt was cut.
"""

from __future__ import annotations

import torch

from aphrodite.attention.backend import AttentionShape, KVCache, QueryKeyTransform, StepAttention
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.torch_paged import (
    SdpaAttention,
    TiledAttention,
    fold_queries,
    gather_slots,
    rotate,
    unfold_queries,
)
from aphrodite.layers.mla import heads_product
from aphrodite.layers.norm import RmsNorm
from aphrodite.runner.inputs import ForwardInputs


class TorchLatentAttention:
    """Over a cache `[layers, blocks, block_size, latent_dim]`; batch-invariant where `TiledAttention` serves."""

    def __init__(self, shape: LatentShape, transform: LatentTransform) -> None:
        self.shape = shape
        self.transform = transform
        grouped = AttentionShape(
            windows=(None,) * shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=1,
            head_dim=shape.mla.latent_dim,
            block_size=shape.block_size,
            dtype=shape.dtype,
            cache_dtype=shape.cache_dtype,
            device=shape.device,
            query_scale=shape.scale,
        )
        unused = QueryKeyTransform(transform.cos, transform.sin)  # queries arrive transformed
        tiled = TiledAttention.decline(grouped) is None
        self.core = TiledAttention(grouped, unused) if tiled else SdpaAttention(grouped, unused)
        self.name = f"{self.core.name}, latent"

    def allocate(self, num_blocks: int) -> KVCache:
        return self.shape.allocate(num_blocks)

    def begin_step(self, inputs: ForwardInputs, cache: KVCache) -> StepAttention:
        return _LatentStep(self, inputs, cache)


class _LatentStep:
    """One step's attention; see `StepAttention` and the step's input in attention/latent.py."""

    def __init__(self, backend: TorchLatentAttention, inputs: ForwardInputs, cache: KVCache) -> None:
        self._backend = backend
        self._cache = cache
        self._slots = inputs.slot_mapping
        self._planner = backend.core.plan_step(inputs)
        transform = backend.transform
        self._query_scales = transform.scales_at(inputs.positions)
        self._cos, self._sin = (
            table.index_select(0, inputs.positions)[:, None] for table in (transform.cos, transform.sin)
        )

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        shape, mla = self._backend.shape, self._backend.shape.mla
        rows, width = qkv.shape[0], shape.num_heads * mla.head_dim
        if self._query_scales is not None:
            qkv[:, :width].mul_(self._query_scales)
        query = qkv[:, :width].view(rows, shape.num_heads, mla.head_dim)
        cache = self._cache.keys[layer]
        cached = self._vectors(layer, qkv[:, width:])[: self._slots.shape[0]]
        cache.flatten(0, 1).index_copy_(0, self._slots, cached)
        query = self._absorbed(layer, query)
        attended = query.new_zeros(rows, shape.num_heads * mla.kv_lora_rank)
        for group in self._planner.groups(None):
            keys = gather_slots(cache[None], group)
            values = keys[..., : mla.kv_lora_rank].contiguous()
            out = self._backend.core.attend(fold_queries(query, group, 1), keys, values, group)
            attended.index_copy_(0, group.query_rows[: group.num_queries], unfold_queries(out, group, shape.num_heads))
        attended = attended.view(rows, shape.num_heads, mla.kv_lora_rank)
        return heads_product(attended, self._backend.transform.value_up[layer]).reshape(rows, -1)

    def _vectors(self, layer: int, latent: torch.Tensor) -> torch.Tensor:
        """`[rows, latent_dim]`: what is cached."""
        transform, rank = self._backend.transform, self._backend.shape.mla.kv_lora_rank
        normed = RmsNorm(transform.norms[layer], transform.norm_eps)(latent[:, :rank].contiguous())
        turned = rotate(latent[:, None, rank:], self._cos, self._sin)
        return torch.cat((normed, turned[:, 0]), dim=1)

    def _absorbed(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """`[rows, heads, latent_dim]` of `[rows, heads, head_dim]`."""
        nope = self._backend.shape.mla.qk_nope_head_dim
        absorbed = heads_product(query[..., :nope], self._backend.transform.key_up[layer])
        return torch.cat((absorbed, rotate(query[..., nope:], self._cos, self._sin)), dim=-1)
