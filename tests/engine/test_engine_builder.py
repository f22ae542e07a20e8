"""What the builder refuses, and the words in which it does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aphrodite import platforms
from aphrodite.config import EngineConfig
from aphrodite.cores import usable_cores
from aphrodite.engine.builder import build_engine
from aphrodite.engine.device_builder import device_dtype
from aphrodite.errors import ConfigError
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.runner.memory import device_budget, device_workspace, plan_memory
from aphrodite.tokenizer.loader import load_tokenizer

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"device": "cuda"}, "--device cuda", marks=NO_GPU),
        pytest.param({"executor": "triton"}, "--executor triton: ", marks=NO_GPU),
        ({"device": "cpu", "executor": "triton"}, "runs on GPUs"),
        ({"device": "cpu", "cpu_offload_gb": 1.0}, "is for GPUs"),
        ({"device": "cpu", "quantization": "fp8"}, "is for GPUs; a CPU has int4 and int8"),
        ({"device": "cpu", "quantization": "bitsandbytes"}, "is for GPUs"),
        ({"device": "cpu", "kv_cache_dtype": "fp8"}, "float16 and float32"),
        ({"device": "cpu", "kv_cache_dtype": "bfloat16"}, "float16 and float32"),
        ({"executor": "torch", "dtype": "float32", "kv_cache_dtype": "float16"}, "leave it at auto"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(tiny_model: Path, settings: dict[str, Any], words: str) -> None:
    config = EngineConfig(model=str(tiny_model), load_format="dummy", threads=1, **settings)
    with pytest.raises(ConfigError, match=words):
        build_engine(config, ())


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_cpu_quantizes_at_load(tiny_model: Path, executor: str) -> None:
    sizes = {}
    for kind in ("none", "int8", "int4"):
        config = EngineConfig(
            model=str(tiny_model), load_format="dummy", threads=1, device="cpu", executor=executor, quantization=kind
        )  # type: ignore[arg-type]
        built = build_engine(config, ())
        sizes[kind] = built.info.weight_bytes
    assert sizes["int4"] < sizes["none"]
    if executor == "native":  # torch has no products of 8-bit blocks
        assert sizes["int4"] < sizes["int8"] < sizes["none"]


def test_what_will_go_badly_is_told(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    longest = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    for model_len, threads, words in (
        (longest, 1, ""),
        (longest + 1, 1, f"--max-model-len {longest + 1} is more than the {longest} tokens"),
        (longest, usable_cores() + 1, f"--threads {usable_cores() + 1} on {usable_cores()} cores"),
    ):
        caplog.clear()
        config = EngineConfig(
            model=str(tiny_model), load_format="dummy", device="cpu", max_model_len=model_len, threads=threads
        )
        build_engine(config, ())
        told = [record.getMessage() for record in caplog.records if "--" in record.getMessage()]
        assert len(told) == bool(words)
        assert not words or words in told[0]


def test_a_tokenizer_that_knows_more_than_the_model_is_told(
    tiny_model: Path, tmp_path: Path, smollm2_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a model whose vocabulary was cut; ends that it cannot answer with are none."""
    described = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "vocab_size": 1000}))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", threads=1, device="cpu")
    built = build_engine(config, (3, 40_000), tokenizer=load_tokenizer(smollm2_path))
    assert built.info.eos_token_ids == [2, 3]
    assert "the tokenizer knows 49152 tokens, the model 1000" in caplog.text


def plan(**changes: Any) -> Any:
    sizes = {
        "weight_bytes": 1 << 30,
        "kv_bytes_per_block": 1 << 20,
        "block_size": 16,
        "wanted_model_len": 32_768,
        "fixed_model_len": False,
        "max_num_seqs": 256,
        "budget": 1 << 30,
        "workspace_bytes": 1 << 29,
    }
    return plan_memory(**{**sizes, **changes})


