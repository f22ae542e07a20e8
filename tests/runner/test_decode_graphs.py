"""Which graph serves a decode step; capturing itself needs a GPU (tests/gpu/test_gpu_engine.py)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import pytest
import torch

from aphrodite.runner.decode_graphs import DecodeGraphs, decode_buckets


class _Graph:
    """What `torch.cuda.CUDAGraph` would hold: nothing runs, and the log says what was captured."""

    log: list[str]

    def capture_begin(self, **options: Any) -> None:
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")


class _Stream:
    def synchronize(self) -> None:
        _Graph.log.append("synchronize")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> DecodeGraphs:
    """Graphs of a model whose logits are its bucket, and of two endings."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    log: list[str] = []
    monkeypatch.setattr(_Graph, "log", log, raising=False)

    def model(bucket: int) -> Any:
        log.append(f"model {bucket}")
        return bucket

    def ending(name: str) -> Any:
        return lambda bucket, logits: log.append(f"{name} {bucket} {logits}")

    endings: dict[Hashable, Any] = {"greedy": ending("greedy"), None: ending("logits")}
    return DecodeGraphs(20, cast(Any, _Stream()), model, endings, lambda bucket: log.append(f"pad {bucket}"))


def test_a_batch_is_padded_to_the_next_size(graphs: DecodeGraphs) -> None:
    assert graphs.buckets == [1, 2, 4, 8, 16, 20]
    assert [graphs.bucket(count) for count in (1, 3, 8, 9, 17, 20)] == [1, 4, 8, 16, 20, 20]


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 1000])
def test_sizes_ascend_to_the_largest_batch(most: int) -> None:
    sizes = decode_buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most


def test_model_and_endings_are_captured_apart_once_they_have_run(graphs: DecodeGraphs) -> None:
    captured = graphs.prepare(8)
    assert list(captured.endings) == ["greedy", None]
    run = ["model 8", "greedy 8 8", "logits 8 8"]
    apart = [line for step in run for line in ("begin", step, "end")]
    assert _Graph.log == ["pad 8", *run, "synchronize", *apart]
    assert graphs.prepare(8) is captured
    assert len(_Graph.log) == len([*run, *apart]) + 2
    assert graphs.prepare(16) is not captured


def test_a_failed_capture_ends_and_leaves_nothing(graphs: DecodeGraphs) -> None:
    runs = iter([False, True])

    def fails(bucket: int) -> Any:
        if next(runs):
            raise RuntimeError("in the capture")

    graphs._model = fails
    with pytest.raises(RuntimeError, match="in the capture"):
        graphs.prepare(8)
    assert _Graph.log[-1] == "end"
    assert not graphs._graphs
