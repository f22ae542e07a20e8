"""Grammars of requests are tried in processes that may be killed, before the engine compiles them.

llguidance bounds its own work, but a grammar is a client's program: one that crashes, eats memory or takes too long
must cost nobody but the client anything. What has been tried is remembered.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import subprocess
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import msgspec

from aphrodite.engine.children import child_environment, python_command
from aphrodite.errors import InvalidRequestError, QueueFullError, RequestFailedError
from aphrodite.sampling.grammar import key_of, require, unusable
from aphrodite.sampling.table import Grammar

logger = logging.getLogger(__name__)

SECONDS = 5.0  # that trying a grammar may take
START_SECONDS = 60.0  # that starting a process may take
NUM_WORKERS = 2  # so that one bad grammar does not hold up all others
MAX_WAITING = 64
_MAX_REMEMBERED = 1024


class GrammarChecker:
    """Tries grammars for one model's vocabulary. Processes start when the first grammars come.

    Args:
        tokenizer: file or folder of the tokenizer.
        vocab_size: number of logits.
        seconds: that one grammar may take.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, *, seconds: float = SECONDS) -> None:
        self._command = python_command("aphrodite.engine.grammar_worker", str(tokenizer), str(vocab_size))
        self._seconds = seconds
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._answers: OrderedDict[bytes, str | None] = OrderedDict()
        self._closed = False

    def check(self, grammar: Grammar) -> None:
        """Return if the engine may compile the grammar. Blocks; at most `NUM_WORKERS` threads should call it at once.

        Raises:
            InvalidRequestError: it cannot be used, or takes too much time or memory.
            RequestFailedError: the process that tries grammars could not be started; the log has the reason.
        """
        require()
        key = key_of(grammar)
        with self._lock:
            known = key in self._answers
            answer = self._answers.get(key)
            worker = self._idle.pop() if not known and self._idle else None
        if not known:
            answer = self._ask(worker or _Worker(self._command), grammar)
            with self._lock:
                self._answers[key] = answer
                if len(self._answers) > _MAX_REMEMBERED:
                    self._answers.popitem(last=False)
        if answer is not None:
            raise InvalidRequestError(answer, param="grammar")

    async def check_async(self, grammar: Grammar) -> None:
        """`check` for asyncio programs.

        Raises:
            QueueFullError: too many grammars wait to be tried.
        """
        if self._waiting >= MAX_WAITING:
            raise QueueFullError(f"{self._waiting} grammars wait to be prepared; try again later", retry_after=1.0)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_WORKERS, "grammars")
        self._waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.check, grammar)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the processes; grammars that are being tried fail."""
        with self._lock:
            self._closed = True
            workers, self._idle = self._idle, []
        for worker in workers:
            worker.end()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, worker: _Worker, grammar: Grammar) -> str | None:
        """A worker's answer; one that does not give it is ended, and another starts with the next grammar."""
        try:
            worker.wait_ready()
            answer = worker.ask(grammar, self._seconds)
        except BaseException:
            worker.end()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return answer
        worker.end()
        return answer


class _Worker:
    """A process that tries one grammar at a time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment()
        )
        self._ready = False

    def wait_ready(self) -> None:
        if self._ready:
            return
        message = self._receive(START_SECONDS)
        error = "it ended or did not answer" if message is None else msgspec.msgpack.decode(message, type=str | None)
        if error is not None:
            logger.error("the process that tries grammars could not be started: %s", error)
            raise RequestFailedError("grammars cannot be prepared now; the server's log has the reason")
        self._ready = True

    def ask(self, grammar: Grammar, seconds: float) -> str | None:
        """Why the grammar cannot be used, None if it can.

        Raises:
            InvalidRequestError: no answer came.
        """
        message = msgspec.msgpack.encode(grammar)
        try:
            self._pipe(self._process.stdin).write(len(message).to_bytes(4, "little") + message)
            self._pipe(self._process.stdin).flush()
        except BrokenPipeError:
            logger.debug("the process that tries grammars ended before it read one")
        answer = self._receive(seconds)
        if answer is not None:
            return msgspec.msgpack.decode(answer, type=str | None)
        why = (
            f"it takes longer than {seconds:g} seconds to prepare"
            if self._process.poll() is None
            else "preparing it takes too much memory, or fails in another way"
        )
        raise unusable(grammar, f"{why}. Simplify it.")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe(self._process.stdout).close()
        try:
            self._pipe(self._process.stdin).close()
        except BrokenPipeError:
            logger.debug("the process that tries grammars ended before it read one")

    def _receive(self, seconds: float) -> bytes | None:
        """The next message; None if the process ended or the time is over."""
        descriptor = self._pipe(self._process.stdout).fileno()
        deadline = time.monotonic() + seconds
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return None
            part = os.read(descriptor, 65_536)
            if not part:
                self._process.wait()
                return None
            data += part
        return data[4:]

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise RuntimeError("the process was started without pipes")
        return pipe
