"""The engine on a GPU: the same tokens as on the CPU, and independent of everything that must not show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from gpu_engines import REFERENCE, TINY, Engines, write_model

from aphrodite.config import EngineConfig
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import AddRequest
from aphrodite.runner.inputs import StepSize
from aphrodite.runner.step_graphs import StepGraphs
from aphrodite.sampling.params import SamplingParams

PROMPTS = [[3 + (7 * i + 13 * j) % 900 for j in range(length)] for i, length in enumerate((5, 16, 17, 40, 64, 700))]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(
    max_tokens=24, temperature=1.2, top_p=0.9, min_p=0.02, repetition_penalty=1.1, ignore_eos=True, seed=7
)
# Each alone on a GPU in float32 and all together on a CPU; neighbours of the victim below use what else there is.
OTHERS = [
    SamplingParams(max_tokens=24, temperature=0.9, no_repeat_ngram_size=3, xtc_probability=0.5, xtc_threshold=0.1),
    SamplingParams(max_tokens=24, temperature=1.5, top_k=5, typical_p=0.9, tfs=0.95),
    SamplingParams(max_tokens=24, temperature=0.8, mirostat_mode=2, mirostat_tau=4.0, mirostat_eta=0.1),
    SamplingParams(max_tokens=24, temperature=0.8, logprobs=3),
    SamplingParams(max_tokens=24, temperature=0.8, sampler_trace=True),
]


@pytest.fixture(scope="module")
def make_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engines = Engines(write_model(tmp_path_factory.mktemp("model"), TINY))
    yield engines
    engines.close()


def add(core: EngineCore, name: str, prompt: list[int], params: SamplingParams) -> None:
    core.add(AddRequest([name], [params.seed or 0], prompt, params, 0, None))


def drain(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for update in updates(core):
        assert update.error is None, update.error
        tokens.setdefault(update.request_id, []).extend(update.token_ids)
    return tokens


def updates(core: EngineCore) -> Iterator[RequestUpdate]:
    while core.has_work():
        yield from core.step()
        core.scheduler.check()


def answers(core: EngineCore, params: SamplingParams, prompts: list[list[int]] = PROMPTS) -> dict[str, list[int]]:
    for number, prompt in enumerate(prompts):
        add(core, str(number), prompt, params)
    return drain(core)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_are_those_of_the_cpu(make_core: Engines, params: SamplingParams) -> None:
    expected = answers(make_core(**REFERENCE), params)
    assert answers(make_core(), params) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_graphs": False},
        {"async_depth": 0},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 48},
        {"block_size": 32},
        {"cpu_offload_gb": 1.0},
    ],
    ids="-".join,
)
def test_settings_do_not_change_tokens(make_core: Engines, settings: dict[str, Any]) -> None:
    expected = answers(make_core(), SEEDED)
    core = make_core(**settings)
    assert answers(core, SEEDED) == expected
    assert answers(core, SEEDED) == expected  # and from the prefix cache, where there is one


def test_preemption_does_not_change_tokens(make_core: Engines) -> None:
    params = msgspec.structs.replace(SEEDED, max_tokens=80)
    prompts = [PROMPTS[3][index:] for index in range(8)]  # each grows from three blocks to eight
    roomy = make_core()
    expected = answers(roomy, params, prompts)
    core = make_core(kv_cache_memory=30 * roomy.runner.executor.kv_bytes_per_block, max_model_len=256)
    assert answers(core, params, prompts) == expected
    assert core.stats().num_preemptions > 0


def test_neighbours_do_not_change_tokens(make_core: Engines) -> None:
    expected = answers(make_core(), SEEDED, PROMPTS[:1])
    core = make_core()
    add(core, "0", PROMPTS[0], SEEDED)
    for number, params in enumerate(OTHERS):
        add(core, f"other {number}", PROMPTS[1 + number % 4], params)
    assert drain(core)["0"] == expected["0"]


def test_log_probabilities_are_those_of_the_cpu(make_core: Engines) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=4, prompt_logprobs=2)

    def logprobs(core: EngineCore) -> list[tuple[int, float]]:
        for number, prompt in enumerate(PROMPTS[:4]):
            add(core, str(number), prompt, params)
        found = sorted(updates(core), key=lambda update: update.request_id)
        entries = [entry for update in found for entry in [*(update.prompt_logprobs or []), *(update.logprobs or [])]]
        return [(entry.token_id, entry.logprob) for entry in entries]

    ours, theirs = logprobs(make_core()), logprobs(make_core(**REFERENCE))
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-4)


@pytest.mark.parametrize(("dtype", "kv", "share"), [("bfloat16", "auto", 0.9), ("bfloat16", "fp8", 0.6)])
def test_short_types_stay_close(make_core: Engines, dtype: str, kv: str, share: float) -> None:
    """Random weights have flat logits, so this asks for the first token of each prompt only."""
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)
    prompts = [[3 + (11 * i + 17 * j) % 900 for j in range(20 + 5 * i)] for i in range(15)]

    def tops(core: EngineCore) -> list[set[int]]:
        for number, prompt in enumerate(prompts):
            add(core, f"{number:02}", prompt, one)
        found = sorted((update for update in updates(core) if update.logprobs), key=lambda update: update.request_id)
        return [set(update.logprobs[0].top_ids) for update in found if update.logprobs]

    pairs = zip(tops(make_core(dtype=dtype, kv_cache_dtype=kv)), tops(make_core()), strict=True)
    agreement = [len(ours & theirs) / len(theirs) for ours, theirs in pairs]
    assert sum(agreement) / len(agreement) > share


@pytest.mark.parametrize("length", [4095, 4096, 4097, 32_000])
def test_long_prompts_are_computed_alike_in_one_piece_and_in_many(make_core: Engines, length: int) -> None:
    prompts = [[3 + (7 * j + j // 97 + length) % 900 for j in range(length)]]  # no beginning of another's
    short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    whole = answers(make_core(max_num_batched_tokens=32_768, max_model_len=33_000), short, prompts)
    assert answers(make_core(max_num_batched_tokens=1000, max_model_len=33_000), short, prompts) == whole


def test_a_decode_step_does_not_wait_for_the_device(make_core: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of synchronisation that torch can see is an error while steps are launched."""
    core = make_core()
    for number, prompt in enumerate(PROMPTS):
        add(core, str(number), prompt, msgspec.structs.replace(SEEDED, max_tokens=64))
    for _ in range(4):  # prompts
        core.step()
    launch = core.runner.launch

    def watched(plan: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.error is None, step.error
        return step

    monkeypatch.setattr(core.runner, "launch", watched)
    for _ in range(10):
        core.step()
    assert core.has_work()
    drain(core)


def test_nothing_is_captured_while_requests_are_served(make_core: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(max_num_seqs=16)  # one of its own, that has served nobody

    def fails(graphs: StepGraphs, size: StepSize) -> None:
        raise AssertionError(f"a graph of {size} was captured")

    monkeypatch.setattr(StepGraphs, "_capture", fails)
    for number, params in enumerate([GREEDY, SEEDED, SamplingParams(max_tokens=8, temperature=0.8), *OTHERS]):
        answers(core, params, PROMPTS[: 1 + number % len(PROMPTS)])


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF names no file")
def test_smollm2_writes_the_same_on_both(make_core: Engines) -> None:
    path = os.environ["SMOLLM2_GGUF"]
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    prompts = [[1 + (31 * i + 97 * j) % 40_000 for j in range(8 + 9 * i)] for i in range(10)]
    devices: list[dict[str, Any]] = [{"device": "cuda"}, REFERENCE]
    cores = [
        build_engine(EngineConfig(model=path, dtype="float32", kv_cache_memory=1 << 30, **device), ()).core
        for device in devices
    ]
    assert answers(cores[0], params, prompts) == answers(cores[1], params, prompts)
