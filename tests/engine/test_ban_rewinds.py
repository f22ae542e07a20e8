"""Bans that rewind in the whole engine: what a request's text may and may not depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import msgspec
import pytest
from engine_answers import MakeCore, drain, fresh_cores, small_tokenizer, tokens_of

from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.llm import LLM
from aphrodite.outputs import CompletionOutput
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer

PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 100))]
BANNED = ("a", "e", "th", "o,", " s")
FIELDS = {"max_tokens": 24, "temperature": 1.5, "ignore_eos": True, "repetition_penalty": 1.1, "min_p": 0.01}
FREE = SamplingParams(seed=7, **FIELDS)  # type: ignore[arg-type]
GUARDED = SamplingParams(seed=7, banned_strings=BANNED, **FIELDS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def make_core(tiny_model: Path, tokenizer: Tokenizer) -> Iterator[MakeCore]:
    with fresh_cores(tiny_model, tokenizer, load_format="dummy") as make:
        yield make


def answer(core: EngineCore, params: SamplingParams = GUARDED) -> dict[str, list[int]]:
    """Every prompt's answer, all at once; every second request has no bans."""
    for number, prompt in enumerate(PROMPTS):
        core.add(AddRequest([str(number)], [7], prompt, params if number % 2 else FREE, 0, None))
    return tokens_of(drain(core))


@pytest.fixture
def expected(make_core: MakeCore) -> dict[str, list[int]]:
    """Every answer alone."""
    tokens = {}
    for number, prompt in enumerate(PROMPTS):
        core = make_core()
        core.add(AddRequest([str(number)], [7], prompt, GUARDED if number % 2 else FREE, 0, None))
        tokens |= tokens_of(drain(core))
    return tokens


def test_bans_hold_and_neighbours_do_not_notice(
    make_core: MakeCore, expected: dict[str, list[int]], tokenizer: Tokenizer
) -> None:
    free = answer(make_core(), FREE)
    assert answer(make_core()) == expected
    for number in range(len(PROMPTS)):
        name = str(number)
        text = tokenizer.decode(expected[name]).lower()
        if number % 2 == 0:
            assert expected[name] == free[name]
            continue
        assert len(expected[name]) == GUARDED.max_tokens
        assert not any(phrase in text for phrase in BANNED)
        assert any(phrase in tokenizer.decode(free[name]).lower() for phrase in BANNED), "the test bans nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"async_depth": 1},
        {"max_num_batched_tokens": 23},
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": False, "async_depth": 1},
        {"max_num_seqs": 2},
        {"executor": "torch", "dtype": "float32", "async_depth": 1},
    ],
)
def test_how_the_engine_runs_does_not_change_a_guarded_answer(
    make_core: MakeCore, settings: dict[str, object], expected: dict[str, list[int]]
) -> None:
    if "executor" in settings:  # another order of additions: compare with itself
        expected = answer(make_core(**{**settings, "async_depth": 0}))
    assert answer(make_core(**settings)) == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_while_text_is_held_does_not_change_it(
    make_core: MakeCore, expected: dict[str, list[int]], depth: int
) -> None:
    roomy = make_core()
    blocks = -(-(max(map(len, PROMPTS)) + 24) // 16) + 3
    core = make_core(
        kv_cache_memory=blocks * roomy.runner.executor.kv_bytes_per_block, max_model_len=128, async_depth=depth
    )
    assert answer(core) == expected
    assert core.stats().num_preemptions > 0


SAMPLERS: dict[str, dict[str, object]] = {
    "mirostat 1": {"mirostat_mode": 1, "mirostat_tau": 5.0, "mirostat_eta": 0.3},
    "mirostat 2": {"mirostat_mode": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.3},
    "adaptive-p": {"adaptive_target": 0.1, "adaptive_decay": 0.7},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.005},
    "history": {
        "dry_multiplier": 1.0,
        "dry_allowed_length": 1,
        "no_repeat_ngram_size": 2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "repetition_penalty_range": 12,
    },
}


