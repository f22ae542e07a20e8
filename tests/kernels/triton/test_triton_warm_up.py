"""What a start goes through is all that serving launches: otherwise kernels are compiled while chats wait.

Launches are recorded instead of made, so nothing is compiled here either.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pretended_device import PretendedDriver
from triton.runtime import driver

from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.core.plan import RowStart, RowStep, StepPlan
from aphrodite.kernels.triton.compile_ahead import Jobs
from aphrodite.kernels.triton.dense_cuts import MEASURED, dense_cut
from aphrodite.kernels.triton.int4_linear import HALF_MAX_ROWS, WGMMA_MAX_ROWS
from aphrodite.kernels.triton.launch import gluon_version_reason, recording
from aphrodite.kernels.triton.linear import SKINNY_MAX_ROWS, choose_kernel, padded_rows
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.loading.dummy import dummy_weights
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import QuantType
from aphrodite.runner.device_executor import DeviceExecutor
from aphrodite.runner.device_runner import REHEARSED_PROMPTS, DeviceRunner
from aphrodite.runner.step_graphs import decode_sizes
from aphrodite.sampling import pipeline
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.triton_fused import TritonSampler

ROWS, LONGEST = 64, 512
SPEC = ModelSpec(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    max_position=LONGEST,
    rotary=RotarySpec(dim=16),
    windows=(None, 100),
)
SAMPLERS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=0.8, repetition_penalty=1.1, dry_multiplier=0.8),
]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> DeviceRunner:
    """Without graphs, so that every step launches its kernels one by one."""
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    monkeypatch.setattr(TritonAttention, "decline", staticmethod(lambda shape: None))
    monkeypatch.setattr(pipeline, "open_fast_path", TritonSampler)

    def on_a_gpu(
        weight: torch.Tensor, bias: Any, choice: Any, *, gated: bool = False, fp8: bool = False
    ) -> TritonLinear:
        return TritonLinear(weight, bias, choice, gated=gated)

    monkeypatch.setattr("aphrodite.layers.linear.dense_linear", on_a_gpu)
    executor = DeviceExecutor(
        SPEC,
        dummy_weights(SPEC, QuantType.F32),
        block_size=16,
        max_model_len=LONGEST,
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    settings: dict[str, Any] = {"num_rows": ROWS, "num_blocks": 400, "max_model_len": LONGEST, "async_depth": 1}
    return DeviceRunner(executor, **settings, eos_token_ids=frozenset(), use_graphs=False)


def plans() -> Iterator[StepPlan]:
    """Prompts of all lengths and samplers in steps of all sizes, beside ever more that decode."""
    draw = random.Random(0)
    positions: dict[int, int] = {}
    for number in range(40):
        starts: list[RowStart] = []
        steps = [RowStep(row, at, 1, [1] if at % 16 == 0 else [], False, True) for row, at in positions.items()]
        positions = {row: at + 1 for row, at in positions.items()}
        for row in range(len(positions), min(ROWS, len(positions) + draw.randint(0, 4))):
            length = draw.choice([1, 2, 15, 16, 17, draw.randint(3, 300)])
            params = draw.choice(SAMPLERS[: 1 + number // 8])
            starts.append(RowStart(row, str(row), [1] * length, params, row))
            steps.append(RowStep(row, 0, length, [1] * -(-length // 16), True, True))
            positions[row] = length
        if steps:
            yield StepPlan(number, [], starts, steps)


def test_serving_launches_only_what_the_start_went_through(runner: DeviceRunner) -> None:
    rehearsed, served = Jobs(), Jobs()
    with recording(rehearsed), torch.inference_mode():
        runner.warm_up(LONGEST, lambda done, total: None)
        for size in decode_sizes(ROWS):  # of graphs
            runner._try_padded(size)
    with recording(served):
        for plan in plans():
            step = runner.launch(plan)
            assert step.error is None, step.error
            runner.collect(plan, step)
    assert len(served.kernels) > 15
    assert sorted(set(served.kernels) - set(rehearsed.kernels)) == []


def test_prompts_of_many_lengths_are_rehearsed(runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(runner, "_try_prompt", tried.append)
    monkeypatch.setattr("aphrodite.runner.device_runner.compile_ahead", lambda jobs, progress: None)
    with torch.inference_mode():
        runner._compile_ahead(nullcontext(), 700, [], lambda done, total: None)
    assert tried == [16, 32, 64, 128, 192, 256, 384, 512, 640]  # fewer than the largest step has, which comes later


@pytest.mark.skipif(gluon_version_reason() is not None, reason="the kernel is not for this Triton")
@pytest.mark.parametrize("out_features", [1024, 4096, 5120, 8192, 10240, 28672, 57344])
@pytest.mark.parametrize("in_features", [2048, 4096, 8192, 28672])
def test_every_cut_of_a_4_bit_prompt_is_rehearsed(out_features: int, in_features: int) -> None:
    """A step of 70B has other cuts with 600 tokens than with 256 or 2,048, and is in no graph."""
    from aphrodite.kernels.triton.int4_half import half_config

    served = {half_config(out_features, in_features, rows) for rows in range(WGMMA_MAX_ROWS + 1, HALF_MAX_ROWS + 1)}
    assert served <= {half_config(out_features, in_features, rows) for rows in REHEARSED_PROMPTS}


@pytest.mark.parametrize("shape", [*MEASURED, (4096, 4096), (57344, 8192), (1024, 2048)], ids=str)
def test_every_cut_of_a_dense_prompt_is_rehearsed(shape: tuple[int, int]) -> None:
    """A prompt of 40 or 150 tokens is in no graph of a server of few sequences that captures decode steps only."""
    served = {dense_cut(*shape, rows) for rows in range(1, 513)}
    assert served <= {dense_cut(*shape, rows) for rows in REHEARSED_PROMPTS}

    def skinny(rows: int) -> int:
        kernel = choose_kernel(*shape, rows, 2, gated=True)
        return padded_rows(rows) if kernel == "skinny" else 0

    few = {skinny(rows) for rows in range(1, SKINNY_MAX_ROWS + 1)}
    assert few <= {skinny(rows) for rows in (1, *REHEARSED_PROMPTS)}
