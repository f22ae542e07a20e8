"""What people are told of many things, in errors and descriptions: never a screen full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

SHOWN = 8  # names of each kind


def listed(what: str, names: Iterable[str]) -> list[str]:
    """`["missing: a, b and 7 more"]`, or nothing where there are no names."""
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what}: {', '.join(names[:SHOWN])}{more}"]


def count_by_size(things: Iterable[tuple[T, int]]) -> dict[T, int]:
    """How many there are of each kind, of (kind, bytes): the kind with most bytes first."""
    count: Counter[T] = Counter()
    size: Counter[T] = Counter()
    for kind, nbytes in things:
        count[kind] += 1
        size[kind] += nbytes
    return {kind: count[kind] for kind, _ in size.most_common()}


def one_line(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
