"""The decoder: one forward pass for every family that a ModelSpec describes.

Works on ragged token rows `[rows, hidden]`. Shapes depend on the number of rows only and nothing waits
for the device, so that an accelerator can capture it as a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from aphrodite.attention.backend import StepAttention
from aphrodite.layers.activation import gated_activation
from aphrodite.layers.rotary import rotary_tables
from aphrodite.models.spec import ModelSpec
from aphrodite.models.weights import DecoderWeights, LayerWeights


class Decoder:
    """A pre-norm transformer decoder with rotary, grouped-query attention and a gated feed-forward block."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, max_model_len: int) -> None:
        """Tables of the rotary embedding reach to `max_model_len`; later positions must not be asked for."""
        self.spec = spec
        self.weights = weights
        cos, sin = rotary_tables(spec.rotary, max_model_len)
        device = weights.embed.device
        self._cos = torch.from_numpy(cos).to(device)
        self._sin = torch.from_numpy(sin).to(device)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids, positions: `[rows]` integers; rows beyond the step's tokens are padding.
            attention: writes this step's K and V, then attends.

        Returns:
            `[rows, hidden]` of the compute dtype.
        """
        residual = F.embedding(token_ids, self.weights.embed)
        cos = self._cos.index_select(0, positions)[:, None]  # [rows, 1, dim / 2]
        sin = self._sin.index_select(0, positions)[:, None]
        for index, layer in enumerate(self.weights.layers):
            residual = residual + self._attention(index, layer, residual, cos, sin, attention)
            residual = residual + self._feed_forward(layer, residual)
        return self._norm(residual, self.weights.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[L, hidden]` -> `[L, vocab]` float32."""
        return self.weights.head(hidden).float()

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        residual: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: StepAttention,
    ) -> torch.Tensor:
        spec = self.spec
        qkv = layer.qkv(self._norm(residual, layer.attn_norm)).view(residual.shape[0], -1, spec.head_dim)
        rotated = spec.num_heads + spec.num_kv_heads
        query_key = _rotate(qkv[:, :rotated], cos, sin)
        query, key = query_key[:, : spec.num_heads], query_key[:, spec.num_heads :]
        return layer.o(attention(index, query, key, qkv[:, rotated:], spec.windows[index]))

    def _feed_forward(self, layer: LayerWeights, residual: torch.Tensor) -> torch.Tensor:
        gate_up = layer.gate_up(self._norm(residual, layer.mlp_norm))
        return layer.down(gated_activation(gate_up, self.spec.activation))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + dim / 2) of `[rows, heads, head_dim]` in float32; the rest passes through."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
