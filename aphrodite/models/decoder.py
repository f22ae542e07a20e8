"""The decoder: one forward pass for every family that a ModelSpec describes.

Works on ragged token rows `[rows, hidden]`. Shapes depend on the number of rows only and nothing waits
for the device, so that an accelerator can capture it as a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aphrodite.attention.backend import QueryKeyTransform, StepAttention
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.rotary import rotary_tables
from aphrodite.models.spec import ModelSpec
from aphrodite.models.weights import DecoderWeights, LayerWeights


class Decoder:
    """A pre-norm transformer decoder with grouped-query attention and a gated feed-forward block."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights

    def forward(self, token_ids: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Hidden states before the final norm.

        Args:
            token_ids: `[rows]` integers; rows beyond the step's tokens are padding.
            attention: all that lies between a layer's qkv product and its output product.

        Returns:
            `[rows, hidden]` of the compute dtype.
        """
        residual = F.embedding(token_ids, self.weights.embed)
        for index, layer in enumerate(self.weights.visit_layers()):
            residual = self._layer(index, layer, residual, attention)
        return residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[L, hidden]` of `forward` -> `[L, vocab]` of the compute dtype."""
        return self.weights.head(hidden, norm=RmsNorm(self.weights.norm, self.spec.norm_eps))

    def _layer(self, index: int, layer: LayerWeights, residual: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        eps = self.spec.norm_eps
        qkv = layer.qkv(residual, norm=RmsNorm(layer.attn_norm, eps))
        residual = layer.o(attention(index, qkv), residual=residual)
        gated = layer.gate_up(residual, norm=RmsNorm(layer.mlp_norm, eps), activation=self.spec.activation)
        return layer.down(gated, residual=residual)


def query_key_transform(spec: ModelSpec, weights: DecoderWeights, max_model_len: int) -> QueryKeyTransform:
    """What the attention back end does to queries and keys; tables reach to `max_model_len` positions."""
    cos, sin = (torch.from_numpy(table).to(weights.embed.device) for table in rotary_tables(spec.rotary, max_model_len))
    return QueryKeyTransform(
        cos,
        sin,
        query_norms=tuple(layer.q_norm for layer in weights.layers if layer.q_norm is not None),
        key_norms=tuple(layer.k_norm for layer in weights.layers if layer.k_norm is not None),
        norm_eps=spec.norm_eps,
    )
