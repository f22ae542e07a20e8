"""The decoder: one forward pass for every family that a ModelSpec describes.

Works on ragged token rows `[rows, hidden]`. Shapes depend on the number of rows only and nothing waits
for the device, so that an accelerator can capture it as a graph.
"""

from __future__ import annotations

import torch

from aphrodite.attention.backend import AttentionShape, QueryKeyTransform, RotaryTable, StepAttention
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.attention.softcap import soft_cap
from aphrodite.layers.mlp import project
from aphrodite.layers.rotary import query_scales, rotary_tables
from aphrodite.models.blocks import BLOCKS
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.models.weights import DecoderWeights


class Decoder:
    """A transformer decoder with grouped-query attention and gated feed-forward blocks."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights
        self._block = BLOCKS[spec.block]

    def forward(
        self, token_ids: torch.Tensor, attention: StepAttention, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states before the final norm.

        Args:
            token_ids: `[rows]` integers; rows beyond the step's tokens are padding.
            attention: all that lies between a layer's qkv product and its output product.
            keep: `[L]` integers, the rows to return; None for all.

        Returns:
            `[rows, hidden]` or `[L, hidden]` of the compute dtype.
        """
        residual = self.weights.embed(token_ids)
        if self.spec.embedding_scale != 1.0:
            residual = residual * self.spec.embedding_scale
        for index, layer in enumerate(self.weights.visit_layers()):
            kept = keep if index == self.spec.num_layers - 1 else None
            residual = self._block(index, layer, residual, attention, self.spec.activation, kept)
        return residual

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[H, hidden]` of `forward` -> the same behind the final norm, for embeddings."""
        normed = self.weights.norm(hidden)
        # The norm's weight holds the scale of logits, which only the output head should see.
        return normed if self.spec.logit_scale == 1.0 else normed / self.spec.logit_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[L, hidden]` of `forward` -> `[L, vocab]` of the compute dtype."""
        logits = project(self.weights.head, hidden, self.weights.norm)
        return soft_cap(logits, self.spec.logit_softcap) if self.spec.logit_softcap else logits


def attention_shape(
    spec: ModelSpec, *, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device
) -> AttentionShape | LatentShape:
    """What an attention back end must support to serve the model."""
    if spec.mla is not None:
        return LatentShape(
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            mla=spec.mla,
            block_size=block_size,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
            scale=spec.query_scale,
        )
    return AttentionShape(
        windows=spec.windows,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
        query_scale=spec.query_scale,
        softcap=spec.attention_softcap,
    )


def attention_transform(
    spec: ModelSpec, weights: DecoderWeights, max_model_len: int
) -> QueryKeyTransform | LatentTransform:
    """What the attention back end does to queries, keys and latents; tables reach to `max_model_len` positions."""
    device = weights.embed.device
    if spec.mla is not None:
        latents = [layer.latent for layer in weights.layers if layer.latent is not None]
        return LatentTransform(
            *_table(spec.rotary, spec.rotary.dim, max_model_len, device),
            norms=tuple(latent.norm for latent in latents),
            norm_eps=spec.mla.norm_eps,
            key_up=tuple(latent.key_up for latent in latents),
            value_up=tuple(latent.value_up for latent in latents),
            query_scales=_query_scales(spec, max_model_len, device),
        )
    tables: dict[RotarySpec | None, RotaryTable] = {}
    for layer in range(spec.num_layers):
        rotary = spec.rotary_of(layer)
        if rotary not in tables:
            tables[rotary] = _table(rotary, spec.rotary.dim, max_model_len, device)
    return QueryKeyTransform(
        *tables[spec.rotary_of(0)],
        query_norms=tuple(layer.q_norm for layer in weights.layers if layer.q_norm is not None),
        key_norms=tuple(layer.k_norm for layer in weights.layers if layer.k_norm is not None),
        norm_eps=spec.norm_eps,
        query_scales=_query_scales(spec, max_model_len, device),
        layer_tables=tuple(tables[rotary] for rotary in spec.layer_rotaries),
        sinks=tuple(layer.sinks for layer in weights.layers if layer.sinks is not None),
    )


def _query_scales(spec: ModelSpec, max_model_len: int, device: torch.device) -> torch.Tensor | None:
    scales = query_scales(spec, max_model_len)
    return None if scales is None else torch.from_numpy(scales).to(device)


def _table(rotary: RotarySpec | None, dim: int, max_model_len: int, device: torch.device) -> RotaryTable:
    """Tables of a layer; one without positions turns by nothing, so that all layers are served alike."""
    if rotary is None:
        ones = torch.ones((max_model_len, dim // 2), dtype=torch.float32, device=device)
        return RotaryTable(ones, torch.zeros_like(ones))
    return RotaryTable(*(torch.from_numpy(table).to(device) for table in rotary_tables(rotary, max_model_len)))
