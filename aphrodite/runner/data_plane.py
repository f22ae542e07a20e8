"""What the engine drives: something that launches planned steps and brings their results, on whatever device."""

from __future__ import annotations

from typing import Any, Protocol

from aphrodite.core.plan import StepPlan
from aphrodite.runner.executor import Executor
from aphrodite.runner.results import Outcome
from aphrodite.sampling.params import SamplingParams


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

    def lost(self) -> str | None:
        """Why no step can be computed any more, asked after one failed; None if others can."""

    def close(self) -> None:
        """Wait for what is under way, and let go of threads."""
