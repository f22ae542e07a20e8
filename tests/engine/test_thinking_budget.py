"""Budgets of reasoning in the whole engine: the mark comes exactly there, however the answer is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
from engine_answers import answers_to, small_tokenizer

from aphrodite.engine.core import EngineCore
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.tokenizer.tokenizer import Tokenizer

PROMPTS = [[3 + (7 * i + 13 * j) % 250 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 100))]
MARKS = {"text": ReasoningMarks("<think>", "</think>", True), "token": ReasoningMarks("<in>", "<out>", True)}
WRITING = SamplingParams(max_tokens=40, temperature=1.4, seed=11, ignore_eos=True, skip_special_tokens=False)

MakeCore = Callable[..., EngineCore]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With two marks and the end of an answer."""
    return small_tokenizer(["<in>", "<out>", "<end>"])


answers = partial(answers_to, PROMPTS)


def thinking(budget: int | None, marks: str = "text", **fields: Any) -> SamplingParams:
    params = from_mapping({"thinking_token_budget": budget, **fields}, base=WRITING)
    return msgspec.structs.replace(params, reasoning=MARKS[marks])


@pytest.mark.parametrize("marks", ["text", "token"])
def test_the_mark_comes_after_exactly_so_many_tokens(make_core: MakeCore, tokenizer: Tokenizer, marks: str) -> None:
    closing = tokenizer.encode(MARKS[marks].end, add_special_tokens=False)
    assert (len(closing) == 1) == (marks == "token")
    core = make_core()
    free, *limited = (
        answers(core, tokenizer, [thinking(None, n=2)])[0],
        *(answers(core, tokenizer, [thinking(budget, marks, n=2)])[0] for budget in (0, 1, 13, 39, 500)),
    )
    assert free[0].token_ids != free[1].token_ids
    for budget, found in zip((0, 1, 13, 39, 500), limited, strict=True):
        for one, other in zip(found, free, strict=True):
            closes = MARKS[marks].end in tokenizer.decode(other.token_ids[:budget], skip_special_tokens=False)
            expected = other.token_ids if closes else [*other.token_ids[:budget], *closing][:40]
            assert one.token_ids[: len(expected)] == expected
            assert len(one.token_ids) == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"async_depth": 1},
        {"max_num_batched_tokens": 24},
        {"kv_cache_memory": 160_000, "max_num_seqs": 4},
        {"executor": "torch"},
        {"max_num_seqs": 2},
    ],
)
def test_how_the_engine_runs_does_not_change_an_answer(
    make_core: MakeCore, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    """Steps ahead, prompts in chunks, preemption, other kernels, two at a time: the same text."""
    requests = [
        thinking(7), thinking(0, "token", n=2), thinking(None), thinking(12, banned_strings=["e", "a", "t"]),
        thinking(9, mirostat_mode=2, mirostat_tau=4), thinking(20, dry_multiplier=0.8, logprobs=2, tfs=0.9),
        thinking(5, guidance_scale=1.5) if changes.get("max_num_seqs") != 2 else thinking(5),
    ]  # fmt: skip
    expected = answers(make_core(), tokenizer, requests)
    found = answers(make_core(**changes), tokenizer, requests)
    assert [[one.token_ids for one in group] for group in found] == [[one.token_ids for one in g] for g in expected]
    for number, budget in enumerate((7, 0, None, 12, 9, 20, 5)):
        mark = MARKS["token" if number == 1 else "text"].end
        assert all((mark in one.text) == (budget is not None) for one in found[number])


def test_neighbours_and_bans(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    core = make_core()
    alone = answers(core, tokenizer, [WRITING] * 6)
    mixed = answers(core, tokenizer, [WRITING, thinking(3), WRITING, thinking(8, "token"), WRITING, thinking(0)])
    for number in (0, 2, 4):
        assert mixed[number][0].token_ids == alone[number][0].token_ids
    slash = tokenizer.encode("/", add_special_tokens=False)
    (banned,), (let_through,) = answers(
        core, tokenizer, [thinking(3, custom_token_bans=slash), thinking(3, banned_strings=["think"])]
    )
    assert banned.finish_reason == "error"
    assert "thinking_token_budget" in (banned.error or "")
    assert "</think>" in let_through.text  # a phrase that nothing can take the place of
    assert let_through.warnings


def test_stops_and_grammars_behind_the_mark(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    behind = 'start: thought answer\nthought[suffix="</think>"]: /(.|\\n)*/\nanswer: %json {"type":"boolean"}'
    stopped, bound = answers(
        make_core(),
        tokenizer,
        [thinking(6, stop=["think>"]), thinking(6, grammar={"kind": "lark", "text": behind}, ignore_eos=False)],
    )
    assert stopped[0].text.endswith("</")
    assert (stopped[0].finish_reason, stopped[0].stop_reason) == ("stop", "think>")
    closing = tokenizer.encode("</think>", add_special_tokens=False)
    assert bound[0].token_ids[6 : 6 + len(closing)] == closing
    assert json.loads(bound[0].text.partition("</think>")[2]) in (True, False)


def test_traces_and_log_probabilities_show_what_was_forced(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    for mode, certain in (("raw", False), ("processed", True)):
        fields = {"logprobs": 1, "logprobs_mode": mode, "sampler_trace": mode == "raw", "max_tokens": 5}
        ((answer,),) = answers(make_core(), tokenizer, [thinking(2, "token", **fields)])
        assert answer.logprobs is not None
        assert (answer.logprobs[2].logprob == 0) == certain
        if answer.sampler_trace is not None:
            counts = [trace.stages[1].candidates for trace in answer.sampler_trace]
            assert [trace.stages[1].stage for trace in answer.sampler_trace] == ["thinking_token_budget"] * 5
            assert counts == [320, 320, 1, 320, 320]
