"""`run`: serve a model over HTTP."""

from __future__ import annotations

import typer

from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig, ServerSettings, Settings


@with_options(EngineConfig, ServerSettings)
def run(*, settings: Settings) -> None:
    """Serve a model over HTTP with OpenAI's protocol.

    Without MODEL the small default model is served, fetched once if it is not installed.
    """
    from aphrodite.cli.report import StartReport
    from aphrodite.server.config import ServerConfig
    from aphrodite.server.run import run_server

    server = ServerConfig.from_settings(settings.server, served_model_name=settings.engine.served_model_name)
    with StartReport() as report:
        status = run_server(settings.engine, server, on_progress=report.progress, on_ready=report.ready)
    raise typer.Exit(status)
