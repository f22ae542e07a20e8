"""Decode steps as CUDA (or HIP) graphs, one for each padded batch size, captured when first needed.

All graphs share one memory pool, and the largest is captured first, so that the others fit into what it took.
What a graph leaves behind lies in tensors from outside of it.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


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
    """

    def __init__(
        self, most: int, stream: torch.cuda.Stream, run: Callable[[int, Hashable], None], pad: Callable[[int], None]
    ) -> None:
        self._buckets = decode_buckets(most)
        self._stream = stream
        self._run = run
        self._pad = pad
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, Hashable], torch.cuda.CUDAGraph] = {}

    def bucket(self, count: int) -> int:
        """The padded size of a batch of `count` sequences."""
        return self._buckets[bisect_left(self._buckets, count)]

    def prepare(self, bucket: int, variant: Hashable) -> torch.cuda.CUDAGraph:
        """The graph of a bucket, captured now if it is new; overwrites the bucket's inputs then."""
        if not self._graphs and bucket != self._buckets[-1]:
            self._graphs[self._buckets[-1], variant] = self._capture(self._buckets[-1], variant)
        if (bucket, variant) not in self._graphs:
            self._graphs[bucket, variant] = self._capture(bucket, variant)
        return self._graphs[bucket, variant]

    def _capture(self, bucket: int, variant: Hashable) -> torch.cuda.CUDAGraph:
        began = time.perf_counter()
        self._pad(bucket)
        self._run(bucket, variant)  # compiles kernels and lets libraries set up, which a capture must not meet
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._run(bucket, variant)
        logger.debug("captured the decode step of %d sequences in %.2f s", bucket, time.perf_counter() - began)
        return graph
