"""Guided answers in the whole engine: what they may and may not depend on, and what their neighbours notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_answers import MakeCore, drain, fresh_cores, small_tokenizer, tokens_of

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.errors import InvalidRequestError
from aphrodite.llm import LLM
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer

PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 100))]
NEGATIVES: list[tuple[int, ...]] = [
    tuple(3 + (5 * i + 11 * j) % 300 for j in range(length)) for i, length in enumerate((100, 1, 33, 0, 48, 7))
]
FREE = SamplingParams(max_tokens=24, temperature=1.2, ignore_eos=True, repetition_penalty=1.1, min_p=0.01)


def guided(number: int, **fields: Any) -> SamplingParams:
    """Each prompt its own negative prompt and scale."""
    fields = {"guidance_scale": 1.5 + number / 2, "negative_prompt_ids": NEGATIVES[number], **fields}
    return msgspec.structs.replace(FREE, **fields)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture
def make_core(tiny_model: Path, tokenizer: Tokenizer) -> Iterator[MakeCore]:
    with fresh_cores(tiny_model, tokenizer, load_format="dummy", max_num_seqs=16) as make:
        yield make


def answer(core: EngineCore, **fields: Any) -> dict[str, list[int]]:
    """Every prompt's answer, all at once; every second request is not guided."""
    for number, prompt in enumerate(PROMPTS):
        params = guided(number, **fields) if number % 2 == 0 else FREE
        core.add(AddRequest([str(number)], [7], prompt, params, 0, None))
    return tokens_of(drain(core))


@pytest.fixture
def expected(make_core: MakeCore) -> dict[str, list[int]]:
    """Every answer alone."""
    tokens = {}
    for number, prompt in enumerate(PROMPTS):
        core = make_core()
        core.add(AddRequest([str(number)], [7], prompt, guided(number) if number % 2 == 0 else FREE, 0, None))
        tokens |= tokens_of(drain(core))
    return tokens


def test_neighbours_do_not_notice(make_core: MakeCore, expected: dict[str, list[int]]) -> None:
    assert answer(make_core()) == expected
    free = answer(make_core(), guidance_scale=1.0)
    for number in range(len(PROMPTS)):
        assert (free[str(number)] == expected[str(number)]) == (number % 2 == 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"async_depth": 1},
        {"max_num_batched_tokens": 23},
        {"max_num_batched_tokens": 2, "async_depth": 1},
        {"enable_prefix_caching": False, "async_depth": 1},
        {"max_num_seqs": 2},
        {"max_num_seqs": 3, "async_depth": 1},
        {"executor": "torch", "dtype": "float32", "async_depth": 1},
    ],
)
def test_how_the_engine_runs_does_not_change_a_guided_answer(
    make_core: MakeCore, settings: dict[str, object], expected: dict[str, list[int]]
) -> None:
    if "executor" in settings:  # another order of additions: compare with itself
        expected = answer(make_core(**{**settings, "async_depth": 0}))
    assert answer(make_core(**settings)) == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_preemption_takes_both_sequences_and_changes_nothing(
    make_core: MakeCore, expected: dict[str, list[int]], depth: int
) -> None:
    roomy = make_core()
    core = make_core(
        kv_cache_memory=17 * roomy.runner.executor.kv_bytes_per_block, max_model_len=128, async_depth=depth
    )
    assert answer(core) == expected
    assert core.stats().num_preemptions > 0
    assert core.stats().kv_usage == 0.0


