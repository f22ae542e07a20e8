"""Decode steps as CUDA (or HIP) graphs, one for each padded batch size.

A complete one for each size is captured when the engine starts, since a capture holds up every stream; variants that
launch less follow where they are wanted again and again. All share one memory pool, and the largest comes first, so
that the others fit into what it took. What a graph leaves behind lies in tensors from outside of it.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)

# A variant gets a graph of its own once it has been wanted so many times: until then the complete one serves, so that
# streams are not held up for what comes once.
WANTED_TIMES = 8


def decode_buckets(most: int) -> list[int]:
    """Padded batch sizes up to `most`: close together where a sequence more costs a noticeable share."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """Captured decode steps.

    Args:
        most: the largest batch.
        stream: that the graphs are launched on.
        run: computes a step of `bucket` padded sequences in one of several variants, which graphs are told apart by. It
            reads and writes tensors at fixed addresses only, and takes padding as input when it is captured.
        pad: makes all of a bucket's inputs padding.
        complete: a variant that does all that any other does, `None` apart.
    """

    def __init__(
        self,
        most: int,
        stream: torch.cuda.Stream,
        run: Callable[[int, Hashable], None],
        pad: Callable[[int], None],
        complete: Hashable,
    ) -> None:
        self.buckets = decode_buckets(most)
        self._complete = complete
        self._wanted: Counter[tuple[int, Hashable]] = Counter()
        self._stream = stream
        self._run = run
        self._pad = pad
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, Hashable], torch.cuda.CUDAGraph] = {}

    def bucket(self, count: int) -> int:
        """The padded size of a batch of `count` sequences."""
        return self.buckets[bisect_left(self.buckets, count)]

    def prepare(self, bucket: int, variant: Hashable) -> torch.cuda.CUDAGraph:
        """A graph for a step of a bucket, captured now if there is none; overwrites the bucket's inputs then."""
        key = bucket, variant
        if key not in self._graphs:
            self._wanted[key] += 1
            complete = None if variant is None else self._graphs.get((bucket, self._complete))
            if complete is not None and self._wanted[key] < WANTED_TIMES:
                return complete
            self._graphs[key] = self._capture(bucket, variant)
        return self._graphs[key]

    def _capture(self, bucket: int, variant: Hashable) -> torch.cuda.CUDAGraph:
        began = time.perf_counter()
        self._pad(bucket)
        self._run(bucket, variant)  # compiles kernels and lets libraries set up, which a capture must not meet
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # an old graph that is let go of during a capture would break it
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._run(bucket, variant)
        finally:
            if collecting:
                gc.enable()
        logger.debug("captured the decode step of %d sequences in %.2f s", bucket, time.perf_counter() - began)
        return graph
