"""Steps as CUDA (or HIP) graphs, two for each step: the model's, by padded size, and what follows.

Sizes of decode steps go by the batch. Other steps, of some tokens of prompts among the decoding sequences, are captured
where the host would otherwise launch kernels more slowly than the device runs them (`ragged_sizes`).

What follows differs with the samplers of a batch, is a handful of kernels and costs next to nothing to capture, so
there is one for each way to end a step and none is captured while requests are served, which would hold up every
stream. All graphs share one memory pool; the largest come first, so that the others fit into what they took. What a
step leaves behind lies in tensors from outside of the pool.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch

from aphrodite.runner.inputs import StepSize

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A step of a padded size from inputs at fixed addresses to logits `[sequences, vocab]`.
Model = Callable[[StepSize], torch.Tensor]
# What becomes of such logits, in tensors at fixed addresses.
Ending = Callable[[StepSize, torch.Tensor], None]

FEW_SEQUENCES = 8  # that steps with a prompt and hardly anyone else are captured for


def decode_sizes(most: int) -> list[StepSize]:
    """Padded batches up to `most`, ascending: close together where a sequence more costs a noticeable share."""
    counts = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [StepSize(count, count, True) for count in [*(count for count in counts if count < most), most]]


def ragged_sizes(most_tokens: int, most_sequences: int) -> list[StepSize]:
    """Padded steps of other kinds, in the order in which to look for one that has room: powers of two and between.

    Args:
        most_tokens: of a step that is worth it.
        most_sequences: of any step.
    """
    tokens = sorted([16, 32, *(count for power in range(6, 20) for count in (1 << power, 3 << (power - 1)))])
    sequences = sorted({min(FEW_SEQUENCES, most_sequences), most_sequences})
    return [StepSize(count, rows, False) for count in tokens if count <= most_tokens for rows in sequences]


def smallest(sizes: Sequence[StepSize], tokens: int, sequences: int) -> StepSize | None:
    """The first of `sizes` with room for the step; None if there is none."""
    return next((size for size in sizes if tokens <= size.tokens and sequences <= size.sequences), None)


class CapturedStep(NamedTuple):
    """The model of a padded size, and each of the ways to end the step."""

    model: torch.cuda.CUDAGraph
    endings: Mapping[Hashable, torch.cuda.CUDAGraph]


class StepGraphs:
    """Captured steps.

    Args:
        stream: that the graphs are launched on.
        model: takes padding as input when it is captured.
        endings: of a size, by name.
        pad: makes all of a size's inputs padding.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        model: Model,
        endings: Callable[[StepSize], Mapping[Hashable, Ending]],
        pad: Callable[[StepSize], None],
    ) -> None:
        self._stream = stream
        self._model = model
        self._endings = endings
        self._pad = pad
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepSize, CapturedStep] = {}

    def prepare(self, size: StepSize) -> CapturedStep:
        """The graphs of a size, captured now if there are none; overwrites the size's inputs then."""
        if size not in self._graphs:
            began = time.perf_counter()
            collecting = gc.isenabled()
            gc.disable()  # an old graph that is let go of during a capture would break it
            try:
                self._graphs[size] = self._capture(size)
            finally:
                if collecting:
                    gc.enable()
            logger.debug("captured a step of %s in %.2f s", size, time.perf_counter() - began)
        return self._graphs[size]

    def _capture(self, size: StepSize) -> CapturedStep:
        # Once without capturing: compiles kernels and lets libraries set up, which a capture must not meet.
        self._pad(size)
        logits = self._model(size)
        ways = self._endings(size)
        for ending in ways.values():
            ending(size, logits)
        self._stream.synchronize()
        model, logits = self._captured(lambda: self._model(size))
        endings = {
            name: self._captured(lambda ending=ending: ending(size, logits))[0]  # type: ignore[misc]
            for name, ending in ways.items()
        }
        # The pool takes the logits' memory back here: graphs of other sizes may use it between two of our steps.
        return CapturedStep(model, endings)

    def _captured(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
        except Exception:
            with suppress(RuntimeError):  # which only says that something failed before
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, result
