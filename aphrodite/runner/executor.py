"""What the runner needs of a model on a device, whoever computes it (torch ops, native library, graphs)."""

from __future__ import annotations

from typing import Protocol

import torch

from aphrodite.models.spec import ModelSpec
from aphrodite.runner.inputs import ForwardInputs


class ModelExecutor(Protocol):
    """A loaded model with its paged KV cache."""

    spec: ModelSpec
    block_size: int
    device: torch.device

    @property
    def weight_bytes(self) -> int:
        """Bytes that the loaded weights occupy."""

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of KV cache for one block over all layers."""

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the cache; called once, before the first forward."""

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Run one step: writes K and V of every token, returns logits `[L, vocab]` float32.

        The returned tensor may be reused by the next call.
        """

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""
