"""Progress of a prompt that takes several steps, as the engine tells it to those who asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.engine.output import RequestStream
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer

PROMPT = [3 + (7 * number) % 300 for number in range(100)]
PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def core(tiny_model: Path) -> Iterator[EngineCore]:
    config = EngineConfig(
        model=str(tiny_model), load_format="dummy", device="cpu", kv_cache_memory=1 << 22, max_num_batched_tokens=32
    )
    built = build_engine(config, ()).core
    yield built
    built.close()


def updates(core: EngineCore, *messages: AddRequest) -> dict[str, list[RequestUpdate]]:
    for message in messages:
        core.add(message)
    found: dict[str, list[RequestUpdate]] = {message.request_ids[0]: [] for message in messages}
    while core.has_work():
        for update in core.step():
            found[update.request_id].append(update)
    return found


def test_only_those_who_asked_are_told(core: EngineCore) -> None:
    asked = AddRequest(["asked"], [1], PROMPT, PARAMS, 0, "a", progress=True)
    silent = AddRequest(["silent"], [1], PROMPT, PARAMS, 0, "b")
    found = updates(core, asked, silent)
    computed = [update.num_computed for update in found["asked"]]
    assert computed[-2:] == [0, 0]  # the tokens
    assert computed[:-2] == sorted(set(computed[:-2]))
    assert len(computed) >= 5
    assert 0 < computed[0] < computed[-3] < 100
    assert [update.num_computed for update in found["silent"]] == [0, 0]


def test_it_begins_behind_what_was_cached(core: EngineCore, smollm2_path: Path) -> None:
    updates(core, AddRequest(["first"], [1], PROMPT[:50], PARAMS, 0, "c"))
    message = AddRequest(["second"], [1], PROMPT, PARAMS, 0, "c", progress=True)
    stream = RequestStream("x", ["second"], PROMPT, PARAMS, load_tokenizer(smollm2_path))
    pieces = [stream.push(update) for update in updates(core, message)["second"]]
    told = [(piece.num_cached_tokens, piece.num_computed, len(piece.outputs)) for piece in pieces if piece is not None]
    assert told[0] == (48, 80, 0)
    assert all(count == 1 for _, _, count in told[1:])
