"""A Llama in numpy float64 and random tiny checkpoints for it, to hold the native executor against."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from k_blocks import MADE, random_blocks

from aphrodite.layers.rotary import rotary_tables
from aphrodite.models.spec import ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.types import QuantType, RawTensor

_NORMS = {
    "pre_norm": ("attn_norm", "mlp_norm"),
    "post_norm": ("attn_post_norm", "mlp_post_norm"),
    "sandwich": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"),
    "parallel": ("attn_norm",),
}


def tiny_spec(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 203,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "max_position": 512,
        "rotary": RotarySpec(dim=16),
        "windows": (None, None, None),
    }
    return ModelSpec(**{**sizes, **changes})


def tiny_weights(spec: ModelSpec, types: Mapping[str, QuantType] | QuantType) -> dict[str, RawTensor]:
    """Random weights; `types` by the part's name ("q", "embed", ...), all others Q4_1."""
    generator = np.random.default_rng(9)
    weights = {}

    def add(name: str, rows: int, columns: int) -> None:
        part = name.split(".")[-2].removeprefix("expert_").removeprefix("shared_")
        qtype = types if isinstance(types, QuantType) else types.get(part, QuantType.Q4_1)
        qtype = QuantType.F32 if part == "router" else qtype
        if qtype in MADE:
            weights[name] = random_blocks(qtype, (rows, columns), 1.5 / columns**0.5, seed=len(weights), name=name)
            return
        values = (generator.standard_normal((rows, columns)) * 1.5 / columns**0.5).astype(np.float32)
        data = np.ascontiguousarray(gguf.quantize(values, gguf.GGMLQuantizationType(qtype.gguf_id)))
        weights[name] = RawTensor(name, (rows, columns), qtype, data.view(np.uint8).reshape(rows, -1))

    def add_vector(name: str, size: int, center: float) -> None:
        values = (center + 0.3 * generator.standard_normal(size)).astype(np.float32)
        weights[name] = RawTensor(name, (size,), QuantType.F32, values.view(np.uint8).reshape(1, -1))

    def add_norm(name: str) -> None:
        add_vector(f"{name}.weight", spec.hidden_size, 1.0)
        if spec.norm_bias:
            add_vector(f"{name}.bias", spec.hidden_size, 0.0)

    def add_stack(name: str, count: int, rows: int, columns: int) -> None:
        add(name, count * rows, columns)
        flat = weights[name]
        weights[name] = RawTensor(name, (count, rows, columns), flat.qtype, flat.data)

    def add_experts(prefix: str, moe: MoeSpec) -> None:
        add(f"{prefix}router.weight", moe.num_experts, hidden)
        for part, there in (("bias", moe.router_bias), ("correction", moe.correction_bias)):
            if there:
                add_vector(f"{prefix}router.{part}", moe.num_experts, 0.0)
        experts, width = moe.num_experts, moe.intermediate_size
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            add_stack(f"{prefix}expert_{part}.weight", experts, rows, columns)
            if moe.expert_bias:
                add_vector(f"{prefix}expert_{part}.bias", experts * rows, 0.0)
                vector = weights[f"{prefix}expert_{part}.bias"]
                data = vector.data.reshape(experts, -1)
                weights[vector.name] = RawTensor(vector.name, (experts, rows), vector.qtype, data)
        if moe.shared_intermediate_size:
            width = moe.shared_intermediate_size
            for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                add(f"{prefix}shared_{part}.weight", rows, columns)
        if moe.shared_gate:
            add(f"{prefix}shared_router.weight", 1, hidden)

    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes = {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows)}
    dense = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    biased = {**dict.fromkeys("qkv", spec.qkv_bias), "o": spec.output_bias}
    add("embed.weight", spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        moe = spec.moe_of(layer)
        if moe is not None:
            add_experts(f"layers.{layer}.", moe)
        if spec.attention_sinks:
            add_vector(f"layers.{layer}.sinks.weight", spec.num_heads, 0.5)
        for part, (rows, columns) in (shapes if moe is not None else shapes | dense).items():
            add(f"layers.{layer}.{part}.weight", rows, columns)
            if biased.get(part, spec.mlp_bias):
                add_vector(f"layers.{layer}.{part}.bias", rows, 0.0)
        for part, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads)) if spec.qk_norm else ():
            size = spec.head_dim if spec.head_norm == "head" else heads * spec.head_dim
            add_vector(f"layers.{layer}.{part}_norm.weight", size, 1.0)
        for name in _NORMS[spec.block]:
            add_norm(f"layers.{layer}.{name}")
    add_norm("norm")
    if not spec.tied_head:
        add("head.weight", spec.vocab_size, hidden)
    return weights


