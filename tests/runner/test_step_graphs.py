"""Which graph serves a decode step; capturing itself needs a GPU (tests/gpu/test_gpu_engine.py)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import pytest
import torch

from aphrodite.runner.inputs import StepSize
from aphrodite.runner.step_graphs import StepGraphs, decode_sizes, ragged_sizes, smallest


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


EIGHT, SIXTEEN = StepSize(8, 8, True), StepSize(16, 4, False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    """Graphs of a model whose logits are its tokens, and of two endings."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    log: list[str] = []
    monkeypatch.setattr(_Graph, "log", log, raising=False)

    def model(size: StepSize) -> Any:
        log.append(f"model {size.tokens}")
        return size.tokens

    def ending(name: str) -> Any:
        return lambda size, logits: log.append(f"{name} {size.tokens} {logits}")

    endings: dict[Hashable, Any] = {"greedy": ending("greedy"), None: ending("logits")}
    return StepGraphs(cast(Any, _Stream()), model, lambda size: endings, lambda size: log.append(f"pad {size.tokens}"))


def test_a_batch_is_padded_to_the_next_size() -> None:
    sizes = decode_sizes(20)
    assert [size.sequences for size in sizes] == [1, 2, 4, 8, 16, 20]
    found = [smallest(sizes, count, count) for count in (1, 3, 8, 9, 17, 20)]
    assert [size.sequences for size in found if size] == [1, 4, 8, 16, 20, 20]
    assert smallest(sizes, 21, 21) is None


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 1000])
def test_sizes_ascend_to_the_largest_batch(most: int) -> None:
    counts = [size.sequences for size in decode_sizes(most)]
    assert counts == sorted(set(counts))
    assert counts[-1] == most


def test_other_steps_get_the_least_tokens_with_room_for_their_sequences() -> None:
    sizes = ragged_sizes(100, 64)
    assert [size.tokens for size in sizes] == [16, 16, 32, 32, 64, 64, 96, 96]
    assert smallest(sizes, 30, 3) == StepSize(32, 8, False)
    assert smallest(sizes, 30, 9) == StepSize(32, 64, False)
    assert smallest(sizes, 97, 1) is None
    assert ragged_sizes(10, 64) == []
    assert {size.sequences for size in ragged_sizes(100, 4)} == {4}


def test_model_and_endings_are_captured_apart_once_they_have_run(graphs: StepGraphs) -> None:
    captured = graphs.prepare(EIGHT)
    assert list(captured.endings) == ["greedy", None]
    run = ["model 8", "greedy 8 8", "logits 8 8"]
    apart = [line for step in run for line in ("begin", step, "end")]
    assert _Graph.log == ["pad 8", *run, "synchronize", *apart]
    assert graphs.prepare(EIGHT) is captured
    assert len(_Graph.log) == len([*run, *apart]) + 2
    assert graphs.prepare(SIXTEEN) is not captured


def test_a_failed_capture_ends_and_leaves_nothing(graphs: StepGraphs) -> None:
    runs = iter([False, True])

    def fails(size: StepSize) -> Any:
        if next(runs):
            raise RuntimeError("in the capture")

    graphs._model = fails
    with pytest.raises(RuntimeError, match="in the capture"):
        graphs.prepare(EIGHT)
    assert _Graph.log[-1] == "end"
    assert not graphs._graphs


def test_what_fails_in_a_capture_is_what_is_told(graphs: StepGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a capture that failed raises an error of its own, which says nothing."""

    def full(size: StepSize) -> Any:
        if _Graph.log[-1] == "begin":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size.tokens

    def invalidated(graph: _Graph) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "_model", full)
    monkeypatch.setattr(_Graph, "capture_end", invalidated)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.prepare(EIGHT)
