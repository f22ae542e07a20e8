"""What a model is expected to take of the memory, against what its engine says once it has loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.estimate import CONVERSATIONS, KV_SHARE, estimate_memory

GIB = 1 << 30


@pytest.fixture
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_model), load_format="dummy", device="cpu", executor="torch", dtype="float16")


def test_an_engine_takes_what_was_expected(config: EngineConfig) -> None:
    estimate = estimate_memory(config, budget=8 * GIB, on_gpu=False, alone=False)
    built = build_engine(dataclasses.replace(config, kv_cache_memory=estimate.kv_cache), [])
    try:
        info = built.info
        assert info.max_model_len == 512  # all of the model's
        assert estimate.kv_cache * 0.9 <= info.num_blocks * info.kv_bytes_per_block <= estimate.kv_cache
        assert info.num_blocks * info.block_size >= CONVERSATIONS * 512
        assert info.weight_bytes == pytest.approx(estimate.weights, rel=0.6)  # float16 of float32
    finally:
        built.core.close()


def test_the_cache_leaves_room_for_others_unless_it_was_promised(config: EngineConfig) -> None:
    free = estimate_memory(config, budget=8 * GIB, on_gpu=False, alone=False)
    budget = free.weights + free.beside + free.kv_cache  # a quarter of what is left is not all of it
    tight = estimate_memory(config, budget=budget, on_gpu=False, alone=False)
    assert tight.kv_cache == int(free.kv_cache * KV_SHARE)
    promised = dataclasses.replace(config, max_model_len=512)
    assert estimate_memory(promised, budget=budget, on_gpu=False, alone=False).kv_cache == free.kv_cache // 2
    fixed = dataclasses.replace(config, kv_cache_memory=12345)
    assert estimate_memory(fixed, budget=budget, on_gpu=False, alone=False).kv_cache == 12345


def test_who_is_alone_may_take_what_there_is(config: EngineConfig) -> None:
    estimate = estimate_memory(config, budget=GIB, on_gpu=False, alone=True)
    assert estimate.total <= GIB


def test_a_model_that_is_quantized_at_load_takes_less(config: EngineConfig) -> None:
    whole = estimate_memory(config, budget=GIB, on_gpu=False, alone=False)
    packed = estimate_memory(dataclasses.replace(config, quantization="int4"), budget=GIB, on_gpu=False, alone=False)
    assert packed.weights < whole.weights / 2
