"""Decline-style dispatch: candidates are tried in order, each says no with a reason, and reasons are logged once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Declined(NamedTuple):
    """A candidate's no."""

    reason: str


class Choice(NamedTuple):
    """What a dispatch came to, for logs and `doctor`."""

    name: str
    reasons: tuple[str, ...]  # why the candidates before it declined

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.reasons)})" if self.reasons else self.name


def choose(purpose: str, candidates: Iterable[tuple[str, Callable[[], T | Declined]]]) -> tuple[T, Choice]:
    """The result of the first candidate that does not decline.

    Args:
        purpose: what is being chosen, for the log.
        candidates: (name, attempt) in order of preference.

    Raises:
        RuntimeError: all declined. The last candidate of every list must accept whatever configuration
            validation lets through, so this is a defect and not a user's error.
    """
    reasons: list[str] = []
    for name, attempt in candidates:
        result = attempt()
        if isinstance(result, Declined):
            reasons.append(f"{name}: {result.reason}")
            continue
        choice = Choice(name, tuple(reasons))
        log_once(logging.INFO, f"{purpose}: {choice}")
        return result, choice
    raise RuntimeError(f"{purpose}: every candidate declined: {'; '.join(reasons)}")


@functools.cache
def log_once(level: int, message: str) -> None:
    """Log `message` the first time that this process says it."""
    logging.getLogger("aphrodite.kernels").log(level, "%s", message)
