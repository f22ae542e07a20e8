"""Tests that need a GPU: skipped without one. Run with `python -m pytest -o addopts= tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_engines import THREADS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """torch's threads spin while they wait: as many as there are cores, in each of several processes, stand still."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def device() -> torch.device:
    """The GPU under test."""
    return torch.device("cuda", torch.cuda.current_device())