class ReferenceModel:
    """Logits of a whole sequence, straight from the definition."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, RawTensor]) -> None:
        self.spec = spec
        self.w = {name: _values(tensor) for name, tensor in weights.items()}
        cos, sin = rotary_tables(spec.rotary, spec.max_position)
        self.cos, self.sin = cos.astype(np.float64), sin.astype(np.float64)

    def logits(self, tokens: list[int]) -> np.ndarray:
        x = self.w["embed.weight"][tokens]
        for layer in range(self.spec.num_layers):
            x = x + self._attention(layer, self._norm(x, f"layers.{layer}.attn_norm.weight"))
            normed = self._norm(x, f"layers.{layer}.mlp_norm.weight")
            moe = self.spec.moe_of(layer)
            x = x + (self._gated(f"layers.{layer}.", normed) if moe is None else self._experts(layer, moe, normed))
        head = self.w["embed.weight" if self.spec.tied_head else "head.weight"]
        return _bounded(self._norm(x, "norm.weight") @ head.T, self.spec.logit_softcap)

    def _linear(self, layer: int, part: str, x: np.ndarray) -> np.ndarray:
        name = f"layers.{layer}.{part}."
        return x @ self.w[name + "weight"].T + self.w.get(name + "bias", 0.0)

    def _gated(self, prefix: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
        def product(part: str, y: np.ndarray) -> np.ndarray:
            weight, bias = self.w[f"{prefix}{part}.weight"], self.w.get(f"{prefix}{part}.bias")
            if expert is not None:
                weight, bias = weight[expert], None if bias is None else bias[expert]
            return y @ weight.T + (0.0 if bias is None else bias)

        gate, up = product("gate", x), product("up", x)
        if self.spec.activation == "swiglu_oai":
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            return product("down", gate / (1 + np.exp(-1.702 * gate)) * (up + 1.0))
        return product("down", self._activate(gate) * up)

    def _experts(self, layer: int, moe: MoeSpec, x: np.ndarray) -> np.ndarray:
        prefix = f"layers.{layer}."
        logits = self._linear(layer, "router", x)
        out = np.zeros_like(x)
        for token, row in enumerate(x):
            for expert, weight in chosen_experts(logits[token], self.w.get(f"{prefix}router.correction"), moe):
                out[token] += weight * self._gated(f"{prefix}expert_", row[None], expert)[0]
        if moe.shared_intermediate_size:
            shared = self._gated(f"{prefix}shared_", x)
            if moe.shared_gate:
                shared = shared / (1 + np.exp(-x @ self.w[f"{prefix}shared_router.weight"].T))
            out += shared
        return out

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.spec.norm_eps) * self.w[name]

    def _activate(self, x: np.ndarray) -> np.ndarray:
        if self.spec.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def _heads(self, layer: int, part: str, x: np.ndarray) -> np.ndarray:
        heads = self._linear(layer, part, x).reshape(len(x), -1, self.spec.head_dim).swapaxes(0, 1)
        if part == "v":
            return heads
        if self.spec.qk_norm:
            heads = self._norm(heads, f"layers.{layer}.{part}_norm.weight")
        half = self.spec.rotary.dim // 2
        cos, sin = self.cos[: len(x)], self.sin[: len(x)]
        a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def _attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        q, k, v = (self._heads(layer, part, x) for part in "qkv")
        k, v = (t.repeat(self.spec.num_heads // self.spec.num_kv_heads, axis=0) for t in (k, v))
        scores = q @ k.swapaxes(1, 2) * self.spec.head_dim**-0.5
        scores = _bounded(scores, self.spec.attention_softcap)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))[None, :]
        hidden = (distance < 0) | (distance >= (self.spec.windows[layer] or len(x)))
        weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1, keepdims=True)
        if self.spec.attention_sinks:
            sinks = self.w[f"layers.{layer}.sinks.weight"][:, None, None]
            total = total + np.exp(sinks - scores.max(axis=-1, keepdims=True))
        out = weights / total @ v
        return self._linear(layer, "o", out.swapaxes(0, 1).reshape(len(x), -1))


def chosen_experts(logits: np.ndarray, correction: np.ndarray | None, moe: MoeSpec) -> list[tuple[int, float]]:
    """A token's experts, best first, and their weights."""
    scores = logits
    if moe.scoring == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    if moe.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    wanted = scores if correction is None else scores + correction
    groups = wanted.reshape(moe.num_groups, -1)
    best = np.sort(groups, axis=1)[:, ::-1]
    judged = best[:, 0] if moe.group_score == "max" else best[:, :2].sum(axis=1)
    barred = np.ones(moe.num_groups, bool)
    barred[np.argsort(-judged, kind="stable")[: moe.top_groups]] = False
    wanted = np.where(np.repeat(barred, groups.shape[1]), -np.inf, wanted)
    chosen = np.argsort(-wanted, kind="stable")[: moe.top_k]
    weights = scores[chosen]
    if moe.scoring == "softmax_of_chosen":
        weights = np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
    if moe.normalize:
        weights = weights / weights.sum()
    return list(zip(chosen.tolist(), (weights * moe.weight_scale).tolist(), strict=True))


def _bounded(x: np.ndarray, bound: float) -> np.ndarray:
    return bound * np.tanh(x / bound) if bound else x


def _values(tensor: RawTensor) -> np.ndarray:
    views = {QuantType.F32: "<f4", QuantType.F16: "<f2"}
    data = tensor.data.view(views[tensor.qtype]) if tensor.qtype in views else tensor.data
    return gguf.dequantize(data, gguf.GGMLQuantizationType(tensor.qtype.gguf_id)).reshape(tensor.shape).astype(float)
