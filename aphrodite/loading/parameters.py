"""The decoder's parameters: their canonical names and shapes, derived from a `ModelSpec`.

    embed.weight, layers.{i}.attn_norm.{weight,bias}, layers.{i}.{q,k,v,o}.{weight,bias},
    layers.{i}.{q_norm,k_norm}.weight, layers.{i}.attn_post_norm.{weight,bias}, layers.{i}.mlp_norm.{weight,bias},
    layers.{i}.{gate,up,down}.{weight,bias}, layers.{i}.mlp_post_norm.{weight,bias}, norm.{weight,bias}, head.weight

Attention sinks are layers.{i}.sinks.weight `[heads]`. A layer with experts has, instead of gate, up and down,

    layers.{i}.router.{weight,bias} `[experts, hidden]`, layers.{i}.router.correction `[experts]`,
    layers.{i}.expert_{gate,up,down}.{weight,bias} `[experts, out, in]`,
    layers.{i}.shared_{gate,up,down}.weight, layers.{i}.shared_router.weight `[1, hidden]`

Latent attention has, instead of q, k and v,

    layers.{i}.q.weight, or layers.{i}.{q_a,q_a_norm,q_b}.weight, and layers.{i}.{kv_a,kv_a_norm}.weight,
    layers.{i}.k_b.weight `[heads, kv_lora_rank, qk_nope_head_dim]`,
    layers.{i}.v_b.weight `[heads, v_head_dim, kv_lora_rank]`

Families map these names to those of a checkpoint; executors ask for weights by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec

HEAD_PLACEHOLDER = "{head}"
EXPERT_PLACEHOLDER = "{expert}"


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, in the order of the forward pass; linear weights are `[out, in]`."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    feed_forward = (
        ("gate", inner, hidden, spec.mlp_bias),
        ("up", inner, hidden, spec.mlp_bias),
        ("down", hidden, inner, spec.mlp_bias),
    )
    before, behind = spec.block != "post_norm", spec.block in ("post_norm", "sandwich")
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab_size, hidden)}

    def add_norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if spec.norm_bias:
            shapes[f"{name}.bias"] = (hidden,)

    def add_linears(prefix: str, linears: tuple[tuple[str, int, int, bool], ...]) -> None:
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)

    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}."
        if before:
            add_norm(prefix + "attn_norm")
        if before and spec.block != "parallel":
            add_norm(prefix + "mlp_norm")
        if spec.qk_norm:
            shapes[prefix + "q_norm.weight"] = _head_norm_shape(spec, spec.num_heads)
            shapes[prefix + "k_norm.weight"] = _head_norm_shape(spec, spec.num_kv_heads)
        if spec.mla is None:
            add_linears(prefix, _attention(spec))
        else:
            shapes.update((prefix + name, shape) for name, shape in _latent_shapes(spec, spec.mla))
        if spec.attention_sinks:
            shapes[prefix + "sinks.weight"] = (spec.num_heads,)
        moe = spec.moe_of(layer)
        if moe is None:
            add_linears(prefix, feed_forward)
        else:
            shapes.update((prefix + name, shape) for name, shape in _moe_shapes(moe, hidden))
        if behind:
            add_norm(prefix + "attn_post_norm")
            add_norm(prefix + "mlp_post_norm")
    add_norm("norm")
    if not spec.tied_head:
        shapes["head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _attention(spec: ModelSpec) -> tuple[tuple[str, int, int, bool], ...]:
    """Projections of grouped-query attention: name, rows, columns, whether there is a bias."""
    hidden, q_rows, kv_rows = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return (
        ("q", q_rows, hidden, spec.qkv_bias),
        ("k", kv_rows, hidden, spec.qkv_bias),
        ("v", kv_rows, hidden, spec.qkv_bias),
        ("o", hidden, q_rows, spec.output_bias),
    )


def _latent_shapes(spec: ModelSpec, mla: MlaSpec) -> list[tuple[str, tuple[int, ...]]]:
    """Projections of latent attention."""
    hidden, heads = spec.hidden_size, spec.num_heads
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if mla.q_lora_rank is None:
        shapes.append(("q.weight", (heads * mla.head_dim, hidden)))
    else:
        shapes.append(("q_a.weight", (mla.q_lora_rank, hidden)))
        shapes.append(("q_a_norm.weight", (mla.q_lora_rank,)))
        shapes.append(("q_b.weight", (heads * mla.head_dim, mla.q_lora_rank)))
    shapes.append(("kv_a.weight", (mla.latent_dim, hidden)))
    shapes.append(("kv_a_norm.weight", (mla.kv_lora_rank,)))
    shapes.append(("k_b.weight", (heads, mla.kv_lora_rank, mla.qk_nope_head_dim)))
    shapes.append(("v_b.weight", (heads, mla.v_head_dim, mla.kv_lora_rank)))
    shapes.append(("o.weight", (hidden, heads * mla.v_head_dim)))
    return shapes


def _moe_shapes(moe: MoeSpec, hidden: int) -> list[tuple[str, tuple[int, ...]]]:
    """A layer's experts and their router."""
    experts, inner, shared = moe.num_experts, moe.intermediate_size, moe.shared_intermediate_size
    shapes: list[tuple[str, tuple[int, ...]]] = [("router.weight", (experts, hidden))]
    if moe.router_bias:
        shapes.append(("router.bias", (experts,)))
    if moe.correction_bias:
        shapes.append(("router.correction", (experts,)))
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        shapes.append((f"expert_{name}.weight", (experts, rows, columns)))
        if moe.expert_bias:
            shapes.append((f"expert_{name}.bias", (experts, rows)))
    if shared:
        shapes += [("shared_gate.weight", (shared, hidden)), ("shared_up.weight", (shared, hidden))]
        shapes.append(("shared_down.weight", (hidden, shared)))
        if moe.shared_gate:
            shapes.append(("shared_router.weight", (1, hidden)))
    return shapes


