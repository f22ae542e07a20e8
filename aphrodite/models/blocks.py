"""A decoder layer, by where its norms and residual additions stand (`ModelSpec.block`).

Each block is a function from the residual stream `[rows, hidden]` before a layer to that behind it. Of the last layer
only the rows whose logits are wanted are needed once keys and values have been written: `keep` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from aphrodite.attention.backend import StepAttention
from aphrodite.layers.activation import Activation
from aphrodite.layers.mlp import project
from aphrodite.models.spec import BlockKind
from aphrodite.models.weights import LayerWeights

# (index of the layer, its weights, residual stream, attention, activation, rows to keep) -> residual stream
Block = Callable[[int, LayerWeights, torch.Tensor, StepAttention, Activation, torch.Tensor | None], torch.Tensor]


def pre_norm_block(
    index: int,
    layer: LayerWeights,
    residual: torch.Tensor,
    attention: StepAttention,
    activation: Activation,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """Llama's: x + attention(norm(x)), then x + mlp(norm(x)); additions are part of the products before them."""
    attended, residual = _kept(keep, _attended(index, layer, residual, attention), residual)
    residual = layer.o(attended, residual=residual)
    return layer.mlp(residual, norm=layer.mlp_norm, activation=activation, residual=residual)


def post_norm_block(
    index: int,
    layer: LayerWeights,
    residual: torch.Tensor,
    attention: StepAttention,
    activation: Activation,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """x + norm(attention(x)), then x + norm(mlp(x)); inputs are normalised, too, where the layer has such norms."""
    if layer.attn_post_norm is None or layer.mlp_post_norm is None:
        raise RuntimeError(f"layer {index} was loaded without the norms that stand behind its parts")
    attended, residual = _kept(keep, _attended(index, layer, residual, attention), residual)
    residual = residual + layer.attn_post_norm(layer.o(attended))
    return residual + layer.mlp_post_norm(
        layer.mlp(residual, norm=layer.mlp_norm, activation=activation, residual=None)
    )


def parallel_block(
    index: int,
    layer: LayerWeights,
    residual: torch.Tensor,
    attention: StepAttention,
    activation: Activation,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """x + attention(norm(x)) + mlp(norm(x)), of one norm."""
    if layer.attn_norm is None:
        raise RuntimeError(f"layer {index} was loaded without its norm")
    normed = layer.attn_norm(residual)
    attended, normed, residual = _kept(
        keep, attention(index, _heads_normed(layer, layer.qkv(normed))), normed, residual
    )
    residual = layer.o(attended, residual=residual)
    return layer.mlp(normed, norm=None, activation=activation, residual=residual)


BLOCKS: Mapping[BlockKind, Block] = {
    "pre_norm": pre_norm_block,
    "post_norm": post_norm_block,
    "sandwich": post_norm_block,
    "parallel": parallel_block,
}


def _kept(keep: torch.Tensor | None, *rows: torch.Tensor) -> Sequence[torch.Tensor]:
    return rows if keep is None else [tensor.index_select(0, keep) for tensor in rows]


def _attended(index: int, layer: LayerWeights, x: torch.Tensor, attention: StepAttention) -> torch.Tensor:
    return attention(index, _heads_normed(layer, project(layer.qkv, x, layer.attn_norm)))


def _heads_normed(layer: LayerWeights, qkv: torch.Tensor) -> torch.Tensor:
    return qkv if layer.qk_norm is None else layer.qk_norm(qkv)
