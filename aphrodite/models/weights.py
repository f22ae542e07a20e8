"""From canonically named checkpoint tensors to the decoder's layers, one tensor at a time.

Canonical names and shapes are those of `loading/parameters.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from aphrodite.errors import ConfigError, ModelFormatError
from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.dense import to_dense
from aphrodite.layers.embedding import Embedding, build_embedding
from aphrodite.layers.linear import DenseLinear, Linear, build_linear
from aphrodite.layers.mla import LatentProjection, LatentWeights
from aphrodite.layers.mlp import FeedForward, GatedMlp, Weighted
from aphrodite.layers.moe import MixtureOfExperts, SharedExperts
from aphrodite.layers.norm import LayerNorm, Norm, QueryKeyNorm, RmsNorm, norm_tensors
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec
from aphrodite.models.streaming import SLOTS, LayerStream, slots_of
from aphrodite.quantization.types import QuantType, RawTensor

EXACT_TYPES = {torch.bfloat16: QuantType.BF16, torch.float16: QuantType.F16}  # stored types that a compute type holds


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; projections of the same input are stacked."""

    attn_norm: Norm | None  # before attention
    qkv: Linear  # hidden -> (heads + 2 * kv_heads) * head_dim
    o: Linear  # heads * head_dim -> hidden
    mlp_norm: Norm | None  # before the feed-forward block
    mlp: FeedForward  # hidden -> hidden
    attn_post_norm: Norm | None = None  # behind attention
    mlp_post_norm: Norm | None = None  # behind the feed-forward block
    q_norm: torch.Tensor | None = None  # [head_dim], for every head of q; the attention back end applies it
    k_norm: torch.Tensor | None = None  # [head_dim]
    qk_norm: QueryKeyNorm | None = None  # of other kinds; the decoder applies it
    sinks: torch.Tensor | None = None  # [heads] float32, scores without a value; the attention back end applies them
    latent: LatentWeights | None = None  # of latent attention; the attention back end applies it

    @property
    def products(self) -> tuple[Weighted, ...]:
        """All projections."""
        return (self.qkv, self.o, *self.mlp.products)

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that is not of a projection: those of norms, and of latent attention."""
        around = (self.attn_norm, self.attn_post_norm, self.mlp_norm, self.mlp_post_norm)
        found = [tensor for norm in around if norm is not None for tensor in norm_tensors(norm)]
        found += [tensor for tensor in (self.q_norm, self.k_norm, self.sinks) if tensor is not None]
        return (*found, *(self.qk_norm.tensors if self.qk_norm is not None else ()), *(self.latent or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All of a model's weights, in compute layouts on the device."""

    embed: Embedding  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Norm  # before the head
    head: Linear  # hidden -> vocab; shares `embed` when tied
    stream: LayerStream | None = None  # brings the projections of the last layers, where they are in host memory

    @property
    def products(self) -> list[Weighted]:
        """Every projection, the head last."""
        return [product for layer in self.layers for product in layer.products] + [self.head]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = [*self.embed.tensors, *norm_tensors(self.norm)]
        tensors += [tensor for layer in self.layers for tensor in layer.resident]
        tensors += [tensor for product in self.products for tensor in product.tensors]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def visit_layers(self) -> Iterator[LayerWeights]:
        """The layers in order, each with its weights on the device while it is held."""
        return iter(self.layers) if self.stream is None else self.stream.visit(self.layers)


