"""What `run` shows while it starts: loading bars, the memory plan, and a line to paste."""

from __future__ import annotations

import json
import shlex
import time
from types import TracebackType
from typing import TYPE_CHECKING

from aphrodite.cli.console import stderr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress, TaskID

    from aphrodite.engine.messages import EngineInfo


class StartReport:
    """Shows start-up on standard error. Bars appear on a terminal only."""

    def __init__(self) -> None:
        self._console = stderr()
        self._began = time.perf_counter()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StartReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bars()

    def progress(self, label: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a phase; phases are told apart by `label`."""
        if not self._console.is_terminal:
            return
        if self._bars is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    def ready(self, info: EngineInfo, model: str, url: str, *, needs_key: bool) -> None:
        """Say what was loaded, where it lies, how to reach it.

        Args:
            model: the name under which the API offers it.
            url: base address, without a path.
        """
        kernels = ", ".join(f"{name} {choice}" for name, choice in info.kernels.items())
        lines = [f"Model     {model} ({info.family})", *(line[:1].upper() + line[1:] for line in info.memory_plan)]
        if kernels:
            lines.append(f"Kernels   {kernels}")
        self._ready(lines, model, url, needs_key=needs_key)

    def ready_with_several(self, lines: Sequence[str], model: str, url: str, *, needs_key: bool) -> None:
        """Say which models there are, and how to reach one of them.

        Args:
            lines: the models, in words.
            model: one of them.
        """
        self._ready(lines, model, url, needs_key=needs_key)

    def _ready(self, lines: Sequence[str], model: str, url: str, *, needs_key: bool) -> None:
        self._stop_bars()
        seconds = time.perf_counter() - self._began
        for line in lines:
            self._console.print(line, soft_wrap=True)
        ready = f"Ready after {seconds:.1f} s at {url} (documentation at {url}/docs). Try:"
        self._console.print(ready, style="bold", soft_wrap=True)
        self._console.print(curl_line(url, model, needs_key=needs_key), soft_wrap=True)

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def curl_line(url: str, model: str, *, needs_key: bool) -> str:
    """A command that asks the server for a streamed answer, fit to be pasted into a shell."""
    body = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": "Write the first line of a story about the sea."}],
    }
    parts = ["curl", "-N", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if needs_key:
        parts += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join([*parts, "-d", json.dumps(body)])
