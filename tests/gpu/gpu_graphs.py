"""Captured graphs beside eager calls."""

from __future__ import annotations

from collections.abc import Callable

import torch


def check_replays(chain: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> None:
    """Every replay of a graph of `chain`, which may change what it is given, brings what an eager call brings."""
    expected = chain(start.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(start.clone())
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
