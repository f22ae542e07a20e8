"""Lists of names in errors: enough to see what is wrong, never a screen full."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 8  # names of each kind


def listed(what: str, names: Iterable[str]) -> list[str]:
    """`["missing: a, b and 7 more"]`, or nothing where there are no names."""
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what}: {', '.join(names[:SHOWN])}{more}"]
