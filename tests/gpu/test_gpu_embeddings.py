"""Embeddings on a GPU: those of the CPU, in chunks and beside answers, which stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_engines import REFERENCE, TINY, Engines, write_model

from aphrodite.core.plan import Pooling
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.params import SamplingParams

POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")
PROMPTS = [[3 + (7 * i + 13 * j) % 900 for j in range(length)] for i, length in enumerate((1, 16, 40, 700))]
STORY = SamplingParams(max_tokens=24, temperature=1.1, ignore_eos=True, seed=7)


@pytest.fixture
def make_core(tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(write_model(tmp_path, TINY))
    yield engines
    engines.close()


def serve(core: EngineCore, *, embed: bool = True) -> tuple[dict[str, np.ndarray], list[int]]:
    """Embeddings of all prompts, and the tokens of an answer that is written meanwhile."""
    core.add(AddRequest(["story"], [7], PROMPTS[2], STORY, 0, None))
    if embed:
        for pooling in POOLINGS:
            for number, prompt in enumerate(PROMPTS):
                core.add(
                    AddRequest([f"{pooling} {number}"], [0], prompt, SamplingParams(max_tokens=0), 0, None, pooling)
                )
    embeddings: dict[str, np.ndarray] = {}
    tokens: list[int] = []
    while core.has_work():
        for update in core.step():
            assert update.error is None, update.error
            tokens += update.token_ids
            if update.embedding is not None:
                embeddings[update.request_id] = np.frombuffer(update.embedding, np.float32)
    return embeddings, tokens


def test_embeddings_are_those_of_the_cpu(make_core: Engines) -> None:
    """In chunks, in one start: that of an engine on a GPU is what takes long here."""
    expected, story = serve(make_core(**REFERENCE))
    core = make_core(max_num_batched_tokens=96)
    found, tokens = serve(core)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-3, err_msg=name)
        assert found[name] @ values / np.linalg.norm(found[name]) / np.linalg.norm(values) > 1 - 1e-6
    assert tokens == story == serve(core, embed=False)[1]
