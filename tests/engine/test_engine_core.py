"""What a request's tokens may and may not depend on, on a tiny random model with real kernels."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from engine_answers import MakeCore, drain, fresh_cores, tokens_of

from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.errors import EngineDeadError
from aphrodite.sampling.params import SamplingParams

PROMPTS = [[3 + (7 * i + 13 * j) % 300 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 100))]
SEEDED = SamplingParams(max_tokens=24, temperature=1.5, ignore_eos=True, repetition_penalty=1.1, min_p=0.01, seed=7)


@pytest.fixture(params=["native", "torch"])
def make_core(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[MakeCore]:
    choice = {"executor": "native"} if request.param == "native" else {"executor": "torch", "dtype": "float32"}
    with fresh_cores(tiny_model, load_format="dummy", **choice) as make:
        yield make


def add(core: EngineCore, name: str, prompt: list[int], params: SamplingParams = SEEDED, n: int = 1) -> None:
    seed = params.seed or 0
    names = [name] if n == 1 else [f"{name}.{index}" for index in range(n)]
    core.add(AddRequest(names, [seed + index for index in range(n)], prompt, params, 0, None))


def drained(core: EngineCore) -> dict[str, list[int]]:
    return tokens_of(drain(core))


def alone(make_core: MakeCore, **settings: object) -> dict[str, list[int]]:
    """Every prompt by itself in a fresh engine."""
    results = {}
    for number, prompt in enumerate(PROMPTS):
        core = make_core(**settings)
        add(core, str(number), prompt)
        results |= drained(core)
    return results


def together(core: EngineCore) -> dict[str, list[int]]:
    for number, prompt in enumerate(PROMPTS):
        add(core, str(number), prompt)
    return drained(core)


def test_batch_neighbours_do_not_change_tokens(make_core: MakeCore) -> None:
    expected = alone(make_core)
    assert all(len(tokens) == SEEDED.max_tokens for tokens in expected.values())
    assert together(make_core()) == expected


@pytest.mark.parametrize("chunk", [16, 23, 64])
def test_chunk_size_does_not_change_tokens(make_core: MakeCore, chunk: int) -> None:
    assert together(make_core(max_num_batched_tokens=chunk)) == together(make_core())


def test_planning_ahead_does_not_change_tokens(make_core: MakeCore) -> None:
    assert together(make_core(async_depth=1)) == together(make_core(async_depth=0))


def test_prefix_cache_does_not_change_tokens(make_core: MakeCore) -> None:
    expected = together(make_core(enable_prefix_caching=False))
    core = make_core()
    assert together(core) == expected
    assert core.stats().prefix_hits == 0
    assert together(core) == expected
    assert core.stats().prefix_hits > 0


def test_preemption_does_not_change_tokens(make_core: MakeCore) -> None:
    expected = together(make_core())
    roomy = make_core()
    blocks = -(-(max(map(len, PROMPTS)) + 24) // 16) + 3
    core = make_core(kv_cache_memory=blocks * roomy.runner.executor.kv_bytes_per_block, max_model_len=128)
    assert together(core) == expected
    assert core.stats().num_preemptions > 0


def test_answers_of_one_request_share_the_prompt(make_core: MakeCore) -> None:
    core = make_core(enable_prefix_caching=False)
    prompt = PROMPTS[-1]
    add(core, "many", prompt, n=3)
    computed = 0
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for update in core.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
            computed = max(computed, update.num_cached_tokens)
    assert computed == (len(prompt) - 1) // 16 * 16
    for index in range(3):
        single = make_core()
        add(single, "one", prompt, SamplingParams(**{**_fields(SEEDED), "seed": 7 + index}))
        assert tokens[f"many.{index}"] == drained(single)["one"]


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_an_aborted_request_leaves_its_prefix_and_its_neighbours(make_core: MakeCore) -> None:
    expected = alone(make_core)
    core = make_core()
    for number, prompt in enumerate(PROMPTS):
        add(core, str(number), prompt)
    for _ in range(6):
        core.step()
    core.abort(["5", "unknown"])
    tokens = drained(core)
    assert "5" not in tokens or len(tokens["5"]) < SEEDED.max_tokens  # type: ignore[operator]
    hits = core.stats().prefix_hits
    add(core, "again", PROMPTS[5])
    assert drained(core)["again"] == expected["5"]
    assert core.stats().prefix_hits - hits == (len(PROMPTS[5]) - 1) // 16 * 16


def test_the_first_news_says_how_long_a_request_waited(make_core: MakeCore) -> None:
    core = make_core(max_num_seqs=1)
    add(core, "first", PROMPTS[0])
    add(core, "second", PROMPTS[1])
    waited = {}
    for update in drain(core):
        if update.queue_seconds is not None:
            assert update.request_id not in waited
            waited[update.request_id] = update.queue_seconds
    assert 0 <= waited["first"] < waited["second"]


def test_a_step_that_raises_fails_its_requests_only(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    expected = alone(make_core)["0"]
    add(core, "victim", PROMPTS[1])
    forward = core.runner.executor.forward

    def broken(inputs: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(core.runner.executor, "forward", broken)
    updates = core.step()
    assert [(update.request_id, update.finish_reason) for update in updates] == [("victim", "error")]
    monkeypatch.setattr(core.runner.executor, "forward", forward)
    add(core, "next", PROMPTS[0])
    assert drained(core)["next"] == expected


def test_non_finite_logits_fail_one_row(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    expected = alone(make_core)
    forward = core.runner.executor.forward

    def poisoned(inputs):  # type: ignore[no-untyped-def]
        logits = forward(inputs).clone()
        logits[0] = float("nan")
        return logits

    add(core, "victim", PROMPTS[2])
    add(core, "neighbour", PROMPTS[0])
    monkeypatch.setattr(core.runner.executor, "forward", poisoned)
    updates = {update.request_id: update for update in core.step()}
    monkeypatch.setattr(core.runner.executor, "forward", forward)
    assert updates["victim"].finish_reason == "error"
    assert "non-finite" in (updates["victim"].error or "")
    assert updates["victim"].token_ids == []
    first = updates["neighbour"].token_ids
    assert list(first) + drained(core)["neighbour"] == expected["0"]


def test_a_lost_device_ends_the_engine(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(async_depth=1)
    add(core, "victim", PROMPTS[1])

    def broken(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(core.runner.executor, "forward", broken)
    monkeypatch.setattr(core.runner, "lost", lambda: "the GPU failed")
    with pytest.raises(EngineDeadError, match="the GPU failed"):
        core.step()
    close = core.runner.close
    monkeypatch.setattr(core.runner, "close", broken)  # as whatever waits for the device would
    core.close()
    monkeypatch.setattr(core.runner, "close", close)


def test_a_prompt_without_finite_logits_fails_alone(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    expected = alone(make_core)
    forward = core.runner.executor.forward

    def poisoned(inputs):  # type: ignore[no-untyped-def]
        logits = forward(inputs).clone()
        logits[3] = float("nan")
        return logits

    add(core, "victim", PROMPTS[2], SamplingParams(max_tokens=4, prompt_logprobs=0, ignore_eos=True))
    add(core, "neighbour", PROMPTS[0])
    monkeypatch.setattr(core.runner.executor, "forward", poisoned)
    updates = {update.request_id: update for update in core.step()}
    monkeypatch.setattr(core.runner.executor, "forward", forward)
    assert "not finite" in (updates["victim"].error or "")
    assert list(updates["neighbour"].token_ids) + drained(core)["neighbour"] == expected["0"]


def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks(make_core: MakeCore) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    seen = []
    for chunk in (512, 24):
        core = make_core(max_num_batched_tokens=chunk)
        add(core, "echo", PROMPTS[5], params)
        seen.append([entry for update in drain(core) for entry in update.prompt_logprobs or []])
    assert [entry.token_id for entry in seen[0]] == PROMPTS[5][1:]
    assert all(len(entry.top_ids) == 2 for entry in seen[0])
    assert [entry.logprob for entry in seen[0]] == pytest.approx([entry.logprob for entry in seen[1]], abs=1e-5)


def test_a_sampler_that_cannot_be_prepared_fails_its_request_only(make_core: MakeCore) -> None:
    """DRY's default breakers are texts, and these engines have no tokenizer."""
    core = make_core()
    expected = alone(make_core)["0"]
    add(core, "0", PROMPTS[0])
    add(core, "broken", PROMPTS[1], SamplingParams(max_tokens=8, dry_multiplier=0.8))
    tokens: list[int] = []
    errors: dict[str, str] = {}
    for update in drain(core):
        tokens += update.token_ids if update.request_id == "0" else []
        if update.error is not None:
            errors[update.request_id] = update.error
    assert tokens == expected
    assert list(errors) == ["broken"]
    assert "sampler" in errors["broken"]


@pytest.mark.parametrize(
    ("part", "failures"),
    [("rows.apply", 1), ("sampler.start", 2), ("sampler._fused.end", 2)],  # a start is tried twice
)
def test_what_fails_as_requests_come_and_go_leaves_no_trace(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, part: str, failures: int
) -> None:
    """As where memory runs out: the rows of that step may fail, and all later requests are served in them."""
    core = make_core(max_num_seqs=2)
    expected = alone(make_core)
    path, _, method = part.rpartition(".")
    owner = attrgetter(path)(core.runner)
    original, calls = getattr(owner, method), 0

    def fails_at_first(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise MemoryError("injected")
        original(*arguments)

    monkeypatch.setattr(owner, method, fails_at_first)
    for number in (1, 2):
        add(core, f"{number}", PROMPTS[number])
    assert len([update for update in drain(core) if update.finish_reason]) == 2
    for number in (0, 3, 4, 5):
        add(core, f"{number}", PROMPTS[number])
    assert drained(core) == {name: expected[name] for name in "0345"}
