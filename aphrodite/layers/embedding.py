"""Embeddings: the rows of a matrix that tokens name, whether it is dense or kept packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from aphrodite.kernels.dispatch import Choice
from aphrodite.layers.dense import to_dense
from aphrodite.layers.linear import Linear, dense_linear, packed_layouts
from aphrodite.quantization.types import RawTensor

if TYPE_CHECKING:
    from aphrodite.quantization.planes import Planes


class Embedding(Protocol):
    """A matrix `[vocab, hidden]`."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that was loaded."""

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` integers -> `[T, hidden]` of the compute dtype."""

    def tied_head(self) -> Linear:
        """The product hidden -> vocab with the same matrix."""


class DenseEmbedding:
    """A matrix of the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)

    def tied_head(self) -> Linear:
        return dense_linear(self.weight, None, Choice("tied to the embedding", ()))


class PackedEmbedding:
    """A matrix in planes on a GPU, whose rows are expanded as tokens name them."""

    def __init__(self, planes: Planes, dtype: torch.dtype) -> None:
        self._planes = planes
        self._dtype = dtype

    @property
    def device(self) -> torch.device:
        return self._planes.low.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._planes.tensors

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        from aphrodite.kernels.triton.packed_gemm import expand_rows  # Triton is there only where a GPU is

        out = torch.empty((token_ids.shape[0], self._planes.form.columns), dtype=self._dtype, device=self.device)
        expand_rows(self._planes, token_ids, out)
        return out

    def tied_head(self) -> Linear:
        from aphrodite.layers.packed_linear import PackedLinear

        return PackedLinear([self._planes], None, Choice("tied to the packed embedding", ()), dtype=self._dtype)


def build_embedding(raw: RawTensor, dtype: torch.dtype, device: torch.device) -> Embedding:
    """An embedding of `raw` `[vocab, hidden]`: packed where a GPU has kernels for its type, else dense."""
    layouts = packed_layouts([raw], device)
    if not isinstance(layouts, list):
        return DenseEmbedding(to_dense(raw, dtype, device))
    from aphrodite.quantization.planes import planes_of

    planes = planes_of(layouts[0])
    if planes.permutation is not None:
        return DenseEmbedding(to_dense(raw, dtype, device))
    return PackedEmbedding(planes, dtype)