def test_a_gpus_plan_counts_chats_and_names_its_own_flag() -> None:
    lines = "\n".join(plan().lines())
    assert "16,384 tokens = 2.0 chats of 8,192 tokens" in lines
    assert "512 MiB for activations and graphs" in lines
    assert "--gpu-memory-utilization" in lines  # the context had to shrink


def test_a_gpu_without_room_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization or --kv-cache-memory"):
        plan(budget=-5)


def test_one_block_is_enough_for_a_context_of_one_block() -> None:
    """There is room for more, and nothing to put there."""
    assert plan(wanted_model_len=16, fixed_model_len=True, max_num_seqs=1).num_blocks == 1


@pytest.mark.parametrize(("budget", "held"), [(-5, "no block"), (1 << 20, "1 block")])
def test_a_cache_too_small_for_any_context_says_what_it_would_hold(budget: int, held: str) -> None:
    with pytest.raises(ConfigError, match=f"would hold {held} of 16 tokens: .* at 1 MiB a block; give it"):
        plan(budget=budget)


def test_a_gpu_filled_by_weights_is_told_what_takes_less() -> None:
    with pytest.raises(ConfigError, match=r"less than 1.00 GiB for weights .*--cpu-offload-gb.* and 512 MiB for steps"):
        plan(budget=-5)


@pytest.mark.parametrize(
    ("taken", "free", "expected"),
    [
        (14, 9, 5),  # alone on a card of 24
        (14, 60, 5),  # a part of a larger card, on which others have freed memory while the model was loaded
        (14, 3, 1),  # others hold more than their share
        (22, 1, -3),
    ],
)
def test_other_programs_do_not_change_what_a_model_took(taken: int, free: int, expected: int) -> None:
    assert device_budget(usable=21, taken=taken, free=free, workspace_bytes=2) == expected


def test_weights_that_do_not_fit_the_gpu_are_refused_with_what_to_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(platforms, "unusable_reason", lambda: None)
    monkeypatch.setattr(platforms, "memory", lambda device: platforms.DeviceMemory(3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("aphrodite.engine.device_builder._executor", full)
    config = EngineConfig(model=str(tiny_model), load_format="dummy", device="cuda")
    with pytest.raises(ConfigError, match=r"3.00 GiB of its 8.00 GiB were free, for other programs hold 5.0.*--cpu"):
        build_engine(config, ())


def test_cards_without_bfloat16_compute_in_float16(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turing = platforms.Platform(kind="cuda", name="T4", architecture="sm_75", capability=(7, 5))
    checkpoint = open_checkpoint(tiny_model, load_format="dummy")
    monkeypatch.setattr(platforms, "current", lambda: turing)
    assert device_dtype(checkpoint) is torch.float16
    monkeypatch.setattr(platforms, "current", lambda: dataclasses.replace(turing, capability=(8, 0)))
    assert device_dtype(checkpoint) is torch.bfloat16


def test_a_driver_that_is_not_used_is_mentioned(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platforms, "unusable_reason", lambda: "the driver is too old")
    monkeypatch.setattr("aphrodite.engine.builder.has_driver", lambda: True)
    config = EngineConfig(model=str(tiny_model), load_format="dummy", threads=1, kv_cache_memory=1 << 22)
    build_engine(config, ()).core.close()
    assert "the driver is too old" in caplog.text


def test_the_workspace_holds_the_largest_steps_activations_and_logits() -> None:
    spec = ModelSpec(
        family="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        max_position=2048,
        rotary=RotarySpec(dim=16),
        windows=(None, None),
    )

    def workspace(tokens: int, sequences: int) -> int:
        return device_workspace(
            spec,
            total=1 << 30,
            max_num_seqs=sequences,
            max_model_len=2048,
            max_num_batched_tokens=tokens,
            itemsize=2,
        )

    assert workspace(4096, 8) - workspace(0, 8) >= 4096 * 2 * (64 + 128 * 2 + (4 + 2 * 2) * 16)
    assert workspace(0, 16) - workspace(0, 8) >= 8 * 1000 * (2 + 4)