def details_of(updates: list[RequestUpdate]) -> dict[str, list[tuple[object, ...]]]:
    """Tokens with their log-probabilities and traces, which are always of the tokens that leave."""
    details: dict[str, list[tuple[object, ...]]] = {}
    for update in updates:
        assert update.error is None, update.error
        assert update.logprobs is not None or not update.token_ids
        traces = update.traces or [None] * len(update.token_ids)
        for entry in zip(update.token_ids, update.logprobs or [], traces, strict=True):
            assert entry[1].token_id == entry[0]
            assert entry[2] is None or entry[2].token_id == entry[0]
            details.setdefault(update.request_id, []).append(entry)
    return details


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_samplers_remember_goes_back_with_the_text(
    make_core: MakeCore, tokenizer: Tokenizer, name: str, traced: bool
) -> None:
    """Alone, in a batch, with a step in flight, and preempted: the same tokens, log-probabilities and traces."""
    fields = {**FIELDS, **SAMPLERS[name], "logprobs": 2, "sampler_trace": traced}
    params = SamplingParams(seed=7, banned_strings=BANNED, **fields)  # type: ignore[arg-type]
    prompts = {str(number): PROMPTS[number] for number in (1, 3, 4, 5)}

    def details(core: EngineCore, names: Iterable[str], params: SamplingParams = params) -> dict[str, object]:
        for one in names:
            core.add(AddRequest([one], [7], prompts[one], params, 0, None))
        return dict(details_of(drain(core)))

    expected: dict[str, object] = {}
    for one in prompts:
        expected |= details(make_core(), [one])
    free = details(make_core(), prompts, msgspec.structs.replace(params, banned_strings=()))
    assert expected != free, "nothing had to go back"
    roomy = make_core()
    blocks = -(-(max(map(len, PROMPTS)) + 24) // 16) + 3
    tight = make_core(
        kv_cache_memory=blocks * roomy.runner.executor.kv_bytes_per_block, max_model_len=128, async_depth=1
    )
    for core in (roomy, make_core(async_depth=1, max_num_batched_tokens=23), tight):
        assert details(core, prompts) == expected
    assert tight.stats().num_preemptions > 0
    for found in expected.values():
        text = tokenizer.decode([entry[0] for entry in found]).lower()  # type: ignore[attr-defined]
        assert not any(phrase in text for phrase in BANNED)


def test_a_prefix_left_by_rewound_answers_serves_others(make_core: MakeCore, expected: dict[str, list[int]]) -> None:
    core = make_core()
    assert answer(core) == expected
    continued = [PROMPTS[5] + expected["5"][:count] for count in (12, 20, 24)]
    for prompt in continued:
        fresh = make_core()
        for one in (core, fresh):
            one.add(AddRequest(["next"], [7], prompt, FREE, 0, None))
        hits = core.stats().prefix_hits
        assert tokens_of(drain(core)) == tokens_of(drain(fresh))
        assert core.stats().prefix_hits - hits >= (len(PROMPTS[5]) // 16) * 16


def test_each_of_several_answers_is_guarded_by_itself(make_core: MakeCore, expected: dict[str, list[int]]) -> None:
    core = make_core()
    core.add(AddRequest(["a", "b", "c"], [7, 8, 9], PROMPTS[3], GUARDED, 0, None))
    several = tokens_of(drain(core))
    assert several["a"] == expected["3"]
    for name, seed in (("b", 8), ("c", 9)):
        alone = make_core()
        alone.add(AddRequest([name], [seed], PROMPTS[3], GUARDED, 0, None))
        assert tokens_of(drain(alone))[name] == several[name]


def test_where_everything_is_barred_the_text_is_let_through(make_core: MakeCore, tokenizer: Tokenizer) -> None:
    (only,) = tokenizer.encode("x", add_special_tokens=False)
    params = from_mapping({"max_tokens": 5, "allowed_token_ids": [only], "banned_strings": ["x"], "ignore_eos": True})
    for depth in (0, 1):
        core = make_core(async_depth=depth)
        core.add(AddRequest(["r"], [1], PROMPTS[0], params, 0, None))
        updates = drain(core)
        assert tokens_of(updates)["r"] == [only] * 5
        assert updates[-1].finish_reason == "length"
        assert updates[-1].warning is not None


def test_an_abort_while_text_is_held_leaves_no_trace(make_core: MakeCore, expected: dict[str, list[int]]) -> None:
    core = make_core(async_depth=1)
    for name in "xyz":
        core.add(AddRequest([name], [7], PROMPTS[5], GUARDED, 0, None))
    for _ in range(9):
        core.step()
    core.abort(list("xyz"))
    drain(core)
    assert core.stats().kv_usage == 0.0
    assert answer(core) == expected


def test_an_engine_without_a_tokenizer_says_so(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), load_format="dummy", threads=1, kv_cache_memory=4 << 20)
    core = build_engine(config, ()).core
    core.add(AddRequest(["r"], [1], [5], SamplingParams(banned_strings=("x",)), 0, None))
    (update,) = drain(core)
    core.close()
    assert update.finish_reason == "error"
    assert "tokenizer" in (update.error or "")


# The real model, up to the text that leaves.


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=512, kv_cache_memory=64 << 20, max_num_seqs=4, threads=1) as llm:
        yield llm


def write(llm: LLM, prompt: str = "Once upon a time", **fields: object) -> list[CompletionOutput]:
    params = from_mapping({"max_tokens": 48, "temperature": 0, **fields})
    return llm.generate([prompt], params, progress=False)[0].outputs


