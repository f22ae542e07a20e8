"""Adapters in the device's data plane, interpreted: tokens equal those of the CPU in torch operations."""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_interpreted_device_runner import PROMPTS, SPEC, settings

from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.core.plan import StepPlan
from aphrodite.core.request import Request
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.layers.lora import AdapterRoom
from aphrodite.layers.triton_linear import TritonLinear
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.lora import Adapter, LowRank
from aphrodite.models import weights
from aphrodite.models.adapters import adapted_products
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.device_executor import DeviceExecutor
from aphrodite.runner.device_runner import DeviceRunner
from aphrodite.runner.runner import Runner
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.sampling.params import SamplingParams

MODEL = dataclasses.replace(SPEC, num_layers=1, windows=(None,))
ROOM = AdapterRoom(slots=1, rank=5)
PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def adapter(parts: set[str], rank: int, seed: int) -> Adapter:
    random = np.random.default_rng(seed)

    def raw(rows: int, columns: int) -> RawTensor:
        values = (random.standard_normal((rows, columns)) * 0.8).astype(np.float32)
        return RawTensor("", (rows, columns), QuantType.F32, values.view(np.uint8))

    pairs = {
        module: LowRank(raw(rank, product.columns), raw(rows, rank), 0.7)
        for layer in range(MODEL.num_layers)
        for product in adapted_products(MODEL, layer).values()
        for module, rows in zip(product.modules, product.rows, strict=True)
        if module.split(".")[2] in parts
    }
    return Adapter(path=Path(), pairs=pairs, rank=rank)


ADAPTERS = [adapter({"q", "v"}, 5, 1), adapter({"q", "k", "v", "o", "gate", "up", "down"}, 3, 2)]


def answers(runner: Runner | DeviceRunner, wanted: list[int | None], budget: int) -> dict[str, list[int]]:
    """Tokens of the prompts, each computed with the adapter that is wanted, in a batch."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=64, max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=128, max_loras=ROOM.slots
        )
    )
    for number, one in enumerate(ADAPTERS):
        runner.executor.adapters.add(number, one)
    for number, number_of_adapter in enumerate(wanted):
        prompt = PROMPTS[number % len(PROMPTS)]
        scheduler.add(Request(str(number), prompt, PARAMS, number, adapter=number_of_adapter))
    found: dict[str, list[int]] = {}
    in_flight: deque[tuple[StepPlan, Any]] = deque()
    while scheduler.has_unfinished() or in_flight:
        while len(in_flight) <= runner.async_depth and (plan := scheduler.schedule()) is not None:
            in_flight.append((plan, runner.launch(plan)))
        plan, step = in_flight.popleft()
        for update in scheduler.commit(plan, runner.collect(plan, step).result):
            assert update.error is None
            found.setdefault(update.request_id, []).extend(update.token_ids)
    return found


def host_runner() -> Runner:
    options = {"block_size": 16, "max_model_len": 128, "dtype": torch.float32, "device": torch.device("cpu")}
    executor = TorchExecutor(MODEL, dummy_weights(MODEL, QuantType.F32), **options, adapters=ROOM)
    return Runner(executor, **settings(64, 0))


def device_runner(monkeypatch: pytest.MonkeyPatch) -> DeviceRunner:
    def linear(parts: Any, biases: Any, dtype: Any, device: Any, *, gated: bool = False, fp8: bool = False) -> Any:
        made = build(parts, biases, dtype, device)
        return TritonLinear(made.weight, made.bias, made.choice, gated=gated)

    build = weights.build_linear
    monkeypatch.setattr(TritonAttention, "decline", staticmethod(lambda shape: None))
    monkeypatch.setattr(weights, "build_linear", linear)
    options = {"block_size": 16, "max_model_len": 128, "dtype": torch.float32, "device": torch.device("cpu")}
    executor = DeviceExecutor(
        MODEL, dummy_weights(MODEL, QuantType.F32), **options, kv_dtype=torch.float32, adapters=ROOM
    )
    return DeviceRunner(executor, **settings(64, 1), use_graphs=False)


def test_tokens_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [1, None, 0]  # more adapters than slots
    expected = answers(host_runner(), wanted, 512)
    plain = answers(host_runner(), [None] * 3, 512)
    assert [expected[str(n)] == plain[str(n)] for n in range(3)] == [adapter is None for adapter in wanted]
    runner = device_runner(monkeypatch)
    assert answers(runner, wanted, 24) == expected
