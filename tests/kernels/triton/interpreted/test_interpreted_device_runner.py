"""The device's data plane end to end, interpreted: tokens equal those of the reference mode on the CPU.

Graphs need a GPU (tests/gpu/test_gpu_engine.py); all else of a step is the same here and there.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.core.plan import Pooling, RowStart, RowStep, StepPlan, TokenLogprobs
from aphrodite.core.request import Request, RequestUpdate
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.loading.dummy import dummy_weights
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import QuantType
from aphrodite.runner.device_executor import DeviceExecutor
from aphrodite.runner.device_runner import DeviceRunner
from aphrodite.runner.executor import LogitsOf
from aphrodite.runner.inputs import DeviceInputs, StepSize
from aphrodite.runner.runner import Runner
from aphrodite.runner.step_graphs import CapturedStep, ragged_sizes
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.sampling import pipeline
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.triton_fused import TritonSampler

SPEC = ModelSpec(
    family="llama",
    vocab_size=160,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    max_position=128,
    rotary=RotarySpec(dim=16),
    windows=(None, 24),
)
PROMPTS = [[1 + (7 * i + 13 * j) % 150 for j in range(length)] for i, length in enumerate((3, 16, 33))]
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=3, temperature=1.3, repetition_penalty=1.2, min_p=0.01, ignore_eos=True, seed=5)

GUIDED = msgspec.structs.replace(SEEDED, guidance_scale=2.0)


@pytest.fixture(autouse=True)
def _accept_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonAttention, "decline", staticmethod(lambda shape: None))


def device_runner(num_blocks: int, async_depth: int, spec: ModelSpec = SPEC) -> DeviceRunner:
    executor = DeviceExecutor(
        spec,
        dummy_weights(spec, QuantType.F32),
        block_size=16,
        max_model_len=128,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return DeviceRunner(executor, **settings(num_blocks, async_depth), use_graphs=False)


def host_runner(spec: ModelSpec = SPEC) -> Runner:
    executor = TorchExecutor(
        spec,
        dummy_weights(spec, QuantType.F32),
        block_size=16,
        max_model_len=128,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Runner(executor, **settings(64, 0))


def settings(num_blocks: int, async_depth: int) -> dict[str, Any]:
    return {
        "num_rows": 4,
        "num_blocks": num_blocks,
        "max_model_len": 128,
        "eos_token_ids": frozenset(),
        "async_depth": async_depth,
    }


def updates(
    runner: Runner | DeviceRunner,
    num_blocks: int,
    params: SamplingParams,
    budget: int,
    poolings: Sequence[Pooling | None] = (None, None, None),
) -> list[RequestUpdate]:
    """What serving all prompts together brought; those with a pooling are embedded."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=16,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=128,
            enable_prefix_caching=True,
            policy="fcfs",
            eos_token_ids=frozenset(),
            max_queued_requests=None,
        )
    )
    for number, prompt in enumerate(PROMPTS):
        guided = params.guidance_scale != 1.0 and number % 2 == 0
        scheduler.add(
            Request(
                request_id=str(number),
                prompt_token_ids=prompt,
                params=_params(params, guided, poolings[number]),
                seed=number,
                pooling=poolings[number],
                negative_prompt_ids=prompt[1::2] if guided else None,
            )
        )
    found: list[RequestUpdate] = []
    in_flight: deque[tuple[StepPlan, Any]] = deque()
    while scheduler.has_unfinished() or in_flight:
        while len(in_flight) <= runner.async_depth and (plan := scheduler.schedule()) is not None:
            in_flight.append((plan, runner.launch(plan)))
        plan, step = in_flight.popleft()
        found += scheduler.commit(plan, runner.collect(plan, step).result)
    assert [update.error for update in found if update.error] == []
    return found


def _params(params: SamplingParams, guided: bool, pooling: Pooling | None) -> SamplingParams:
    if pooling is not None:
        return SamplingParams(max_tokens=0)
    return params if guided else msgspec.structs.replace(params, guidance_scale=1.0)


def tokens(found: list[RequestUpdate]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for update in found:
        answers.setdefault(update.request_id, []).extend(update.token_ids)
    return answers


@pytest.mark.parametrize(
    ("params", "num_blocks", "budget", "async_depth"),
    [
        (GREEDY, 64, 64, 1),  # prompts in chunks, beside decodes
        (SEEDED, 64, 512, 0),
        (SEEDED, 64, 40, 1),
        (SEEDED, 5, 64, 1),  # preemption
        (GUIDED, 64, 64, 1),
    ],
)
def test_tokens_are_those_of_the_reference(
    params: SamplingParams, num_blocks: int, budget: int, async_depth: int
) -> None:
    expected = tokens(updates(host_runner(), 64, params, 512))
    assert all(len(answer) == params.max_tokens for answer in expected.values())
    assert tokens(updates(device_runner(num_blocks, async_depth), num_blocks, params, budget)) == expected


def test_warming_up_leaves_nothing_behind() -> None:
    runner = device_runner(64, 1)
    seen: list[tuple[int, int]] = []
    runner.warm_up(48, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (seen[0][1], seen[0][1])
    assert tokens(updates(runner, 64, SEEDED, 64)) == tokens(updates(host_runner(), 64, SEEDED, 512))


def test_log_probabilities_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aphrodite.runner.device_runner.SCORED_ROWS", 5)  # so that prompts take several
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2)

    def entries(runner: Runner | DeviceRunner) -> list[TokenLogprobs]:
        found = sorted(updates(runner, 64, params, 32), key=lambda update: update.request_id)
        return [entry for update in found for entry in [*(update.prompt_logprobs or []), *(update.logprobs or [])]]

    ours, theirs = entries(device_runner(64, 1)), entries(host_runner())
    assert len(theirs) == sum(len(prompt) - 1 + 3 for prompt in PROMPTS)
    assert [(entry.token_id, entry.top_ids) for entry in ours] == [(entry.token_id, entry.top_ids) for entry in theirs]
    assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-5)


