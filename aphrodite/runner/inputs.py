"""The tensors that one model forward pass reads, the same for every executor."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class ForwardInputs(NamedTuple):
    """T tokens of R sequences, ragged, each sequence's tokens contiguous and in order.

    A sequence's last `query_start[r + 1] - query_start[r]` positions of `context_lens[r]` are computed
    now; KV of the earlier ones is already in the cache. A runner may hand over the same object again with other
    numbers in its tensors, so what depends on shapes and addresses alone may be kept with the object.
    """

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, where K and V of a token go
    query_start: torch.Tensor  # [R + 1] int32, prefix sums of tokens per sequence
    context_lens: torch.Tensor  # [R] int32, positions in the cache after this step
    block_tables: torch.Tensor  # [R, max_blocks] int32, row-contiguous (stride(0) may exceed max_blocks)
    logits_index: torch.Tensor  # [L] int32, token rows whose logits are wanted, ascending
    adapters: torch.Tensor | None = None  # [R] int32, slot of each sequence's adapter, -1: none; None: nobody has one


class HostLengths(NamedTuple):
    """A ragged step's lengths as the host knows them, without padding."""

    query: np.ndarray  # [R] int32, tokens that the step computes
    context: np.ndarray  # [R] int32, positions in the cache after the step


class StepSize(NamedTuple):
    """What a captured step has room for; the rest of it is padding."""

    tokens: int
    sequences: int
    decode: bool  # one token a sequence, and logits of each
    adapters: bool = False  # some rows have one


class DeviceInputs(NamedTuple):
    """`ForwardInputs` of an accelerator: block tables stay where they are, and decode steps may be padded.

    A padding token has slot -1 and a padding sequence the spare row `num_rows` and no context.
    """

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, or -1: K and V are written nowhere
    query_start: torch.Tensor  # [R + 1] int32, prefix sums of tokens per sequence
    context_lens: torch.Tensor  # [R] int32, positions in the cache after this step
    rows: torch.Tensor  # [R] int32: the blocks of sequence r are those of block_tables[rows[r]]
    block_tables: torch.Tensor  # [num_rows + 1, max_blocks] int32
    logits_index: torch.Tensor  # [L] int32, token rows whose logits are wanted
    lengths: HostLengths | None  # None in a step that may be captured: it depends on nothing that the host knows
    attention_table: torch.Tensor  # [n] int32: what the attention back end's `stage_step` made of `lengths`
    # Of a step without lengths that is not one token a sequence and logits of each: `attention_table` is that of
    # `stage_padded`, and padding at the end belongs to no sequence.
    padded: StepSize | None = None
    adapters: torch.Tensor | None = None  # `adapter_tiles` of the token rows; None: none has an adapter
