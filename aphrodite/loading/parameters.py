"""The decoder's parameters: their canonical names and shapes, derived from a `ModelSpec`.

    embed.weight, layers.{i}.attn_norm.weight, layers.{i}.{q,k,v,o}.{weight,bias},
    layers.{i}.{q_norm,k_norm}.weight, layers.{i}.mlp_norm.weight, layers.{i}.{gate,up,down}.{weight,bias},
    norm.weight, head.weight

Families map these names to those of a checkpoint; executors ask for weights by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aphrodite.models.spec import ModelSpec


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, in the order of the forward pass; linear weights are `[out, in]`."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = (
        ("q", q_rows, hidden, spec.qkv_bias),
        ("k", kv_rows, hidden, spec.qkv_bias),
        ("v", kv_rows, hidden, spec.qkv_bias),
        ("o", hidden, q_rows, spec.output_bias),
        ("gate", inner, hidden, spec.mlp_bias),
        ("up", inner, hidden, spec.mlp_bias),
        ("down", hidden, inner, spec.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "attn_norm.weight"] = (hidden,)
        shapes[prefix + "mlp_norm.weight"] = (hidden,)
        if spec.qk_norm:
            shapes[prefix + "q_norm.weight"] = (spec.head_dim,)
            shapes[prefix + "k_norm.weight"] = (spec.head_dim,)
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
    shapes["norm.weight"] = (hidden,)
    if not spec.tied_head:
        shapes["head.weight"] = (spec.vocab_size, hidden)
    return shapes


@dataclass(frozen=True, slots=True)
class NameTable:
    """How one kind of checkpoint names the parameters.

    `top` and `layer` map a canonical module ("embed", "q") to the checkpoint's; `layer_prefix` holds
    `{}` for the layer's number.
    """

    top: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]

    def checkpoint_name(self, canonical: str) -> str:
        """The checkpoint's name of `layers.3.q.weight`, `embed.weight`, …"""
        module, kind = canonical.rsplit(".", 1)
        if not module.startswith("layers."):
            return f"{self.top[module]}.{kind}"
        _, number, module = module.split(".")
        return f"{self.layer_prefix.format(number)}{self.layer[module]}.{kind}"


HF_NAMES = NameTable(
    top={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer_prefix="model.layers.{}.",
    layer={
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)

GGUF_NAMES = NameTable(
    top={"embed": "token_embd", "norm": "output_norm", "head": "output"},
    layer_prefix="blk.{}.",
    layer={
        "attn_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
        "o": "attn_output",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    },
)