@pytest.mark.parametrize("depth", [0, 1])
def test_banned_text_takes_both_sequences_back(make_core: MakeCore, tokenizer: Any, depth: int) -> None:
    params = guided(0, logprobs=1, mirostat_mode=2, frequency_penalty=0.5)
    free = make_core()
    free.add(AddRequest(["a", "b"], [7, 8], PROMPTS[4], params, 0, None))
    text = "".join(map(tokenizer.decode, tokens_of(drain(free)).values())).lower()
    banned = tuple(dict.fromkeys(char for char in text if char.isascii() and char.isprintable()))[:6]
    assert len(banned) == 6
    params = msgspec.structs.replace(params, banned_strings=banned)
    found = []
    for settings in ({}, {"async_depth": depth, "max_num_batched_tokens": 7}):
        core = make_core(**settings)
        core.add(AddRequest(["a", "b"], [7, 8], PROMPTS[4], params, 0, None))
        found.append(tokens_of(drain(core)))
    assert found[0] == found[1]
    for tokens in found[0].values():
        assert len(tokens) == params.max_tokens
        assert not set(banned) & set(tokenizer.decode(tokens).lower())


def test_each_of_several_answers_has_its_own_pair(make_core: MakeCore) -> None:
    core = make_core()
    core.add(AddRequest(["a", "b", "c"], [7, 8, 9], PROMPTS[5], guided(0), 0, None))
    several = tokens_of(drain(core))
    for name, seed in zip("abc", (7, 8, 9), strict=True):
        alone = make_core()
        alone.add(AddRequest([name], [seed], PROMPTS[5], guided(0), 0, None))
        assert tokens_of(drain(alone))[name] == several[name]
    # The prompts of both kinds were computed once, up to their last blocks.
    steps = make_core(max_num_batched_tokens=2048)
    steps.add(AddRequest(["a", "b", "c"], [7, 8, 9], PROMPTS[5], guided(0), 0, None))
    computed = 0
    while steps.has_work():
        plan = steps.scheduler.schedule()
        assert plan is not None
        computed += plan.num_tokens
        steps.scheduler.commit(plan, steps.runner.collect(plan, steps.runner.launch(plan)).result)
    once = len(PROMPTS[5]) + len(NEGATIVES[0])
    assert computed < once + 2 * 2 * 16 + 3 * 2 * 24


