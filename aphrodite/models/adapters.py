"""Where adapters (`loading/lora.py`) meet the decoder: the projections that they may add to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from aphrodite.layers.linear import Linear
from aphrodite.layers.lora import AdaptedProduct
from aphrodite.layers.mlp import GatedMlp
from aphrodite.models.spec import ModelSpec
from aphrodite.models.weights import DecoderWeights, LayerWeights

Wrap = Callable[[Linear, AdaptedProduct], Linear]


def with_adapters(spec: ModelSpec, weights: DecoderWeights, wrap: Wrap) -> DecoderWeights:
    """`weights` with every projection that may have an adapter replaced by what `wrap` makes of it."""
    layers = tuple(_adapted(spec, index, layer, wrap) for index, layer in enumerate(weights.layers))
    return replace(weights, layers=layers)


def adapted_products(spec: ModelSpec, layer: int) -> dict[str, AdaptedProduct]:
    """The Linears of a layer that may have adapters: of "qkv", "o", "gate_up" and "down" those that it has."""
    prefix, hidden = f"layers.{layer}.", spec.hidden_size
    products: dict[str, AdaptedProduct] = {}
    if spec.mla is None:
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        products["qkv"] = AdaptedProduct((prefix + "q", prefix + "k", prefix + "v"), (queries, keys, keys), hidden)
        products["o"] = AdaptedProduct((prefix + "o",), (hidden,), queries)
    else:
        products["o"] = AdaptedProduct((prefix + "o",), (hidden,), spec.num_heads * spec.mla.v_head_dim)
    if spec.moe_of(layer) is None:
        inner = spec.intermediate_size
        products["gate_up"] = AdaptedProduct((prefix + "gate", prefix + "up"), (inner, inner), hidden)
        products["down"] = AdaptedProduct((prefix + "down",), (hidden,), inner)
    return products


def _adapted(spec: ModelSpec, index: int, layer: LayerWeights, wrap: Wrap) -> LayerWeights:
    products = adapted_products(spec, index)
    mlp = layer.mlp
    if isinstance(mlp, GatedMlp):
        mlp = GatedMlp(wrap(mlp.gate_up, products["gate_up"]), wrap(mlp.down, products["down"]))
    qkv = wrap(layer.qkv, products["qkv"]) if "qkv" in products else layer.qkv
    return replace(layer, qkv=qkv, o=wrap(layer.o, products["o"]), mlp=mlp)
