"""What each accelerator can do, told from torch's description of it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from aphrodite import platforms


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Answers are kept for the life of a process; a test wants its own."""
    cached = (platforms.current, platforms.platform_of, platforms.unusable_reason)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *, hip: bool, **properties: object) -> None:
    values = SimpleNamespace(**{"name": "card", "multi_processor_count": 100, **properties})
    monkeypatch.setattr(torch.version, "hip", "6.4" if hip else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: values)


@pytest.mark.parametrize(
    ("capability", "dependent", "fp8", "bfloat16"),
    [
        ((9, 0), True, torch.float8_e4m3fn, True),
        ((8, 9), False, torch.float8_e4m3fn, True),
        ((8, 6), False, None, True),
        ((7, 5), False, None, False),
    ],
)
def test_cuda_cards_by_capability(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dependent: bool,
    fp8: torch.dtype | None,
    bfloat16: bool,
) -> None:
    pretend(monkeypatch, hip=False, major=capability[0], minor=capability[1])
    platform = platforms.current()
    assert (platform.kind, platform.name, platform.multiprocessors) == ("cuda", "card", 100)
    assert (platform.capability, platform.architecture) == (capability, f"sm_{capability[0]}{capability[1]}")
    assert (platform.has_dependent_launch, platform.fp8_dtype, platform.has_bfloat16) == (dependent, fp8, bfloat16)
    assert platform.describe() == f"card ({platform.architecture}, 100 multiprocessors)"


@pytest.mark.parametrize(
    ("reported", "architecture", "fp8"),
    [
        ("gfx942:sramecc+:xnack-", "gfx942", torch.float8_e4m3fnuz),
        ("gfx950", "gfx950", torch.float8_e4m3fn),
        ("gfx1201", "gfx1201", torch.float8_e4m3fn),
        ("gfx1100", "gfx1100", None),
        ("gfx90a:xnack-", "gfx90a", None),
    ],
)
def test_hip_cards_by_architecture(
    monkeypatch: pytest.MonkeyPatch, reported: str, architecture: str, fp8: torch.dtype | None
) -> None:
    pretend(monkeypatch, hip=True, gcnArchName=reported)
    platform = platforms.current()
    assert (platform.kind, platform.architecture, platform.fp8_dtype) == ("hip", architecture, fp8)
    assert not platform.has_dependent_launch
    assert not platform.has_cudnn_attention
    assert platforms.is_hip()


def test_without_a_card_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert platforms.current().kind == "none"
    assert platforms.current().describe() == "none"
    assert platforms.current().fp8_dtype is None
    assert "no GPU" in str(platforms.unusable_reason())


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading"
)


@pytest.mark.parametrize(
    ("error", "visible", "words"),
    [
        (RuntimeError(OLD_DRIVER), None, r"too old \(found version 11040\)$"),
        (RuntimeError("No CUDA GPUs are available"), "", "available .CUDA_VISIBLE_DEVICES is ''.$"),
        (
            RuntimeError("Found no NVIDIA driver on your system.\nPlease check"),
            None,
            "no NVIDIA driver on your system.$",
        ),
    ],
)
def test_why_torch_finds_none_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, visible: str | None, words: str
) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert re.search(words, str(platforms.unusable_reason()))


def test_a_build_for_cpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "built for CPUs only" in str(platforms.unusable_reason())


def test_cards_too_old_and_missing_triton_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, hip=False, major=6, minor=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "capability 7.5" in str(platforms.unusable_reason())
    platforms.unusable_reason.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in str(platforms.unusable_reason())
    pretend(monkeypatch, hip=True, gcnArchName="gfx90a")
    platforms.current.cache_clear()
    platforms.platform_of.cache_clear()
    platforms.unusable_reason.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert platforms.unusable_reason() is None
