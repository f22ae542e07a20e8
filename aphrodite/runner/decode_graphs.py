"""Decode steps as CUDA (or HIP) graphs, two for each step: the model's, by padded batch size, and what follows.

What follows differs with the samplers of a batch, is a handful of kernels and costs next to nothing to capture, so
there is one for each way to end a step and none is captured while requests are served, which would hold up every
stream. All graphs share one memory pool; the largest batch comes first, so that the others fit into what it took. What
a step leaves behind lies in tensors from outside of the pool.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A step of `bucket` padded sequences from inputs at fixed addresses to logits `[bucket, vocab]`.
Model = Callable[[int], torch.Tensor]
# What becomes of such logits, in tensors at fixed addresses.
Ending = Callable[[int, torch.Tensor], None]


def decode_buckets(most: int) -> list[int]:
    """Padded batch sizes up to `most`: close together where a sequence more costs a noticeable share."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


class StepGraphs(NamedTuple):
    """A padded batch size: its model, and each of the ways to end the step."""

    model: torch.cuda.CUDAGraph
    endings: Mapping[Hashable, torch.cuda.CUDAGraph]


class DecodeGraphs:
    """Captured decode steps.

    Args:
        most: the largest batch.
        stream: that the graphs are launched on.
        model: takes padding as input when it is captured.
        endings: by name.
        pad: makes all of a bucket's inputs padding.
    """

    def __init__(
        self,
        most: int,
        stream: torch.cuda.Stream,
        model: Model,
        endings: Mapping[Hashable, Ending],
        pad: Callable[[int], None],
    ) -> None:
        self.buckets = decode_buckets(most)
        self._stream = stream
        self._model = model
        self._endings = endings
        self._pad = pad
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, StepGraphs] = {}

    def bucket(self, count: int) -> int:
        """The padded size of a batch of `count` sequences."""
        return self.buckets[bisect_left(self.buckets, count)]

    def prepare(self, bucket: int) -> StepGraphs:
        """The graphs of a bucket, captured now if there are none; overwrites the bucket's inputs then."""
        if bucket not in self._graphs:
            began = time.perf_counter()
            collecting = gc.isenabled()
            gc.disable()  # an old graph that is let go of during a capture would break it
            try:
                self._graphs[bucket] = self._capture(bucket)
            finally:
                if collecting:
                    gc.enable()
            logger.debug("captured the decode step of %d sequences in %.2f s", bucket, time.perf_counter() - began)
        return self._graphs[bucket]

    def _capture(self, bucket: int) -> StepGraphs:
        # Once without capturing: compiles kernels and lets libraries set up, which a capture must not meet.
        self._pad(bucket)
        logits = self._model(bucket)
        for ending in self._endings.values():
            ending(bucket, logits)
        self._stream.synchronize()
        model, logits = self._captured(lambda: self._model(bucket))
        endings = {
            name: self._captured(lambda ending=ending: ending(bucket, logits))[0]  # type: ignore[misc]
            for name, ending in self._endings.items()
        }
        # The pool takes the logits' memory back here: graphs of other buckets may use it between two of our steps.
        return StepGraphs(model, endings)

    def _captured(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
        finally:
            graph.capture_end()
        return graph, result
