"""Answers under grammars in the whole engine: what is finished fits, however it was computed, and costs nobody else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from engine_answers import answers_to, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer

PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 100))]
WRITING = SamplingParams(max_tokens=200, temperature=1.4, seed=11)
FREE = SamplingParams(max_tokens=24, temperature=1.4, seed=7, ignore_eos=True)
PATTERN = r"[a-m]{3,9} (\d\d )*[x-z]{4}"

MakeCore = Callable[..., EngineCore]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer(["<end>"])


answers = partial(answers_to, PROMPTS)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose answers are short."""
    words = st.text("abcd é", min_size=1, max_size=5)
    plain = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 6}]),
        st.tuples(st.integers(-50, 50), st.integers(0, 90)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
        ),
        st.lists(st.one_of(words, st.integers(), st.booleans()), min_size=1, max_size=3).map(lambda v: {"enum": v}),
        st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"const": {"a": [1]}}]),
    )
    return st.recursive(
        plain,
        lambda inner: st.one_of(
            st.tuples(inner, st.integers(0, 2)).map(
                lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 1}
            ),
            st.dictionaries(words, inner, max_size=3).map(
                lambda fields: {
                    "type": "object",
                    "properties": fields,
                    "required": list(fields)[1:],
                    "additionalProperties": False,
                }
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        ),
        max_leaves=4,
    )


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(wanted=st.lists(schemas(), min_size=6, max_size=6))
def test_every_finished_answer_is_valid_json_of_its_schema(
    make_core: MakeCore, tokenizer: Tokenizer, wanted: list[dict[str, Any]]
) -> None:
    requests = [from_mapping({"guided_json": schema, "n": 2}, base=WRITING) for schema in wanted]
    finished = 0
    for schema, found in zip(wanted, answers(make_core(), tokenizer, requests), strict=True):
        for answer in found:
            assert answer.finish_reason in ("stop", "length"), (schema, answer.error)
            if answer.finish_reason == "stop":
                finished += 1
                jsonschema_rs.validate(schema, json.loads(answer.text))
    assert finished >= 8


