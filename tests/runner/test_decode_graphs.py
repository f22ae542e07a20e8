"""Which graph serves a decode step; capturing itself needs a GPU (tests/gpu/test_gpu_engine.py)."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from aphrodite.runner.decode_graphs import WANTED_TIMES, DecodeGraphs, decode_buckets


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """Graphs that are their own (bucket, variant)."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda self, bucket, variant: (bucket, variant))
    return DecodeGraphs(20, cast(Any, None), lambda *_: None, lambda _: None, "all")


def test_a_batch_is_padded_to_the_next_size(graphs: DecodeGraphs) -> None:
    assert graphs.buckets == [1, 2, 4, 8, 16, 20]
    assert [graphs.bucket(count) for count in (1, 3, 8, 9, 17, 20)] == [1, 4, 8, 16, 20, 20]


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 1000])
def test_sizes_ascend_to_the_largest_batch(most: int) -> None:
    sizes = decode_buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most


def test_the_complete_graph_serves_until_a_variant_is_wanted_often(graphs: DecodeGraphs) -> None:
    assert graphs.prepare(8, "greedy") == (8, "greedy")  # there is nothing else yet
    assert graphs.prepare(16, "all") == (16, "all")
    served = [graphs.prepare(16, "greedy") for _ in range(WANTED_TIMES + 1)]
    assert served == [(16, "all")] * (WANTED_TIMES - 1) + [(16, "greedy")] * 2


def test_a_step_that_chooses_no_tokens_has_a_graph_of_its_own(graphs: DecodeGraphs) -> None:
    graphs.prepare(16, "all")
    assert graphs.prepare(16, None) == (16, None)