def test_a_second_request_finds_the_negative_prompt_in_the_cache(make_core: MakeCore) -> None:
    core = make_core()
    plans = []
    schedule = core.scheduler.schedule
    core.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]  # type: ignore[method-assign]
    for number in (2, 3):
        params = msgspec.structs.replace(guided(0), max_tokens=2)
        core.add(AddRequest([str(number)], [7], PROMPTS[number], params, 0, None))
        drain(core)
    starts = [step.start for plan in plans if plan for step in plan.steps if plan.starts]
    assert starts == [0, 0, 0, len(NEGATIVES[0]) // 16 * 16]


def test_the_longer_of_the_two_ends_the_answer(make_core: MakeCore) -> None:
    core = make_core(max_model_len=128)
    params = msgspec.structs.replace(guided(0), max_tokens=None)
    core.add(AddRequest(["r"], [7], PROMPTS[0], params, 0, None))
    updates = drain(core)
    assert len(tokens_of(updates)["r"]) == 128 - len(NEGATIVES[0])
    assert updates[-1].finish_reason == "length"


def test_an_abort_frees_both(make_core: MakeCore, expected: dict[str, list[int]]) -> None:
    core = make_core(async_depth=1)
    for name in "xyz":
        core.add(AddRequest([name], [7], PROMPTS[5], guided(0), 0, None))
    for _ in range(3):
        core.step()
    core.abort(list("xyz"))
    drain(core)
    assert core.stats().kv_usage == 0.0
    assert answer(core) == expected


def test_where_a_row_fails_its_pair_ends_and_others_go_on(
    make_core: MakeCore, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()
    core.add(AddRequest(["bad"], [7], PROMPTS[5], guided(4), 0, None))
    core.add(AddRequest(["1"], [7], PROMPTS[1], FREE, 0, None))
    forward = core.runner.executor.forward  # type: ignore[attr-defined]

    def damaged(inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(inputs)
        if len(logits) == 3:
            logits[1] = torch.nan  # the row behind the negative prompt
        return logits

    monkeypatch.setattr(core.runner.executor, "forward", damaged)
    updates = drain(core)
    (error,) = [update for update in updates if update.request_id == "bad" and update.finish_reason]
    assert error.finish_reason == "error"
    assert "non-finite" in (error.error or "")
    assert tokens_of([update for update in updates if update.request_id == "1"])["1"] == expected["1"]
    assert core.stats().kv_usage == 0.0


# The real model, and texts.


SIZES: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory": 128 << 20, "max_num_seqs": 4, "threads": 1}


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, device="cpu", **SIZES) as llm:
        yield llm


PROMPT, NEGATIVE = "The weather today is", "I hate rain, and the weather today is"


def test_greedy_tokens_on_the_real_model_are_those_of_the_definition(smollm2_path: Path, smollm2_oracle: Any) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=0.0, ignore_eos=True, guidance_scale=1.8, negative_prompt=NEGATIVE, logprobs=0
    )
    with LLM(smollm2_path, dtype="float32", executor="torch", device="cpu", **SIZES) as llm:
        output = llm.generate(PROMPT, params, progress=False)[0]
        negative = llm.tokenizer.encode(NEGATIVE, add_special_tokens=True)
    tokens = output.outputs[0].token_ids
    with torch.inference_mode():
        c, u = (
            smollm2_oracle(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for prompt in (output.prompt_token_ids, negative)
        )
    scores = (u + 1.8 * (c - u)).log_softmax(-1)
    assert scores.argmax(-1).tolist() == tokens
    entries = output.outputs[0].logprobs
    assert entries is not None
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert [entry.logprob for entry in entries] == pytest.approx(chosen.tolist(), abs=2e-3)


def test_texts_streams_and_chats(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, seed=3, guidance_scale=1.5, negative_prompt=NEGATIVE, stop=("zzz",))
    ids = tuple(llm.tokenizer.encode(NEGATIVE, add_special_tokens=True))
    whole = llm.generate(PROMPT, params, progress=False)[0].outputs[0]
    same = msgspec.structs.replace(params, negative_prompt="", negative_prompt_ids=ids)
    assert llm.generate(PROMPT, same, progress=False)[0].outputs[0].text == whole.text
    assert "".join(piece.outputs[0].text for piece in llm.stream(PROMPT, params)) == whole.text

    messages = [{"role": "system", "content": "Talk like a pirate."}, {"role": "user", "content": "Who are you?"}]
    params = msgspec.structs.replace(params, negative_prompt="You are a librarian.")
    other = llm.encode_chat([{"role": "system", "content": "You are a librarian."}, messages[1]])
    same = msgspec.structs.replace(params, negative_prompt="", negative_prompt_ids=tuple(other))
    chat = llm.chat(messages, params, progress=False)[0].outputs[0]
    assert llm.generate(llm.encode_chat(messages), same, progress=False)[0].outputs[0].text == chat.text
    assert "".join(piece.outputs[0].text for piece in llm.stream(messages, params)) == chat.text


def test_without_a_negative_prompt_the_last_token_stands_for_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, guidance_scale=1.5)
    last = msgspec.structs.replace(
        params, negative_prompt_ids=(llm.tokenizer.encode(PROMPT, add_special_tokens=True)[-1],)
    )
    assert llm.generate(PROMPT, params, progress=False)[0].outputs[0].token_ids == (
        llm.generate(PROMPT, last, progress=False)[0].outputs[0].token_ids
    )


def test_what_cannot_run_is_refused_by_name(llm: LLM, smollm2_path: Path) -> None:
    def refused(**fields: Any) -> str | None:
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(PROMPT, SamplingParams(guidance_scale=2.0, **fields), progress=False)
        return caught.value.param

    assert refused(negative_prompt="x " * 400) == "negative_prompt"
    assert refused(negative_prompt="x " * 200, max_tokens=80) == "negative_prompt"
    assert refused(negative_prompt_ids=(1 << 20,)) == "negative_prompt_ids"
    assert refused(negative_prompt="\ud800") == "negative_prompt"
    scored = llm.generate(PROMPT, SamplingParams(guidance_scale=2.0, max_tokens=0, prompt_logprobs=0), progress=False)
    assert scored[0].prompt_logprobs is not None
