"""Plain definitions of what the kernels compute, against which every kernel of every device is tested.

Written for reading, not for speed: loops over sequences and heads, no fusion, no padding. Everything is
computed in the dtype of the inputs; tests pass float64.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation (arXiv 1910.07467) of `x` `[T, hidden]` by `weight` `[hidden]`."""
    mean_square = x.square().sum(dim=-1, keepdim=True) / x.shape[-1]
    return x / torch.sqrt(mean_square + eps) * weight


def apply_rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + dim / 2) of a head by its position's angle (arXiv 2104.09864).

    Args:
        x: `[T, heads, head_dim]`; dimensions from `dim` on pass through.
        positions: `[T]` integers.
        cos, sin: `[max_len, dim / 2]`.
    """
    half = cos.shape[-1]
    c = cos[positions.long()][:, None, :]
    s = sin[positions.long()][:, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for `gate_up` `[T, 2 * intermediate]`, gate first (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with gelu's tanh approximation (arXiv 1606.08415); layout as `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of ragged rows over a paged cache that already holds this step's K and V.

    Args:
        query: `[T, heads, head_dim]`.
        keys, values: `[blocks, block_size, kv_heads, head_dim]`.
        query_start: `[R + 1]`, prefix sums of query rows per sequence.
        context_lens: `[R]`; sequence r's queries are its last positions.
        block_tables: `[R, max_blocks]`; only entries within the context are read.
        scale: factor on query-key products.
        window: how many latest positions a query sees, itself included; None for all.
        softcap: scores s become softcap * tanh(s / softcap) (arXiv 2408.00118); 0 for none.
        sinks: `[heads]`, a score of each head that takes part in its softmax and adds no value.

    Returns:
        `[T, heads, head_dim]`.
    """
    out = torch.empty_like(query)
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    group = query.shape[1] // kv_heads
    for sequence, context in enumerate(context_lens.tolist()):
        first, last = int(query_start[sequence]), int(query_start[sequence + 1])
        slots = [int(block_tables[sequence, p // block_size]) * block_size + p % block_size for p in range(context)]
        k = keys.flatten(0, 1)[slots]
        v = values.flatten(0, 1)[slots]
        for row in range(first, last):
            position = context - (last - row)
            oldest = 0 if window is None else max(0, position - window + 1)
            for head in range(query.shape[1]):
                seen_k = k[oldest : position + 1, head // group]
                seen_v = v[oldest : position + 1, head // group]
                scores = seen_k @ query[row, head] * scale
                if softcap > 0.0:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1]))
                out[row, head] = torch.softmax(scores, dim=0)[: len(seen_v)] @ seen_v
    return out
