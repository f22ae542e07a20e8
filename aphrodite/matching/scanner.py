"""What every searcher of streamed text has in common."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Match(NamedTuple):
    """Characters `start` to `end` (exclusive) of the whole text so far; `pattern` as the user wrote it."""

    start: int
    end: int
    pattern: str


class Scanner(Protocol):
    """Searches a text that arrives in pieces, reading each character once.

    The match that ends first is reported, since a stream cannot know of another that would begin earlier and
    end later; of those that end together, the one that begins first. What only the next character completes, such as
    `a\\b`, ends later in this sense than what is complete without it.

    Attributes:
        position: characters read.
        live_start: no match that is still to come begins before this character.
        exhausted: the search would have cost too much and was given up.
    """

    position: int

    @property
    def exhausted(self) -> bool: ...

    @property
    def live_start(self) -> int: ...

    def push(self, text: str) -> Match | None:
        """Read `text` up to the end of the first match; `position` tells how far. To go on, push the rest."""

    def finish(self) -> Match | None:
        """The text has ended; a match that only its end completes."""

    def save(self) -> Any:
        """The state, for `restore`; never changed afterwards."""

    def restore(self, state: Any) -> None: ...
