"""Requests that have no token to go on with end with the reason; their neighbours go on as if they were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams

PROMPT = [5, 6, 7, 8]
WRITING = SamplingParams(max_tokens=12, temperature=1.3, ignore_eos=True, repetition_penalty=1.2)

MakeCore = Callable[..., EngineCore]


@pytest.fixture
def make_core(tiny_model: Path) -> Iterator[MakeCore]:
    cores: list[EngineCore] = []

    def make(**settings: Any) -> EngineCore:
        config = EngineConfig(
            model=str(tiny_model), load_format="dummy", threads=1, kv_cache_memory=4 << 20, **settings
        )
        cores.append(build_engine(config, ()).core)
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def run(core: EngineCore, **requests: SamplingParams) -> dict[str, list[RequestUpdate]]:
    for name, params in requests.items():
        core.add(AddRequest([name], [9], PROMPT, params, 0, None))
    updates: dict[str, list[RequestUpdate]] = {name: [] for name in requests}
    while core.has_work():
        for update in core.step():
            updates[update.request_id].append(update)
    return updates


def tokens(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for token in update.token_ids]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "hard",
    [
        {"allowed_token_ids": [7, 8], "custom_token_bans": [7, 8]},
        {"allowed_token_ids": [7], "bad_words_ids": [[7]]},
        {"allowed_token_ids": [7], "min_tokens": 3, "stop_token_ids": [7]},
        {"allowed_token_ids": [7], "token_ban_ranges": [[[7], 0, 2]]},
    ],
)
def test_rules_that_leave_nothing_end_the_request(make_core: MakeCore, hard: dict[str, Any], depth: int) -> None:
    alone = tokens(run(make_core(), good=WRITING)["good"])
    updates = run(make_core(async_depth=depth), bad=from_mapping(hard, base=WRITING), good=WRITING)
    last = updates["bad"][-1]
    assert last.finish_reason == "error"
    assert "no token may be chosen" in (last.error or "")
    assert tokens(updates["bad"]) == []
    assert tokens(updates["good"]) == alone


def test_soft_stages_that_would_leave_nothing_are_undone(make_core: MakeCore) -> None:
    """An n-gram ban of the only token that is allowed."""
    params = from_mapping({"allowed_token_ids": [7], "no_repeat_ngram_size": 1, "top_a": 1.0}, base=WRITING)
    assert tokens(run(make_core(), soft=params)["soft"]) == [7] * 12


@pytest.mark.parametrize("executor", ["native", "torch"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_end_their_request_alone(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, executor: str, value: float
) -> None:
    settings = {"executor": executor, "dtype": "float32" if executor == "torch" else "auto"}
    alone = tokens(run(make_core(**settings), good=WRITING)["good"])
    core = make_core(**settings)
    forward, calls = core.runner.executor.forward, []

    def damaged(inputs: Any) -> torch.Tensor:
        logits = forward(inputs).clone()
        calls.append(len(logits))
        if len(calls) == 4:
            logits[0] = value
        return logits

    monkeypatch.setattr(core.runner.executor, "forward", damaged)
    updates = run(core, bad=WRITING, good=WRITING)
    last = updates["bad"][-1]
    assert last.finish_reason == "error"
    assert last.error
    assert tokens(updates["bad"]) == alone[:3]
    assert tokens(updates["good"]) == alone
