"""`run`: serve a model over HTTP, or several."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import typer

from aphrodite.cli.console import INTERRUPTED
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig, ServerSettings
from aphrodite.settings import Settings

if TYPE_CHECKING:
    import asyncio

    from aphrodite.cli.report import StartReport
    from aphrodite.server.config import ServerConfig


@with_options(EngineConfig, ServerSettings)
def run(*, settings: Settings) -> None:
    """Serve a model over HTTP, in the protocols of OpenAI, KoboldAI, Anthropic, Ollama and llama.cpp.

    Without MODEL the small default model is served, fetched once if it is not installed. With --models-dir, or a list
    of models in --config, several are served, each loaded when a request asks for it.
    """
    import asyncio

    from aphrodite.cli.report import StartReport
    from aphrodite.engine.preparation import resolve_model
    from aphrodite.logs import configure_logging
    from aphrodite.model_list import has_several

    configure_logging(settings.engine.log_level)
    several = has_several(settings)
    try:
        if not several:
            # Here and not by the engine, whose start cannot be interrupted while it fetches a model.
            settings = dataclasses.replace(settings, engine=resolve_model(settings.engine)[0])
        with StartReport() as report, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            serve = _serve_several if several else _serve
            status = runner.run(serve(settings, report))
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

        info = engine.info
        memory = info.weight_bytes + info.num_blocks * info.kv_bytes_per_block
        return int(await server.serve(ModelPool.of_engine(engine, config, memory=memory), config, sock, on_ready=ready))
    finally:
        await engine.close()


async def _serve_several(settings: Settings, report: StartReport) -> int:
    """Load what is to be there from the start, and serve."""
    from aphrodite.model_list import offered_models
    from aphrodite.server.run import bind_socket, serve
    from aphrodite.server.several import open_pool, summary

    offered = offered_models(settings)
    config = _server_config(settings)
    sock = bind_socket(config.host, config.port)
    with contextlib.closing(sock):
        async with open_pool(settings, config, offered) as pool:

            def ready(url: str) -> None:
                name = pool.models[0].name if pool.models else "MODEL"
                report.ready_with_several(summary(pool), name, url, needs_key=bool(config.api_keys))

            return await serve(pool, config, sock, on_ready=ready)


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
