"""The engine process: loads the model, then answers messages until its parent goes away.

Run as `python -m aphrodite.engine.process SOCKET`; the configuration comes as msgpack on standard input,
which stays open: its end means that the parent is gone, and the process ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec
import zmq

from aphrodite.config import EngineConfig
from aphrodite.engine.messages import (
    AbortRequests,
    AddRequest,
    Fatal,
    FromEngine,
    LoadAdapter,
    Ping,
    Pong,
    Progress,
    ResetPrefixCache,
    Shutdown,
    StepOutputs,
    ToEngine,
    UnloadAdapter,
)
from aphrodite.errors import AphroditeError
from aphrodite.logs import configure_logging

logger = logging.getLogger(__name__)


class EngineServer:
    """Drives an EngineCore from the messages of one socket."""

    def __init__(self, socket: zmq.Socket[bytes], config: EngineConfig) -> None:
        # Imported here so that the parent hears of a broken installation as a message.
        from aphrodite.engine.builder import build_engine
        from aphrodite.engine.preparation import tokenizer_path
        from aphrodite.tokenizer.loader import load_tokenizer

        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        tokenizer = load_tokenizer(tokenizer_path(config))
        built = build_engine(config, tokenizer.eos_token_ids, self._report_progress, tokenizer=tokenizer)
        self._core = built.core
        # What loading left stays to the end. A full collection that looked through it would stop every stream for
        # 0.1 s (measured), now and then.
        gc.freeze()
        self._send(built.info)

    def run(self) -> None:
        """Serve until told to shut down."""
        core = self._core
        while True:
            busy = core.has_work()
            # An idle engine sleeps here; a busy one only looks whether something has come.
            if not self._take_messages(wait=not busy):
                break
            if core.has_work():
                self._send(StepOutputs(core.step(), core.stats()))
                for news in core.adapters.take_news():
                    self._send(news)
        core.close()

    def _take_messages(self, *, wait: bool) -> bool:
        """Apply every message that has come; False when one of them was Shutdown."""
        if wait:
            self._socket.poll()
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            message = self._decoder.decode(frame)
            if isinstance(message, Shutdown):
                return False
            self._apply(message)

    def _apply(
        self, message: AddRequest | AbortRequests | Ping | ResetPrefixCache | LoadAdapter | UnloadAdapter
    ) -> None:
        match message:
            case AddRequest():
                self._core.add(message)
            case AbortRequests():
                self._core.abort(message.request_ids)
                self._send(StepOutputs([], self._core.stats()))
            case Ping():
                self._send(Pong(message.number))
            case ResetPrefixCache():
                self._core.reset_prefix_cache()
            case LoadAdapter():
                self._core.adapters.load(message.number, message.path)
            case UnloadAdapter():
                self._core.adapters.unload(message.number)

    def _report_progress(self, label: str, done: int, total: int) -> None:
        self._send(Progress(label, done, total))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))


def main() -> int:
    config = msgspec.msgpack.decode(_read_block(), type=EngineConfig)
    configure_logging(config.log_level)
    threading.Thread(target=_end_with_parent, args=(Path(sys.argv[1]),), name="parent-watch", daemon=True).start()
    # The parent decides when to stop; a Ctrl-C in the terminal reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(f"ipc://{sys.argv[1]}")
    try:
        EngineServer(socket, config).run()
    except AphroditeError as error:
        socket.send(msgspec.msgpack.encode(Fatal(str(error))))
        return 1
    except Exception as error:
        logger.exception("the engine process failed")
        socket.send(msgspec.msgpack.encode(Fatal(f"the engine failed: {type(error).__name__}; the log has the trace")))
        return 1
    finally:
        socket.close(linger=2_000)
        context.term()
    return 0


def _read_block() -> bytes:
    """One length-prefixed block from standard input."""
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    return sys.stdin.buffer.read(size)


def _end_with_parent(address: Path) -> None:
    """End this process when the parent is gone, and clear away the socket's folder, which was the parent's to do."""
    # Not through sys.stdin: a daemon thread inside its lock makes the interpreter's orderly exit a fatal error.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    with contextlib.suppress(OSError):
        address.unlink(missing_ok=True)
        address.parent.rmdir()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
