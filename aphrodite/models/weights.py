"""From canonically named checkpoint tensors to the decoder's layers, one tensor at a time.

Canonical names: embed.weight, norm.weight, head.weight (absent when tied), and for each layer i
layers.{i}.attn_norm.weight, layers.{i}.mlp_norm.weight and layers.{i}.{q,k,v,o,gate,up,down}.weight
with .bias where the spec says so, and layers.{i}.{q_norm,k_norm}.weight with norms of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from aphrodite.errors import ModelFormatError
from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.dense import to_dense
from aphrodite.layers.linear import DenseLinear, Linear, build_linear
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; projections of the same input are stacked."""

    attn_norm: torch.Tensor  # [hidden]
    qkv: Linear  # hidden -> (heads + 2 * kv_heads) * head_dim
    o: Linear  # heads * head_dim -> hidden
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate, gate first
    down: Linear  # intermediate -> hidden
    q_norm: torch.Tensor | None = None  # [head_dim], for every head of q
    k_norm: torch.Tensor | None = None  # [head_dim]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[torch.Tensor, ...]:
        found = (self.attn_norm, self.mlp_norm, self.q_norm, self.k_norm)
        return tuple(norm for norm in found if norm is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All of a model's weights, in compute layouts on the device."""

    embed: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: Linear  # hidden -> vocab; shares `embed` when tied

    @property
    def linears(self) -> list[Linear]:
        """Every Linear, the head last."""
        return [linear for layer in self.layers for linear in layer.linears] + [self.head]

    @property
    def nbytes(self) -> int:
        norms = self.norm.nbytes + sum(norm.nbytes for layer in self.layers for norm in layer.norms)
        tied = isinstance(self.head, DenseLinear) and self.head.weight is self.embed
        embed = 0 if tied else self.embed.nbytes
        return embed + norms + sum(linear.nbytes for linear in self.linears)


def load_weights(
    spec: ModelSpec, tensors: Mapping[str, RawTensor], dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Convert every tensor that `spec` calls for; peak host memory is a few MiB (4-bit: one layer's
    stacked projection) above the result.

    Raises:
        ModelFormatError: a tensor is missing or has another shape than the spec says.
    """
    return _Loader(spec, tensors, dtype, device).load()


class _Loader:
    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, RawTensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        self._tensors = tensors
        self._dtype = dtype
        self._device = device

    def load(self) -> DecoderWeights:
        spec = self._spec
        embed = to_dense(self._take("embed.weight", spec.vocab_size, spec.hidden_size), self._dtype, self._device)
        layers = tuple(self._layer(index) for index in range(spec.num_layers))
        norm = self._vector("norm.weight", spec.hidden_size)
        if spec.tied_head:
            head: Linear = DenseLinear(embed, None, Choice("tied to the embedding", ()))
        else:
            head = self._linear(["head"], [spec.vocab_size], spec.hidden_size, bias=False)
        return DecoderWeights(embed=embed, layers=layers, norm=norm, head=head)

    def _layer(self, index: int) -> LayerWeights:
        spec = self._spec
        name = f"layers.{index}."
        attention = spec.num_heads * spec.head_dim
        kv = spec.num_kv_heads * spec.head_dim
        hidden, intermediate = spec.hidden_size, spec.intermediate_size
        return LayerWeights(
            attn_norm=self._vector(name + "attn_norm.weight", hidden),
            qkv=self._linear([name + "q", name + "k", name + "v"], [attention, kv, kv], hidden, bias=spec.qkv_bias),
            o=self._linear([name + "o"], [hidden], attention, bias=spec.output_bias),
            mlp_norm=self._vector(name + "mlp_norm.weight", hidden),
            gate_up=self._linear(
                [name + "gate", name + "up"], [intermediate, intermediate], hidden, bias=spec.mlp_bias
            ),
            down=self._linear([name + "down"], [hidden], intermediate, bias=spec.mlp_bias),
            q_norm=self._vector(name + "q_norm.weight", spec.head_dim) if spec.qk_norm else None,
            k_norm=self._vector(name + "k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        )

    def _linear(self, names: list[str], rows: list[int], columns: int, *, bias: bool) -> Linear:
        parts = [self._take(f"{name}.weight", out, columns) for name, out in zip(names, rows, strict=True)]
        biases = [self._take(f"{name}.bias", out) if bias else None for name, out in zip(names, rows, strict=True)]
        return build_linear(parts, biases, self._dtype, self._device)

    def _vector(self, name: str, size: int) -> torch.Tensor:
        return to_dense(self._take(name, size), self._dtype, self._device)

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