def test_banned_words_vanish_and_the_rest_stays_as_it_was(llm: LLM) -> None:
    (plain,) = write(llm)
    words = [word for word in plain.text.split() if word.isalpha()]
    for banned in (words[3], words[8].upper(), " ".join(plain.text.split()[10:13])):
        (guarded,) = write(llm, banned_strings=[banned], logprobs=2)
        assert banned.lower() not in guarded.text.lower()
        before = plain.text.lower().index(banned.lower())
        # Everything before the phrase is as without the ban, but for the spaces that go with its first token.
        assert guarded.text.startswith(plain.text[:before].rstrip())
        assert guarded.num_tokens == len(guarded.token_ids) == 48
        assert guarded.logprobs is not None
        assert [entry.token_id for entry in guarded.logprobs] == guarded.token_ids
        assert not guarded.warnings
    (other,) = write(llm, banned_strings=["xylophone quartet"])
    assert (other.text, other.token_ids) == (plain.text, plain.token_ids)


def test_a_stream_of_a_guarded_answer_never_shows_the_phrase(llm: LLM) -> None:
    (plain,) = write(llm)
    word = next(word for word in plain.text.split()[4:] if word.isalpha())
    params = from_mapping({"max_tokens": 48, "temperature": 0, "banned_phrases": f'["{word}"]'})
    seen = ""
    for piece in llm.stream("Once upon a time", params):
        seen += piece.outputs[0].text
        assert word.lower() not in seen.lower()
    assert seen == write(llm, banned_strings=[word])[0].text


def test_stops_and_bans_work_together(llm: LLM) -> None:
    (guarded,) = write(llm, banned_strings=["city"])
    words = guarded.text.split()
    stop = f"{words[6]} {words[7]}"
    (stopped,) = write(llm, banned_strings=["city", f"{stop} {words[8]} {words[9]} {words[10]}!"], stop=[stop])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (
        guarded.text[: guarded.text.index(stop)], "stop", stop,
    )  # fmt: skip


@pytest.mark.parametrize("sampler", [{"mirostat": 2}, {"xtc_probability": 0.5, "min_p": 0.02}, {"skew": -0.5}])
def test_everything_at_once_streams_as_it_is_written_whole(llm: LLM, sampler: dict[str, object]) -> None:
    """Bans, stops, a seed, log-probabilities and traces together."""
    fields = {
        "temperature": 1.2,
        "seed": 3,
        "logprobs": 3,
        "sampler_trace": True,
        "stop_regex": [r"\w+ing\b"],
        **sampler,
    }
    (free,) = write(llm, **fields)
    banned = [word for word in free.text.split() if word.isalpha() and len(word) > 3][:2]
    assert banned
    fields |= {"banned_strings": banned, "banned_regex": ["[aA] b"]}
    (whole,) = write(llm, **fields)
    assert whole.text != free.text
    assert not any(word.lower() in whole.text.lower() for word in (*banned, "a b"))
    params = from_mapping({"max_tokens": 48, **fields})
    pieces = [piece.outputs[0] for piece in llm.stream("Once upon a time", params)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert list(chain.from_iterable(piece.token_ids for piece in pieces)) == whole.token_ids
    assert whole.logprobs is not None
    assert whole.sampler_trace is not None
    assert list(chain.from_iterable(piece.logprobs or [] for piece in pieces)) == whole.logprobs
    assert list(chain.from_iterable(piece.sampler_trace or [] for piece in pieces)) == whole.sampler_trace
    assert [entry.token_id for entry in whole.logprobs] == whole.token_ids
    assert [trace.token_id for trace in whole.sampler_trace] == whole.token_ids
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)
    untraced = write(llm, **{**fields, "sampler_trace": False})[0]
    assert (untraced.text, untraced.token_ids) == (whole.text, whole.token_ids)


def test_a_stop_regex_ends_the_answer_before_its_first_match(llm: LLM) -> None:
    (plain,) = write(llm)
    pattern = r"\b[A-Z]\w+\b"
    (stopped,) = write(llm, stop_regex=[pattern, "never seen"])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", pattern)
    assert plain.text.startswith(stopped.text)
    (kept,) = write(llm, stop_regex=pattern, include_stop_str_in_output=True)
    name = kept.text[len(stopped.text) :]
    assert name.isalpha()
    assert name[0].isupper()
    assert not any(char.isupper() for char in stopped.text)


def test_a_loop_is_ended_when_asked_for(llm: LLM) -> None:
    params = {"max_tokens": 200, "ignore_eos": True, "allowed_token_ids": [260, 281, 339]}
    (endless,) = write(llm, **params)
    assert endless.finish_reason == "length"
    (ended,) = write(llm, **params, repetition_detection={"max_pattern_size": 6, "min_count": 4})
    assert ended.finish_reason == "repetition"
    ids = ended.token_ids
    assert ids == endless.token_ids[: len(ids)]
    assert any(ids[-size:] * 4 == ids[-4 * size :] for size in range(1, 7))
    assert not any(ids[:-1][-size:] * 4 == ids[:-1][-4 * size :] for size in range(1, 7))
