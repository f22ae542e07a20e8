"""The tensors that one model forward pass reads, the same for every executor."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ForwardInputs(NamedTuple):
    """T tokens of R sequences, ragged, each sequence's tokens contiguous and in order.

    A sequence's last `query_start[r + 1] - query_start[r]` positions of `context_lens[r]` are computed
    now; KV of the earlier ones is already in the cache.
    """

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, where K and V of a token go
    query_start: torch.Tensor  # [R + 1] int32, prefix sums of tokens per sequence
    context_lens: torch.Tensor  # [R] int32, positions in the cache after this step
    block_tables: torch.Tensor  # [R, max_blocks] int32, row-contiguous (stride(0) may exceed max_blocks)
    logits_index: torch.Tensor  # [L] int32, token rows whose logits are wanted, ascending
