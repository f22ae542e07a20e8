"""Normalisation in torch operations, for any device; kernels that fuse a norm take `RmsNorm`'s fields instead."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class RmsNorm(NamedTuple):
    """Root-mean-square normalisation (arXiv 1910.07467). A float32 weight makes it compute in float32."""

    weight: torch.Tensor  # [size]
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., size]` -> the same, of x's dtype."""
        wide = x.to(self.weight.dtype)
        return F.rms_norm(wide, (x.shape[-1],), self.weight, self.eps).to(x.dtype)


class LayerNorm(NamedTuple):
    """Layer normalisation (arXiv 1607.06450) over the last dimension, in float32."""

    weight: torch.Tensor  # [size], or [heads, size] where each head has its own
    bias: torch.Tensor | None  # like weight
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., *weight.shape]` -> the same, of x's dtype."""
        out = F.layer_norm(x.float(), (x.shape[-1],), eps=self.eps).mul_(self.weight)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


Norm = RmsNorm | LayerNorm


class QueryKeyNorm(NamedTuple):
    """Norms of queries and keys that attention kernels do not know: over their whole width, or with a weight a head."""

    query: Norm
    key: Norm

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """`[rows, queries + keys + values]` -> the same with queries and keys normalised, in place."""
        queries, keys = self.query.weight.numel(), self.key.weight.numel()
        for norm, part in ((self.query, qkv[:, :queries]), (self.key, qkv[:, queries : queries + keys])):
            shaped = part.reshape(part.shape[0], *norm.weight.shape)
            part.copy_(norm(shaped).flatten(1))
        return qkv

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*norm_tensors(self.query), *norm_tensors(self.key))


def norm_tensors(norm: Norm) -> tuple[torch.Tensor, ...]:
    """A norm's weight, and its bias if there is one."""
    if isinstance(norm, LayerNorm) and norm.bias is not None:
        return norm.weight, norm.bias
    return (norm.weight,)
