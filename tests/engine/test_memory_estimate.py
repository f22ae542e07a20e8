"""What a model is expected to take of the memory, against what its engine says once it has loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.estimate import CONVERSATIONS, KV_SHARE, MemoryEstimate, estimate_memory

GIB = 1 << 30


@pytest.fixture
def config(tiny_model: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny_model), load_format="dummy", device="cpu", executor="torch", dtype="float16")


@pytest.mark.parametrize(
    "settings",
    [
        {"executor": "auto", "dtype": "auto"},
        {"executor": "auto", "dtype": "auto", "kv_cache_dtype": "float32"},
        {"executor": "auto", "dtype": "auto", "activations": "float32"},
        {"executor": "torch", "dtype": "auto"},
        {"executor": "torch", "dtype": "float16"},
        {"executor": "torch", "dtype": "float32"},
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_an_engine_takes_what_was_expected(
    config: EngineConfig, smollm2_path: Path, settings: dict[str, Any], quantized: bool
) -> None:
    model = {"model": str(smollm2_path), "load_format": "auto", "max_model_len": 512} if quantized else {}
    config = dataclasses.replace(config, **model, **settings)
    estimate = estimate_memory(config, budget=8 * GIB, on_gpu=False, alone=False)
    built = build_engine(dataclasses.replace(config, kv_cache_memory=estimate.kv_cache), [])
    try:
        info = built.info
        assert info.max_model_len == 512
        assert estimate.kv_cache * 0.9 <= info.num_blocks * info.kv_bytes_per_block <= estimate.kv_cache
        assert info.num_blocks * info.block_size >= CONVERSATIONS * 512
        assert info.weight_bytes == pytest.approx(estimate.weights, rel=0.03)
    finally:
        built.core.close()


@pytest.mark.parametrize("executor", ["auto", "torch"])
def test_a_promised_context_fits_what_is_expected(config: EngineConfig, executor: Any) -> None:
    """Though others leave hardly any memory."""
    config = dataclasses.replace(config, executor=executor, dtype="auto", max_model_len=4096)
    estimate = estimate_memory(config, budget=0, on_gpu=False, alone=False)
    built = build_engine(dataclasses.replace(config, kv_cache_memory=estimate.kv_cache), [])
    built.core.close()
    assert built.info.max_model_len == 4096


def test_types_of_a_gpu_are_counted(config: EngineConfig, smollm2_path: Path) -> None:
    def estimated(**changes: Any) -> MemoryEstimate:
        changed = dataclasses.replace(config, **{"executor": "auto", "dtype": "auto", **changes})
        return estimate_memory(changed, budget=64 * GIB, on_gpu=True, alone=False)

    own, exact = estimated(), estimated(dtype="float32")
    assert (exact.weights, exact.kv_cache) == (2 * own.weights, 2 * own.kv_cache)
    assert 2 * estimated(kv_cache_dtype="fp8").kv_cache == own.kv_cache
    file = {"model": str(smollm2_path), "load_format": "auto"}
    packed, beside_float32 = estimated(**file).weights, estimated(**file, dtype="float32").weights
    assert packed <= smollm2_path.stat().st_size
    assert packed < beside_float32 < 1.01 * packed  # norms only


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