def _head_norm_shape(spec: ModelSpec, heads: int) -> tuple[int, ...]:
    if spec.head_norm == "width":
        return (heads * spec.head_dim,)
    return (heads, spec.head_dim) if spec.head_norm == "each_head" else (spec.head_dim,)


@dataclass(frozen=True, slots=True)
class NameTable:
    """How one kind of checkpoint names the parameters.

    `top` and `layer` map a canonical module ("embed", "q") to the checkpoint's; `layer_prefix` holds `{}` for the
    layer's number. Canonical modules with the same name in the checkpoint are stacked there in one tensor, in the order
    of the table. A name with `{head}` or `{expert}` stands for one tensor a head, or an expert. A key with a dot, as
    "router.correction", is a parameter whose name in the checkpoint is given in full.
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
        prefix, whole = self.layer_prefix.format(number), self.layer.get(f"{module}.{kind}")
        return f"{prefix}{self.layer[module]}.{kind}" if whole is None else prefix + whole

    def renamed(self, names: Mapping[str, str] | None = None, **layer: str) -> NameTable:
        """This table with other names of some modules of a layer; `names` for keys that are no identifiers."""
        return NameTable(self.top, self.layer_prefix, {**self.layer, **(names or {}), **layer})


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
        "q_a": "self_attn.q_a_proj",
        "q_a_norm": "self_attn.q_a_layernorm",
        "q_b": "self_attn.q_b_proj",
        "kv_a": "self_attn.kv_a_proj_with_mqa",
        "kv_a_norm": "self_attn.kv_a_layernorm",
        "k_b": "self_attn.kv_b_proj",
        "v_b": "self_attn.kv_b_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "router": "mlp.gate",
        "router.correction": "mlp.gate.e_score_correction_bias",
        "expert_gate": "mlp.experts.{expert}.gate_proj",
        "expert_up": "mlp.experts.{expert}.up_proj",
        "expert_down": "mlp.experts.{expert}.down_proj",
        "shared_gate": "mlp.shared_experts.gate_proj",
        "shared_up": "mlp.shared_experts.up_proj",
        "shared_down": "mlp.shared_experts.down_proj",
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
        "q_a": "attn_q_a",
        "q_a_norm": "attn_q_a_norm",
        "q_b": "attn_q_b",
        "kv_a": "attn_kv_a_mqa",
        "kv_a_norm": "attn_kv_a_norm",
        "k_b": "attn_k_b",
        "v_b": "attn_v_b",
        "o": "attn_output",
        "attn_post_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "sinks": "attn_sinks",
        "router": "ffn_gate_inp",
        "router.correction": "exp_probs_b.bias",
        "expert_gate": "ffn_gate_exps",
        "expert_up": "ffn_up_exps",
        "expert_down": "ffn_down_exps",
        "shared_gate": "ffn_gate_shexp",
        "shared_up": "ffn_up_shexp",
        "shared_down": "ffn_down_shexp",
        "shared_router": "ffn_gate_inp_shexp",
        "mlp_post_norm": "post_ffw_norm",
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one kind of checkpoint keeps a family's parameters, where that is not how the decoder wants them.

    Attributes:
        interleaved: rows of q and k pair neighbouring dimensions for rotary embedding, not the two halves of a head.
        grouped_qkv: the rows of stacked q, k and v go by KV head: its query heads, its key, its value.
        alternating_experts: the rows of stacked gate and up of an expert alternate.
        transposed_experts: dense matrices of experts are `[experts, in, out]`; packed ones are not.
        norm_offset: norms' weights are stored less this.
    """

    names: NameTable
    interleaved: bool = False
    grouped_qkv: bool = False
    alternating_experts: bool = False
    transposed_experts: bool = False
    norm_offset: float = 0.0


HF_STORAGE = Storage(names=HF_NAMES)
GGUF_STORAGE = Storage(names=GGUF_NAMES)
