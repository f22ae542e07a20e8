"""How many cores a process may use: those of its affinity, and no more than its control group's share of time."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from aphrodite import cores


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sixteen cores of two threads each, and control groups in a folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 32 if logical else 16)
    for name, file in (("_QUOTA", "cpu.max"), ("_OLD_QUOTA", "quota"), ("_OLD_PERIOD", "period")):
        monkeypatch.setattr(cores, name, tmp_path / file)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "usable", "threads"),
    [
        (None, 32, 16),
        ("max 100000", 32, 16),
        ("400000 100000", 4, 4),
        ("150000 100000", 2, 2),
        ("50000 100000", 1, 1),
        ("2000000 100000", 20, 16),
        ("unreadable", 32, 16),
    ],
)
def test_a_containers_share_counts(machine: Path, content: str | None, usable: int, threads: int) -> None:
    if content is not None:
        (machine / "cpu.max").write_text(content + "\n")
    assert (cores.usable_cores(), cores.computing_threads()) == (usable, threads)


@pytest.mark.parametrize(("quota", "usable"), [("-1", 32), ("300000", 3)])
def test_old_control_groups_count_too(machine: Path, quota: str, usable: int) -> None:
    (machine / "quota").write_text(quota + "\n")
    (machine / "period").write_text("100000\n")
    assert cores.usable_cores() == usable


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert cores.computing_threads() == 2