def load_weights(
    spec: ModelSpec,
    tensors: Mapping[str, RawTensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    offload_bytes: int = 0,
    fp8: bool = False,
) -> DecoderWeights:
    """Convert every tensor that `spec` calls for; peak host memory is a few MiB (4-bit: one layer's
    stacked projection) above the result.

    Args:
        offload_bytes: of weights to keep in host memory, rounded up to whole layers and down to what there is.
        fp8: quantize the layers' matrices to fp8 on a GPU; embedding and head stay.

    Raises:
        ConfigError: the host has not the memory that is to be offloaded to.
        ModelFormatError: a tensor is missing or has another shape than the spec says.
    """
    return _Loader(spec, tensors, dtype, device, fp8).load(offload_bytes)


class _Loader:
    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, RawTensor], dtype: torch.dtype, device: torch.device, fp8: bool
    ) -> None:
        self._spec = spec
        self._tensors = tensors
        self._dtype = dtype
        self._device = device
        self._fp8 = fp8

    def load(self, offload_bytes: int) -> DecoderWeights:
        spec = self._spec
        embed = build_embedding(
            self._take("embed.weight", spec.vocab_size, spec.hidden_size), self._dtype, self._device
        )
        layers, stream = self._layers(offload_bytes)
        norm = self._norm("norm")
        if spec.tied_head:
            head = embed.tied_head()
        else:
            head = build_linear(
                [self._take("head.weight", spec.vocab_size, spec.hidden_size)], [None], self._dtype, self._device
            )
        return DecoderWeights(embed=embed, layers=layers, norm=norm, head=head, stream=stream)

    def _layers(self, offload_bytes: int) -> tuple[tuple[LayerWeights, ...], LayerStream | None]:
        """All layers; where some are offloaded, the last ones share the projections of two of their kind."""
        spec = self._spec
        last = self._layer(spec.num_layers - 1)
        layer_bytes = sum(tensor.nbytes for tensor in _projections(last))
        num_streamed = min(-(-offload_bytes // layer_bytes), spec.num_layers)
        if num_streamed <= SLOTS:  # nothing would be saved
            return (*(self._layer(index) for index in range(spec.num_layers - 1)), last), None
        resident = spec.num_layers - num_streamed
        layers: list[LayerWeights] = []
        host: list[tuple[torch.Tensor, ...]] = []
        kinds: list[Hashable] = []
        slots: list[int] = []
        for index in range(spec.num_layers):
            layer = last if index == spec.num_layers - 1 else self._layer(index)
            if index >= resident:
                host.append(tuple(_pinned_copy(tensor) for tensor in _projections(layer)))
                kinds.append(_kind(layer))
                slots = slots_of(kinds)
                slot = layers[resident + slots[-1]] if slots[-1] < len(kinds) - 1 else layer
                layer = replace(layer, qkv=slot.qkv, o=slot.o, mlp=slot.mlp)
            layers.append(layer)
        on_device = [_projections(layers[resident + slot]) for slot in slots]
        return tuple(layers), LayerStream(resident, host, on_device)

    def _layer(self, index: int) -> LayerWeights:
        spec = self._spec
        name = f"layers.{index}."
        attended = spec.num_heads * (spec.head_dim if spec.mla is None else spec.mla.v_head_dim)
        before, behind = spec.block != "post_norm", spec.block in ("post_norm", "sandwich")
        of_heads = spec.qk_norm and spec.head_norm == "head"
        return LayerWeights(
            attn_norm=self._norm(name + "attn_norm") if before else None,
            qkv=self._qkv(name) if spec.mla is None else self._latent_qkv(name, spec.mla),
            o=self._linear([name + "o"], [spec.hidden_size], attended, bias=spec.output_bias),
            mlp_norm=self._norm(name + "mlp_norm") if before and spec.block != "parallel" else None,
            mlp=self._feed_forward(index, name),
            attn_post_norm=self._norm(name + "attn_post_norm") if behind else None,
            mlp_post_norm=self._norm(name + "mlp_post_norm") if behind else None,
            q_norm=self._norm_weight(name + "q_norm.weight", spec.head_dim) if of_heads else None,
            k_norm=self._norm_weight(name + "k_norm.weight", spec.head_dim) if of_heads else None,
            qk_norm=self._query_key_norm(name) if spec.qk_norm and not of_heads else None,
            sinks=self._sinks(name) if spec.attention_sinks else None,
            latent=None if spec.mla is None else self._latent(name, spec.mla),
        )

    def _sinks(self, name: str) -> torch.Tensor:
        return to_dense(self._take(name + "sinks.weight", self._spec.num_heads), torch.float32, self._device)

    def _qkv(self, name: str) -> Linear:
        spec = self._spec
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = [name + "q", name + "k", name + "v"]
        return self._linear(parts, [queries, keys, keys], spec.hidden_size, bias=spec.qkv_bias)

    def _latent_qkv(self, name: str, mla: MlaSpec) -> Linear:
        spec = self._spec
        queries, rank = spec.num_heads * mla.head_dim, mla.q_lora_rank
        if rank is None:
            return self._linear([name + "q", name + "kv_a"], [queries, mla.latent_dim], spec.hidden_size, bias=False)
        down = self._linear([name + "q_a", name + "kv_a"], [rank, mla.latent_dim], spec.hidden_size, bias=False)
        norm = RmsNorm(self._norm_weight(name + "q_a_norm.weight", rank), mla.norm_eps)
        return LatentProjection(down, norm, self._linear([name + "q_b"], [queries], rank, bias=False))

    def _latent(self, name: str, mla: MlaSpec) -> LatentWeights:
        heads, rank = self._spec.num_heads, mla.kv_lora_rank
        key_up = self._take(name + "k_b.weight", heads, rank, mla.qk_nope_head_dim)
        value_up = self._take(name + "v_b.weight", heads, mla.v_head_dim, rank)
        return LatentWeights(
            self._norm_weight(name + "kv_a_norm.weight", rank),
            to_dense(key_up, self._dtype, self._device),
            to_dense(value_up, self._dtype, self._device),
        )

    def _feed_forward(self, index: int, name: str) -> FeedForward:
        spec = self._spec
        moe = spec.moe_of(index)
        if moe is not None:
            return self._mixture(name, moe)
        return self._gated_mlp(name, spec.intermediate_size, bias=spec.mlp_bias)

    def _gated_mlp(self, prefix: str, intermediate: int, *, bias: bool = False) -> GatedMlp:
        hidden = self._spec.hidden_size
        return GatedMlp(
            self._linear([prefix + "gate", prefix + "up"], [intermediate, intermediate], hidden, bias=bias, gated=True),
            self._linear([prefix + "down"], [hidden], intermediate, bias=bias),
        )

    def _mixture(self, name: str, moe: MoeSpec) -> FeedForward:
        if self._device.type != "cpu":
            return self._triton_mixture(name, moe)
        experts, hidden = moe.num_experts, self._spec.hidden_size
        bias = self._take(name + "router.bias", experts) if moe.router_bias else None
        router = self._float32(self._take(name + "router.weight", experts, hidden), bias)
        correction = None
        if moe.correction_bias:
            correction = to_dense(self._take(name + "router.correction", experts), torch.float32, self._device)
        shared = self._shared_experts(name, moe)
        return MixtureOfExperts(moe, router, correction, self._experts(name, moe), shared)

    def _shared_experts(self, name: str, moe: MoeSpec) -> SharedExperts | None:
        if not moe.shared_intermediate_size:
            return None
        mlp = self._gated_mlp(name + "shared_", moe.shared_intermediate_size)
        if not moe.shared_gate:
            return SharedExperts(mlp, None)
        return SharedExperts(mlp, self._float32(self._take(name + "shared_router.weight", 1, self._spec.hidden_size)))

    def _experts(self, name: str, moe: MoeSpec) -> list[GatedMlp]:
        """Experts on the host, each with products of its own."""
        gate_up, down = self._expert_parts(name, moe, "gate", "up"), self._expert_parts(name, moe, "down")

        def linear(stacked: tuple[list[RawTensor], list[RawTensor]], expert: int) -> Linear:
            weights, biases = ([part.part(expert) for part in parts] for parts in stacked)
            return build_linear(
                weights, biases or [None for _ in weights], self._dtype, self._device, gated=len(weights) == 2
            )

        return [GatedMlp(linear(gate_up, expert), linear(down, expert)) for expert in range(moe.num_experts)]

    def _expert_parts(self, name: str, moe: MoeSpec, *parts: str) -> tuple[list[RawTensor], list[RawTensor]]:
        """Weights and biases of some of the experts' projections; no biases where there are none."""
        hidden, inner, count = self._spec.hidden_size, moe.intermediate_size, moe.num_experts
        shapes = [(hidden, inner) if part == "down" else (inner, hidden) for part in parts]
        prefixes = [f"{name}expert_{part}" for part in parts]
        weights = [self._take(f"{at}.weight", count, *shape) for at, shape in zip(prefixes, shapes, strict=True)]
        if not moe.expert_bias:
            return weights, []
        return weights, [self._take(f"{at}.bias", count, shape[0]) for at, shape in zip(prefixes, shapes, strict=True)]

    def _triton_mixture(self, name: str, moe: MoeSpec) -> FeedForward:
        from aphrodite.layers import triton_moe as gpu  # Triton is there only where a GPU is
        from aphrodite.layers.expert_stack import stack_experts

        experts, hidden, device = moe.num_experts, self._spec.hidden_size, self._device
        raw = self._take(name + "router.weight", experts, hidden)
        vectors = (("router.bias", moe.router_bias), ("router.correction", moe.correction_bias))
        bias, correction = (
            to_dense(self._take(name + vector, experts), torch.float32, device) if there else None
            for vector, there in vectors
        )
        exact = self._dtype == torch.float32 or EXACT_TYPES.get(self._dtype) is raw.qtype
        weight = to_dense(raw, torch.float32, device)
        router = gpu.TritonRouter(weight, bias, correction, dtype=self._dtype, exact=exact)
        gate_up, down = (
            stack_experts(*self._expert_parts(name, moe, *parts), self._dtype, device, fp8=self._fp8)
            for parts in (("gate", "up"), ("down",))
        )
        shared = None
        if moe.shared_intermediate_size:
            gate = None
            if moe.shared_gate:
                gate = gpu.TritonGate(
                    to_dense(self._take(name + "shared_router.weight", 1, hidden), torch.float32, device)
                )
            shared = gpu.TritonShared(self._gated_mlp(name + "shared_", moe.shared_intermediate_size), gate)
        return gpu.TritonMixture(moe, router, gate_up, down, shared)

    def _float32(self, weight: RawTensor, bias: RawTensor | None = None) -> DenseLinear:
        """A small product that is made in float32 whatever the compute type."""
        added = None if bias is None else to_dense(bias, torch.float32, self._device)
        return DenseLinear(to_dense(weight, torch.float32, self._device), added, Choice("router in float32", ()))

    def _query_key_norm(self, name: str) -> QueryKeyNorm:
        spec = self._spec
        norms: list[Norm] = []
        for module, heads in (("q_norm", spec.num_heads), ("k_norm", spec.num_kv_heads)):
            if spec.head_norm == "width":
                weight = self._norm_weight(f"{name}{module}.weight", heads * spec.head_dim)
                norms.append(RmsNorm(weight, spec.norm_eps))
            else:
                weight = self._norm_weight(f"{name}{module}.weight", heads, spec.head_dim)
                norms.append(LayerNorm(weight, None, spec.norm_eps))
        return QueryKeyNorm(*norms)

    def _norm(self, name: str) -> Norm:
        spec = self._spec
        weight = self._norm_weight(f"{name}.weight", spec.hidden_size)
        if spec.norm == "rms":
            return RmsNorm(weight, spec.norm_eps)
        bias = self._norm_weight(f"{name}.bias", spec.hidden_size) if spec.norm_bias else None
        return LayerNorm(weight, bias, spec.norm_eps)

    def _linear(self, names: list[str], rows: list[int], columns: int, *, bias: bool, gated: bool = False) -> Linear:
        parts = [self._take(f"{name}.weight", out, columns) for name, out in zip(names, rows, strict=True)]
        biases = [self._take(f"{name}.bias", out) if bias else None for name, out in zip(names, rows, strict=True)]
        return build_linear(parts, biases, self._dtype, self._device, gated=gated, fp8=self._fp8)

    def _norm_weight(self, name: str, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if self._spec.float32_norms else self._dtype
        return to_dense(self._take(name, *shape), dtype, self._device)

    def _take(self, name: str, *shape: int) -> RawTensor:
        raw = self._tensors.get(name)
        if raw is None:
            raise ModelFormatError(f"the checkpoint has no tensor for {name}; it is incomplete or of another family")
        if raw.shape != shape:
            raise ModelFormatError(
                f"tensor {raw.name} ({name}) has shape {list(raw.shape)} where the model's configuration "
                f"means {list(shape)}; weights and configuration do not belong together"
            )
        return raw


def _projections(layer: LayerWeights) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for product in layer.products for tensor in product.tensors)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same in host memory from which a GPU copies by itself."""
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError as error:
        raise ConfigError("the host has not so much memory to keep weights in: lower --cpu-offload-gb") from error
    return host.copy_(tensor)


def _kind(layer: LayerWeights) -> Hashable:
    """What layers have in common that can be computed in each other's tensors."""
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in _projections(layer))
    return tensors, tuple(product.choice.name for product in layer.products)
