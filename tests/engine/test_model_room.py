"""How much memory a model may take: the GPU's where it will run there, else the host's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.room import model_room

GIB = 1 << 30


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a driver, 100 GiB of free memory, and a GPU that answers what this says."""
    found: dict[str, Any] = {"stdout": f"{20 * GIB}\n", "driver": True, "error": None, "asked": 0}

    def run(command: list[str], **options: Any) -> Any:
        assert command[0] == sys.executable
        found["asked"] += 1
        if found["error"] is not None:
            raise found["error"]
        return subprocess.CompletedProcess(command, 0, stdout=found["stdout"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(Path, "exists", lambda self: found["driver"])
    monkeypatch.setattr(sys, "platform", "linux")
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100 * GIB))
    return found


def test_a_gpus_memory_counts_where_it_serves(answers: dict[str, Any]) -> None:
    assert model_room(EngineConfig(gpu_memory_utilization=0.5)) == (10 * GIB, "GPU memory")
    assert model_room(EngineConfig(gpu_memory_utilization=0.5, cpu_offload_gb=4)) == (14 * GIB, "GPU memory")


@pytest.mark.parametrize("driver", ["/dev/nvidiactl", "/dev/kfd", "/usr/lib/wsl/lib/libcuda.so.1"])
def test_a_gpu_is_asked_where_there_is_a_driver(
    driver: str, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows gives Linux no device files of NVIDIA's, but its library."""
    monkeypatch.setattr(Path, "exists", lambda self: self == Path(driver))
    assert model_room(EngineConfig()).where == "GPU memory"


@pytest.mark.parametrize(
    ("settings", "changes", "asked"),
    [
        ({"device": "cpu"}, {}, 0),
        ({"executor": "native"}, {}, 0),
        ({}, {"driver": False}, 0),
        ({}, {"stdout": ""}, 1),  # a GPU that cannot be used
        ({}, {"error": subprocess.TimeoutExpired("python", 60)}, 1),
    ],
)
def test_else_the_hosts(settings: dict[str, Any], changes: dict[str, Any], asked: int, answers: dict[str, Any]) -> None:
    answers.update(changes)
    room = model_room(EngineConfig(**settings))
    assert room.where == "memory"
    assert 80 * GIB < room.bytes < 100 * GIB
    assert answers["asked"] == asked
