"""Where commands print: answers on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells expect


def stdout() -> Console:
    """A console for results. Markup and highlighting are off: model names and texts may hold brackets."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def stderr() -> Console:
    """A console for progress, plans and errors."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False)


def print_error(message: str) -> None:
    """One line on standard error, red unless NO_COLOR is set (wrapped by the terminal, never by us, so that it can be
    searched)."""
    line = " ".join(message.split())
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[31m{line}\x1b[0m"
    print(f"error: {line}", file=sys.stderr)


def progress_bar(console: Console, *, unit: str = "") -> Progress:
    """A progress bar: label, bar, share, count, elapsed and remaining time. It vanishes when done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def format_bytes(size: float) -> str:
    """`size` for people, in binary units with three significant digits (`98.1 MiB`)."""
    for suffix, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            value = size / scale
            return f"{value:.0f} {suffix}" if value >= 100 else f"{value:.3g} {suffix}"
    return f"{size:.0f} B"
