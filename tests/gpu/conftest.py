"""Tests that need a GPU: skipped without one. Run with `python -m pytest -o addopts= tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


@pytest.fixture
def device() -> torch.device:
    """The GPU under test."""
    return torch.device("cuda", torch.cuda.current_device())
