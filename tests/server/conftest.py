"""Fixtures of the server's tests: a running server, and the application alone."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.model_pool import ModelPool

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine
from running import RunningServer, running_server


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server() as running:
        yield running


@pytest.fixture
def make_app() -> Callable[..., tuple[Application, FakeEngine]]:
    """The application alone, for calls without a socket."""

    def make(engine: FakeEngine | None = None, **settings: object) -> tuple[Application, FakeEngine]:
        engine = engine or FakeEngine()
        config = ServerConfig(**settings)
        return Application(ModelPool.of_engine(engine, config), config), engine

    return make
