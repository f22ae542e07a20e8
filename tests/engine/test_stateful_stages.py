"""Stages that remember: their tokens do not depend on preemption, planning ahead, chunks or neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from engine_answers import MakeCore, drain, fresh_cores, tokens_of

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.params import SamplingParams

SETTINGS = [
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(repetition_penalty=1.3, repetition_penalty_range=12, repetition_penalty_slope=0.5),
    SamplingParams(dry_multiplier=1.5, dry_allowed_length=1, dry_sequence_breakers=(), temperature=0.5),
    SamplingParams(no_repeat_ngram_size=2),
    SamplingParams(xtc_probability=0.5, xtc_threshold=0.001),
    SamplingParams(mirostat_mode=1, mirostat_tau=3.0),
    SamplingParams(mirostat_mode=2, mirostat_tau=3.0, mirostat_eta=0.5),
    SamplingParams(adaptive_target=0.2, min_p=0.3),
]
PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(20 + 7 * i)] for i in range(len(SETTINGS))]
MAX_TOKENS = 30


@pytest.fixture(params=["native", "torch"])
def make_core(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[MakeCore]:
    choice = {"executor": "native"} if request.param == "native" else {"executor": "torch", "dtype": "float32"}
    with fresh_cores(tiny_model, load_format="dummy", **choice) as make:
        yield make


def answers(core: EngineCore, numbers: range = range(len(SETTINGS))) -> list[list[int]]:
    """Tokens of the settings in `numbers`, all at once."""
    for number in numbers:
        params = msgspec.structs.replace(SETTINGS[number], max_tokens=MAX_TOKENS, ignore_eos=True)
        core.add(AddRequest([str(number)], [number], PROMPTS[number], params, 0, None))
    tokens = tokens_of(drain(core))
    assert all(len(answer) == MAX_TOKENS for answer in tokens.values())
    return [tokens[str(number)] for number in numbers]


def test_neighbours_do_not_change_tokens(make_core: MakeCore) -> None:
    core = make_core(enable_prefix_caching=False)
    alone = [answers(core, range(number, number + 1))[0] for number in range(len(SETTINGS))]
    assert answers(make_core()) == alone


def test_preemption_does_not_change_tokens(make_core: MakeCore) -> None:
    roomy = make_core()
    blocks = -(-(max(map(len, PROMPTS)) + MAX_TOKENS) // 16) + 3
    tight = make_core(kv_cache_memory=blocks * roomy.runner.executor.kv_bytes_per_block, max_model_len=112)
    assert answers(tight) == answers(roomy)
    assert tight.stats().num_preemptions > 0


def test_planning_ahead_and_chunks_do_not_change_tokens(make_core: MakeCore) -> None:
    assert answers(make_core(async_depth=1, max_num_batched_tokens=16)) == answers(make_core())
