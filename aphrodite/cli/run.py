"""`run`: serve a model over HTTP."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig, ServerSettings, Settings

if TYPE_CHECKING:
    import asyncio

    from aphrodite.cli.report import StartReport
    from aphrodite.server.config import ServerConfig

INTERRUPTED = 130  # 128 + SIGINT, as shells expect


@with_options(EngineConfig, ServerSettings)
def run(*, settings: Settings) -> None:
    """Serve a model over HTTP, in the protocols of OpenAI, KoboldAI, Anthropic, Ollama and llama.cpp.

    Without MODEL the small default model is served, fetched once if it is not installed.
    """
    import asyncio

    from aphrodite.cli.report import StartReport
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.logs import configure_logging

    configure_logging(settings.engine.log_level)
    try:
        # Here and not by the engine, whose start cannot be interrupted while it fetches a model.
        settings = dataclasses.replace(settings, engine=resolve_model(settings.engine)[0])
        with StartReport() as report, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_serve(settings, report))
    except KeyboardInterrupt:  # while loading; the server handles its signals itself
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(status)


async def _serve(settings: Settings, report: StartReport) -> int:
    """Start the engine process, and import the server while that loads the model."""
    import asyncio
    from importlib import import_module

    from aphrodite.engine.async_engine import AsyncEngine

    starting = asyncio.create_task(AsyncEngine.start(settings.engine, report.progress))
    try:
        server = await asyncio.to_thread(import_module, "aphrodite.server.run")
        config = _server_config(settings)
        # Before the model is there: an address that is taken should not cost that time.
        sock = server.bind_socket(config.host, config.port)
    except BaseException:
        starting.cancel()
        await asyncio.wait([starting])
        raise
    engine = await starting
    from aphrodite.server.model_pool import ModelPool

    try:

        def ready(url: str) -> None:
            report.ready(engine.info, engine.model.name, url, needs_key=bool(config.api_keys))

        return int(await server.serve(ModelPool.of_engine(engine, config), config, sock, on_ready=ready))
    finally:
        await engine.close()


def _server_config(settings: Settings) -> ServerConfig:
    from aphrodite.server.config import ServerConfig

    return ServerConfig.from_settings(settings.server)


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    """uvloop where it exists (not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop
