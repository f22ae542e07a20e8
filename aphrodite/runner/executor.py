"""What the runner needs of a model on a device, whoever computes it (torch ops, native library, graphs)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from aphrodite.core.plan import StepPlan
from aphrodite.models.shape import ModelShape
from aphrodite.runner.inputs import DeviceInputs, ForwardInputs, HostLengths, StepSize

if TYPE_CHECKING:
    from aphrodite.loading.lora import Adapter


# Of entries `[n]` of a step's `logits_index`, integers on the device: logits `[n, vocab]` of the compute dtype.
LogitsOf = Callable[[torch.Tensor], torch.Tensor]


class AdapterStore(Protocol):
    """Adapters of a model, known by their numbers, and the slots that steps are computed with.

    `add` may run beside everything else; all others are called in the order of steps, by whoever runs these.
    """

    @property
    def num_slots(self) -> int:
        """Adapters that a step may be computed with."""

    def add(self, number: int, adapter: Adapter) -> None:
        """Take an adapter that fits the model and the room that was made for it, whose tensors may go afterwards.

        Raises:
            ModelFormatError: a value is not representable in the compute type.
        """

    def remove(self, number: int) -> None:
        """Let go of an adapter that no step uses any more, wherever it lies."""

    def place(self, slot: int, number: int) -> None:
        """Compute with the adapter whatever rows have this slot from now on."""


def place_adapters(executor: Executor, plan: StepPlan) -> None:
    """Put the adapters that a plan names into their slots."""
    for slot, number in plan.adapters:
        if executor.adapters is None:
            raise RuntimeError("a plan names an adapter, and no room was made for any")
        executor.adapters.place(slot, number)


class Executor(Protocol):
    """What a loaded model tells of itself, wherever it runs."""

    @property
    def spec(self) -> ModelShape:
        """Sizes of the model."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the loaded weights occupy."""

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of KV cache for one block over all layers."""

    @property
    def hidden_declined(self) -> str | None:
        """Why prompts cannot be pooled, so that `forward_hidden` is not asked for; None if they can."""

    @property
    def adapters(self) -> AdapterStore | None:
        """None where no room was made for any."""

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""


class ModelExecutor(Executor, Protocol):
    """A loaded model with its paged KV cache."""

    block_size: int
    device: torch.device

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the cache; called once, before the first forward."""

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Run one step: writes K and V of every token, returns logits `[L, vocab]` float32.

        The returned tensor may be reused by the next call.
        """

    def forward_hidden(self, inputs: ForwardInputs, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and hidden states behind the final norm.

        Args:
            index: `[H]` int32, the token rows whose hidden states are wanted.

        Returns:
            Logits `[L, vocab]` and hidden states `[H, hidden_size]`, both float32.
        """


class PaddedSteps(Protocol):
    """Steps that are not only decoding, in a size that does not follow from their sequences' lengths."""

    @property
    def most_tokens(self) -> int:
        """Of such a step, beyond which the device takes longer than the host without a graph."""

    def stage(self, lengths: HostLengths, size: StepSize) -> np.ndarray | None:
        """`[table_length(size)]` int32 for `attention_table`; None if the step does not fit after all."""

    def table_length(self, size: StepSize) -> int:
        """int32 values that attention needs of a step of this size."""


class DeviceModelExecutor(Executor, Protocol):
    """A loaded model on a GPU; nothing in it waits for the device.

    Attributes:
        dtype: of logits.
    """

    block_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def can_capture(self) -> bool:
        """Whether steps may be captured in graphs."""

    def rehearsal(self) -> AbstractContextManager[None] | None:
        """While steps are gone through without launching kernels, to learn which are needed; None: they cannot be."""

    @property
    def padded_steps(self) -> PaddedSteps | None:
        """How steps that are not only decoding can be captured; None if they cannot."""

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the cache; called once, before the first forward."""

    def stage_step(self, lengths: HostLengths) -> np.ndarray:
        """`[n]` int32 that attention needs of a step which is not only decoding, for `attention_table`."""

    def forward(self, inputs: DeviceInputs) -> torch.Tensor:
        """Run one step: writes K and V of every token, returns logits `[L, vocab]` of the compute dtype."""

    def forward_rows(self, inputs: DeviceInputs, index: torch.Tensor | None) -> tuple[LogitsOf, torch.Tensor | None]:
        """`forward` of a step with `lengths` whose logits may be too many for the memory, and hidden states.

        Args:
            index: `[H]` int32, the token rows whose hidden states behind the final norm are wanted; None for none.

        Returns:
            What makes logits, and hidden states `[H, hidden_size]` of the compute dtype.
        """