def test_regexes_choices_and_grammars(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    choices = ["sea", "seashell", "the sea – é"]
    fields: list[dict[str, Any]] = [
        {"guided_regex": PATTERN},
        {"guided_choice": choices},
        {"grammar": 'root ::= "(" root ")" | [a-z]{2}'},
        {"guided_regex": "[a-z]{5}", "ignore_eos": True, "min_tokens": 100, "max_tokens": 150},
        {"guided_regex": "[a-z]{5}", "stop": ["q"], "temperature": 0},
    ]
    found = answers(make_core(), tokenizer, [from_mapping({"n": 3, **one}, base=WRITING) for one in fields])
    for answer in (answer for group in found for answer in group):
        assert answer.finish_reason == "stop", answer
    ended = [[answer.text for answer in group] for group in found]
    assert all(re.fullmatch(PATTERN, text) for text in ended[0])
    assert set(ended[1]) <= set(choices)
    assert all(re.fullmatch(r"\(*[a-z]{2}\)*", text) and text.count("(") == text.count(")") for text in ended[2])
    assert all(re.fullmatch("[a-z]{5}", text) for text in ended[3])
    assert {answer.stop_reason for answer in found[3]} == {"grammar_complete"}
    assert len(set(ended[0])) > 1


@pytest.mark.parametrize(
    "changes",
    [
        {"async_depth": 1},
        {"max_num_batched_tokens": 24},
        {"kv_cache_memory": 160_000, "max_num_seqs": 4},
        {"executor": "torch"},
        {"max_num_seqs": 1},
    ],
)
def test_how_the_engine_runs_does_not_change_an_answer(
    make_core: MakeCore, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    """Steps ahead, prompts in chunks, preemption, other kernels, alone: the same text."""
    fields: list[dict[str, Any]] = [
        {"guided_regex": PATTERN}, {}, {"guided_json": {"type": "array", "items": {"type": "integer"}, "maxItems": 9}},
        {"guided_regex": PATTERN, "banned_strings": ["a", "x"]}, {"guided_choice": ["tea", "teapot"]},
        {"guided_regex": "[a-z ]{30}", "repetition_penalty": 1.2, "top_p": 0.9, "tfs": 0.95},
    ]  # fmt: skip
    requests = [from_mapping({"max_tokens": 40, **one}, base=WRITING) for one in fields]
    expected = answers(make_core(), tokenizer, requests)
    found = answers(make_core(**changes), tokenizer, requests)
    assert [group[0].text for group in found] == [group[0].text for group in expected]
    assert [group[0].finish_reason for group in found] == [group[0].finish_reason for group in expected]


def test_neighbours_are_left_alone(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    core = make_core()
    bound = from_mapping({"guided_regex": PATTERN}, base=WRITING)
    dead = from_mapping({"guided_regex": r"\d{3}", "custom_token_bans": list(range(15, 25))}, base=WRITING)
    alone = answers(core, tokenizer, [FREE] * 6)
    mixed = answers(core, tokenizer, [FREE, bound, FREE, dead, FREE, bound])
    for number in (0, 2, 4):
        assert mixed[number][0].token_ids == alone[number][0].token_ids


def test_where_bans_leave_nothing_the_request_fails_with_the_reason(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    digits = [tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "0123456789"]
    dead, fine = answers(
        make_core(),
        tokenizer,
        [
            from_mapping({"guided_regex": r"a\d", "custom_token_bans": digits}, base=WRITING),
            from_mapping({"guided_regex": r"a\d", "custom_token_bans": digits[1:]}, base=WRITING),
        ],
    )
    assert dead[0].finish_reason == "error"
    assert "the grammar" in (dead[0].error or "")
    assert fine[0].text == "a0"


def test_banned_text_is_avoided_as_far_as_the_grammar_lets_it(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    banned = ["a", "e", "th", "no"]
    requests = [
        from_mapping({"guided_regex": "[a-z ]{20}", "banned_strings": banned, "n": 4}, base=WRITING),
        from_mapping({"guided_choice": ["none"], "banned_strings": banned}, base=WRITING),
    ]
    avoided, forced = answers(make_core(), tokenizer, requests)
    for answer in avoided:
        assert re.fullmatch("[a-z ]{20}", answer.text)
        assert not any(text in answer.text for text in banned)
        assert answer.warnings == []
    assert forced[0].text == "none"
    assert forced[0].warnings


def test_log_probabilities_are_the_models_or_those_drawn_from(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    base = msgspec.structs.replace(WRITING, logprobs=2, sampler_trace=True)
    fields = {"guided_choice": ["ab", "cd"]}
    for mode in ("raw", "processed"):
        ((answer,),) = answers(make_core(), tokenizer, [from_mapping({**fields, "logprobs_mode": mode}, base=base)])
        assert answer.logprobs is not None
        assert answer.sampler_trace is not None
        assert len(answer.logprobs) == len(answer.sampler_trace) == len(answer.token_ids) == 2
        forced = answer.logprobs[1].logprob
        assert forced == 0 if mode == "processed" else forced < -0.5
        assert [stage.stage for stage in answer.sampler_trace[0].stages][:2] == ["model", "grammar"]
        assert answer.sampler_trace[0].stages[1].candidates == 2


def test_guided_and_aborted_requests(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    core = make_core()
    core.add(AddRequest(["a", "b"], [1, 2], PROMPTS[0], from_mapping({"guided_regex": "z{5}"}, base=WRITING), 0, None))
    core.abort(["a"])
    guided = from_mapping({"guided_regex": PATTERN, "guidance_scale": 1.5}, base=WRITING)
    done = {}
    core.add(AddRequest(["c"], [1], PROMPTS[1], guided, 0, None))
    while core.has_work():
        for update in core.step():
            assert update.request_id != "a"
            done.setdefault(update.request_id, []).extend(update.token_ids)
    assert tokenizer.decode(done["b"]) == "zzzzz"
    assert re.fullmatch(PATTERN, tokenizer.decode(done["c"]))


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    """The front ends try grammars before; the engine does not rely on that."""
    bad, good = answers(make_core(), tokenizer, [from_mapping({"guided_regex": "("}, base=WRITING), FREE])
    assert bad[0].finish_reason == "error"
    assert "regular expression" in (bad[0].error or "")
    assert good[0].finish_reason == "length"
