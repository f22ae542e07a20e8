"""What the scripts beside this file share: named checks, each a line of output, and an exit status.

Standard library only, because every client lives in an environment of its own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Checks:
    """Runs checks; one that raises is told and counted, and the next one runs all the same."""

    def __init__(self, client: str) -> None:
        self.failed: list[str] = []
        self._client = client

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed.append(label)
            where = [
                frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == HERE
            ]
            lines = ", ".join(f"line {frame.lineno}" for frame in where)
            print(f"BAD {self._client}: {label} ({lines}): {type(error).__name__}: {str(error)[:1500]}", flush=True)
        else:
            print(f"ok  {self._client}: {label}", flush=True)

    def end(self) -> None:
        """Leave with 1 if a check failed."""
        print(f"{self._client}: {len(self.failed)} failed" if self.failed else f"{self._client}: all good")
        sys.exit(int(bool(self.failed)))


HERE = Path(__file__).parent


def require(condition: Any, *seen: Any) -> None:
    """Raises AssertionError, with what was seen, unless the condition holds."""
    if not condition:
        raise AssertionError(f"unexpected: {', '.join(map(repr, seen))}")


def refusal(exception: type[BaseException], call: Any) -> Any:
    """The exception of this type that `call` raises; AssertionError if it returns."""
    try:
        answer = call()
    except exception as error:
        return error
    raise AssertionError(f"was not refused: {answer!r}")


def address() -> tuple[str, str]:
    """The server's address and the key from the command line: URL [KEY]."""
    return sys.argv[1].rstrip("/"), (sys.argv[2:] or ["none"])[0]
