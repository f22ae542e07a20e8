"""Products of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from aphrodite.layers.activation import Activation
from aphrodite.layers.invariant import decline_invariant, invariant_matmul
from aphrodite.layers.linear import Linear
from aphrodite.layers.norm import RmsNorm


class LatentProjection:
    """Queries by way of a latent of their own, beside the latent of keys and values: what attention takes, as a Linear.

    Args:
        down: hidden -> q_lora_rank + latent_dim, the queries' latent first.
        norm: of the queries' latent.
        up: q_lora_rank -> heads * head_dim.
    """

    def __init__(self, down: Linear, norm: RmsNorm, up: Linear) -> None:
        self.down = down
        self.norm = norm
        self.up = up
        self.choice = down.choice

    @property
    def parts(self) -> tuple[Linear, ...]:
        """The products that it is made of."""
        return self.down, self.up

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.down.tensors, self.norm.weight, *self.up.tensors)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[T, heads * head_dim + latent_dim]`: queries, then the latent of keys and values."""
        if activation is not None or residual is not None:
            raise ValueError("nothing stands behind the projections of attention")
        both = self.down(x, norm=norm)
        rank = self.norm.weight.shape[0]
        queries = self.up(both[:, :rank].contiguous(), norm=self.norm)
        return torch.cat((queries, both[:, rank:]), dim=1)


class LatentWeights(NamedTuple):
    """What turns latents into attention, and attention into values; the attention back end applies it."""

    norm: torch.Tensor  # [kv_lora_rank], RMSNorm of the latent before it is cached
    key_up: torch.Tensor  # [heads, kv_lora_rank, qk_nope_head_dim]: a query's part that does not turn -> the latent
    value_up: torch.Tensor  # [heads, v_head_dim, kv_lora_rank]: the attended latent -> a value


def heads_product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each head of `x` `[T, heads, in]` times the transpose of its own of `weights` `[heads, out, in]`.

    Returns:
        `[T, heads, out]`; rows do not depend on how many there are where that can be had (see layers/invariant.py).
    """
    if decline_invariant(x.dtype, x.device) is None:
        products = [invariant_matmul(x[:, head].contiguous(), weight) for head, weight in enumerate(weights)]
        return torch.stack(products, dim=1)
    return torch.bmm(x.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1)