def test_one_step_scores_guides_embeds_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aphrodite.runner.device_runner.SCORED_ROWS", 5)
    params = msgspec.structs.replace(GUIDED, prompt_logprobs=1, logprobs=1)

    def results(runner: Runner | DeviceRunner) -> tuple[dict[str, list[int]], list[float], list[float]]:
        found = sorted(updates(runner, 64, params, 128, (None, "mean", None)), key=lambda update: update.request_id)
        entries = [entry for update in found for entry in [*(update.prompt_logprobs or []), *(update.logprobs or [])]]
        (embedding,) = [update.embedding for update in found if update.embedding is not None]
        return tokens(found), [entry.logprob for entry in entries], list(np.frombuffer(embedding, np.float32))

    ours, theirs = results(device_runner(64, 1)), results(host_runner())
    assert ours[0] == theirs[0]
    assert len(theirs[1]) == sum(len(PROMPTS[number]) - 1 + params.max_tokens for number in (0, 2))
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert ours[2] == pytest.approx(theirs[2], abs=1e-4)


def test_a_prompt_without_log_probabilities_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = device_runner(64, 1)
    forward_rows = runner.executor.forward_rows

    def poisoned(inputs: DeviceInputs, index: torch.Tensor | None) -> tuple[LogitsOf, torch.Tensor | None]:
        logits_of, hidden = forward_rows(inputs, index)
        return (lambda entries: logits_of(entries).index_fill(0, (entries == 1).nonzero()[:, 0], torch.nan)), hidden

    monkeypatch.setattr(runner.executor, "forward_rows", poisoned)
    params = [msgspec.structs.replace(GREEDY, prompt_logprobs=0), GREEDY]
    starts = [RowStart(row, str(row), PROMPTS[row], params[row], 0) for row in range(2)]
    steps = [RowStep(row, 0, len(PROMPTS[row]), [row + 1], True, True) for row in range(2)]
    plan = StepPlan(0, [], starts, steps)
    first, second = runner.collect(plan, runner.launch(plan)).result.rows
    assert "not finite" in str(first.error)
    assert second.error is None
    assert second.token_id is not None


OTHERS: dict[str, dict[str, Any]] = {
    "as Gemma": {
        "block": "sandwich",
        "float32_norms": True,
        "qk_norm": True,
        "attention_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "embedding_scale": 30.0,
        "layer_rotaries": (SPEC.rotary, RotarySpec(dim=16, theta=100.0)),
    },
    "as Cohere and StableLM": {
        "block": "parallel",
        "norm": "layer",
        "norm_bias": True,
        "qk_norm": True,
        "head_norm": "each_head",
        "rotary": RotarySpec(dim=4),
        "layer_rotaries": (None, RotarySpec(dim=4)),
    },
}


@pytest.mark.parametrize("fields", [{}, *OTHERS.values()], ids=["as Llama", *OTHERS])
def test_embeddings_are_those_of_the_reference_beside_answers(fields: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, **fields)

    def embeddings(runner: Runner | DeviceRunner, budget: int) -> dict[str, np.ndarray]:
        found = updates(runner, 64, GREEDY, budget, poolings=("mean", None, "last"))
        return {u.request_id: np.frombuffer(u.embedding, np.float32) for u in found if u.embedding is not None}

    ours, theirs = embeddings(device_runner(64, 1, spec), 20), embeddings(host_runner(spec), 512)
    assert theirs.keys() == ours.keys() == {"0", "2"}
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-4)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS.keys())
def test_other_decoders_give_the_same_tokens(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, **fields)
    params = msgspec.structs.replace(GREEDY, max_tokens=2)
    expected = tokens(updates(host_runner(spec), 64, params, 64))

    def on_a_gpu(
        weight: torch.Tensor, bias: Any, choice: Any, *, gated: bool = False, fp8: bool = False
    ) -> TritonLinear:
        return TritonLinear(weight, bias, choice, gated=gated)

    monkeypatch.setattr("aphrodite.layers.linear.dense_linear", on_a_gpu)
    assert tokens(updates(device_runner(64, 1, spec), 64, params, 64)) == expected


class _Again:
    """A graph that is not captured but run anew."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class _Graphs:
    """Stands for `StepGraphs`: the same steps over the same memory, and a note of their sizes."""

    def __init__(self, runner: DeviceRunner) -> None:
        self.runner = runner
        self.sizes: list[StepSize] = []
        self.logits: torch.Tensor

    def prepare(self, size: StepSize) -> Any:
        self.sizes.append(size)
        self.runner._pad(size)

        def model() -> None:
            self.logits = self.runner._model(size)

        def ending(end: Any) -> Any:
            return _Again(lambda: end(size, self.logits))

        return CapturedStep(_Again(model), {name: ending(end) for name, end in self.runner._endings_of(size).items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(("params", "budget"), [(GREEDY, 64), (SEEDED, 24)], ids=["greedy", "seeded in chunks"])
def test_padded_steps_give_the_same_tokens(
    params: SamplingParams, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(updates(host_runner(), 64, params, budget))
    monkeypatch.setattr(pipeline, "open_fast_path", TritonSampler)
    runner = device_runner(64, 1)
    graphs = _Graphs(runner)
    monkeypatch.setattr(runner, "_graphs", graphs)
    monkeypatch.setattr(runner, "_ragged_sizes", ragged_sizes(64, 4))
    assert tokens(updates(runner, 64, params, budget)) == expected
    padded = [size for size in graphs.sizes if not size.decode]
    assert padded
    assert len(padded) < len(graphs.sizes)
