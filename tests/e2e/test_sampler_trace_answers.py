"""Traces in whole answers of the real model: one a token, whatever is held back, cut off or taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aphrodite.llm import LLM
from aphrodite.outputs import CompletionOutput
from aphrodite.sampling.params import SamplingParams

PROMPT = "Once upon a time, in a village by the sea,"
WRITING = SamplingParams(
    max_tokens=24, temperature=1.1, min_p=0.05, repetition_penalty=1.1, dry_multiplier=0.8, seed=5, sampler_trace=True
)


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_num_seqs=4, kv_cache_memory=256 << 20) as loaded:
        yield loaded


def answers(llm: LLM, params: SamplingParams) -> list[CompletionOutput]:
    return llm.generate(PROMPT, params, progress=False)[0].outputs


def check(answer: CompletionOutput) -> None:
    assert answer.sampler_trace is not None
    assert [trace.token_id for trace in answer.sampler_trace] == answer.token_ids
    for trace in answer.sampler_trace:
        first, last = trace.stages[0], trace.stages[-1]
        assert first.stage == "model"
        assert last.rank > 0
        assert 0 < last.probability <= 1.0001
        assert last.candidates <= first.candidates


def untraced(params: SamplingParams) -> SamplingParams:
    return msgspec.structs.replace(params, sampler_trace=False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n": 2, "logprobs": 2},
        {"temperature": 0.0},
        {"stop": (" the",)},
        {"mirostat_mode": 2, "min_p": 0.0},
    ],
)
def test_one_trace_a_token_and_the_same_text(llm: LLM, changes: dict[str, object]) -> None:
    params = msgspec.structs.replace(WRITING, **changes)
    for answer, plain in zip(answers(llm, params), answers(llm, untraced(params)), strict=True):
        assert answer.token_ids == plain.token_ids
        assert answer.text == plain.text
        assert plain.sampler_trace is None
        check(answer)


def test_traces_go_back_with_banned_text(llm: LLM) -> None:
    (free,) = answers(llm, WRITING)
    word = free.text.split()[2]
    params = msgspec.structs.replace(WRITING, banned_strings=(word,))
    (answer,) = answers(llm, params)
    assert word.lower() not in answer.text.lower()
    assert answer.token_ids != free.token_ids
    check(answer)
    assert answer.token_ids == answers(llm, untraced(params))[0].token_ids
