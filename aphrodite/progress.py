"""A progress bar for offline generation: requests done, tokens generated, tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def generation_progress(total: int, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(tokens, finished)`: so many new tokens, and so many requests that ended with them.

    Nothing is drawn unless `show` is set and standard error is a terminal.
    """
    if not show:
        yield lambda tokens, finished: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total, rate=0.0)
        began = time.perf_counter()
        tokens_done = 0

        def advance(tokens: int, finished: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            rate = tokens_done / max(time.perf_counter() - began, 1e-9)
            bar.update(task, advance=finished, rate=rate)

        yield advance
