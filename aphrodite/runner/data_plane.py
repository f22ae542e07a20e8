"""What the engine drives: something that launches planned steps and brings their results, on whatever device."""

from __future__ import annotations

from typing import Any, Protocol

from aphrodite.core.plan import StepPlan
from aphrodite.models.shape import ModelShape
from aphrodite.runner.executor import AdapterStore
from aphrodite.runner.results import Outcome
from aphrodite.sampling.params import SamplingParams


class Executor(Protocol):
    """What the engine tells of a loaded model."""

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
        """Why prompts cannot be pooled; None if they can."""

    @property
    def adapters(self) -> AdapterStore | None:
        """None where no room was made for any."""

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""


class DataPlane(Protocol):
    """Rows, a model and a sampler.

    Attributes:
        async_depth: steps to launch ahead of the one that is collected.
    """

    async_depth: int

    @property
    def executor(self) -> Executor:
        """The loaded model."""

    def prepare(self, params: SamplingParams) -> None:
        """Make what is slow to make of a request's parameters; may run beside everything else.

        Raises:
            InvalidRequestError: something that they hold cannot be used.
        """

    def launch(self, plan: StepPlan) -> Any:
        """Start the step; the caller keeps launching and collecting in the same order."""

    def collect(self, plan: StepPlan, step: Any) -> Outcome:
        """Wait for the step that `launch` returned.

        Raises:
            Exception: whatever computing the step raised.
        """

    def close(self) -> None:
        """Wait for what is under way, and let go of threads."""
