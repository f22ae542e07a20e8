"""The engine process seen from its parent: start it, talk to it, notice when it ends."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec
import zmq
import zmq.asyncio

from aphrodite.config import EngineConfig
from aphrodite.engine.children import child_environment, python_command
from aphrodite.engine.messages import EngineInfo, Fatal, FromEngine, Progress, Shutdown, ToEngine
from aphrodite.errors import AphroditeError, ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]


class EngineProcess:
    """A child process that runs the engine, and the private socket to it.

    Constructing it starts the process at once, so that its imports and loading run beside the parent's.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._directory = tempfile.mkdtemp(prefix="aphrodite-")  # mode 0700
        address = str(Path(self._directory) / "engine")
        self._process = subprocess.Popen(
            python_command("aphrodite.engine.process", address), stdin=subprocess.PIPE, env=child_environment()
        )
        settings = msgspec.msgpack.encode(config)
        try:
            self._stdin.write(len(settings).to_bytes(4, "little") + settings)
            self._stdin.flush()
        except BrokenPipeError:
            logger.debug("the engine process ended before it read its settings")
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(f"ipc://{address}")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def _stdin(self) -> IO[bytes]:
        stream = self._process.stdin
        if stream is None:
            raise RuntimeError("the engine process was started without a pipe")
        return stream

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_ready(self, progress: ProgressCallback | None = None) -> EngineInfo:
        """Wait until the model is loaded.

        Raises:
            ConfigError: the engine refused its configuration or checkpoint, or ended; the message says why.
        """
        while True:
            message = await self.receive()
            match message:
                case EngineInfo():
                    return message
                case Progress():
                    if progress is not None:
                        progress(message.label, message.done, message.total)
                case Fatal():
                    raise ConfigError(message.message)
                case _:
                    raise AphroditeError("the engine process spoke out of turn while it was loading")

    async def receive(self) -> FromEngine:
        """The next message.

        Raises:
            EngineDeadError: the process has ended and nothing is left to read.
        """
        while not await self._socket.poll(timeout=500):
            if self._process.poll() is not None and not await self._socket.poll(timeout=0):
                code = self._process.returncode
                hint = " (killed, as a machine does that runs out of memory)" if code == -signal.SIGKILL else ""
                raise EngineDeadError(f"the engine process ended with exit code {code}{hint}")
        message: FromEngine = self._decoder.decode(await self._socket.recv())
        return message

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks (the socket has no high-water mark)."""
        self._socket.send(self._encoder.encode(message))

    async def close(self, timeout: float = 5.0) -> None:
        """Ask the process to end, wait, and kill it if it does not."""
        if self._process.poll() is None:
            self.send(Shutdown())
            try:
                await asyncio.wait_for(asyncio.to_thread(self._process.wait), timeout)
            except TimeoutError:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        self._stdin.close()
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """End the process at once, for exits that cannot wait."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
