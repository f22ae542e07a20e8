"""Serving until a signal, or until the engine dies: sockets, draining, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Literal

import uvicorn

from aphrodite.errors import ConfigError
from aphrodite.server.app import Application
from aphrodite.server.config import ServerConfig
from aphrodite.server.connections import allow_connections
from aphrodite.server.errors import engine_dead, shutting_down
from aphrodite.server.http_protocol import bounded_protocol
from aphrodite.server.lifecycle import Lifecycle
from aphrodite.server.model_pool import ModelPool

logger = logging.getLogger(__name__)

# Time for last events to reach clients after their requests were cut off.
_FLUSH_SECONDS = 2.0


async def serve(
    models: ModelPool,
    config: ServerConfig,
    sock: socket.socket | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, or until the engine dies; returns the process's exit code.

    The first signal drains: new work is refused with 503, what runs may finish within
    `shutdown_timeout` and is then cut off with a last error event. The second signal ends at once.

    Args:
        sock: a listening socket; by default one is bound to the configured host and port.
        on_ready: called with the server's URL as soon as it accepts connections.

    Returns:
        0 after a clean drain, 1 if requests were cut off or the engine died, 128 + N after a second
        signal N.

    Raises:
        ConfigError: the address cannot be bound.
    """
    sock = sock or bind_socket(config.host, config.port)
    allow_connections(config.max_connections)
    app = Application(models, config)
    server = _Server(_uvicorn_config(app, config), lambda: on_ready(_url(sock, config)) if on_ready else None)
    signals = _Signals()
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    died = asyncio.ensure_future(models.dead.wait())
    stopped = asyncio.ensure_future(signals.first.wait())
    forced = asyncio.ensure_future(signals.second.wait())
    try:
        with signals.installed():
            await asyncio.wait((serving, died, stopped), return_when=asyncio.FIRST_COMPLETED)
            code = 1
            if stopped.done() and not died.done():
                code = await _drain(app.lifecycle, config.shutdown_timeout, (died, forced))
            if forced.done():
                app.lifecycle.stop_all(shutting_down())
                code = 128 + signals.number
            elif died.done():
                code = await _give_up(app.lifecycle)
            server.stop(force=forced.done())
            await asyncio.wait((serving, forced), return_when=asyncio.FIRST_COMPLETED)
    finally:
        server.stop(force=True)
        for task in (died, stopped, forced):
            task.cancel()
        await serving
    return code


async def _drain(lifecycle: Lifecycle, timeout: float, interrupts: Iterable[asyncio.Task[Literal[True]]]) -> int:
    lifecycle.draining = True
    if len(lifecycle):
        logger.info("stopping; requests that run: %d; they get %g s to finish", len(lifecycle), timeout)
    idle = asyncio.ensure_future(lifecycle.idle.wait())
    try:
        await asyncio.wait((idle, *interrupts), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        idle.cancel()
    if any(interrupt.done() for interrupt in interrupts):
        return 1
    cut = lifecycle.stop_all(shutting_down())
    if cut:
        logger.warning("requests that did not finish in time and were cut off: %d", cut)
        await _flush(lifecycle)
    return 1 if cut else 0


async def _give_up(lifecycle: Lifecycle) -> int:
    """The engine is dead: its requests fail by themselves, the rest is told."""
    logger.error("the engine has died; the server ends")
    lifecycle.draining = True
    lifecycle.stop_all(engine_dead())
    await _flush(lifecycle)
    return 1


async def _flush(lifecycle: Lifecycle) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FLUSH_SECONDS):
            await lifecycle.idle.wait()


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound TCP socket.

    Raises:
        ConfigError: the address does not exist here or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --host or --port."
        ) from None
    sock.setblocking(False)
    return sock


def _url(sock: socket.socket, config: ServerConfig) -> str:
    port = sock.getsockname()[1]
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _uvicorn_config(app: Callable[..., object], config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(config),
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(config.keep_alive_timeout),
        timeout_graceful_shutdown=int(_FLUSH_SECONDS),
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handling and polling, and with a word when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._stopped = asyncio.Event()

    def stop(self, *, force: bool) -> None:
        """Stop listening and end; with `force` without waiting for connections."""
        self.should_exit = True
        self.force_exit = self.force_exit or force
        self._stopped.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # which keeps the date header
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


class _Signals:
    """SIGINT and SIGTERM as events; `number` is the latest one."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.number = 0

    def arrived(self, number: int) -> None:
        self.number = number
        (self.second if self.first.is_set() else self.first).set()

    @contextlib.contextmanager
    def installed(self) -> Generator[None, None, None]:
        """Handle the signals here; outside of the main thread, where Python forbids it, they stay as they are."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in numbers:
            loop.add_signal_handler(number, self.arrived, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
