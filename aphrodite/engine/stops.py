"""Stop strings in a stream of text: nothing of a match leaks, nothing else is held back longer than it must.

All stop strings are searched at once with an Aho-Corasick automaton (doi 10.1145/360825.360855), which reads
each character once, whatever the pieces the text comes in.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import NamedTuple


class _Automaton(NamedTuple):
    """States are the prefixes of the stop strings; state 0 is the empty one.

    Attributes:
        edges: per state, next state by character, for prefixes that grow.
        fail: per state, the longest proper suffix that is a prefix too.
        depth: per state, the length of its prefix.
        match: per state, the longest stop string that the prefix ends with, or None.
    """

    edges: list[dict[str, int]]
    fail: list[int]
    depth: list[int]
    match: list[str | None]


@lru_cache(maxsize=256)
def _compile(stops: tuple[str, ...]) -> _Automaton:
    edges: list[dict[str, int]] = [{}]
    depth: list[int] = [0]
    match: list[str | None] = [None]
    for stop in stops:
        state = 0
        for char in stop:
            if char not in edges[state]:
                edges[state][char] = len(edges)
                edges.append({})
                depth.append(depth[state] + 1)
                match.append(None)
            state = edges[state][char]
        match[state] = stop
    fail = [0] * len(edges)
    queue = deque(edges[0].values())
    while queue:
        state = queue.popleft()
        for char, child in edges[state].items():
            other = fail[state]
            while other and char not in edges[other]:
                other = fail[other]
            fail[child] = edges[other].get(char, 0)
            queue.append(child)
        if match[state] is None:
            match[state] = match[fail[state]]
    return _Automaton(edges, fail, depth, match)


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    The match that ends first in the text wins, since a stream cannot know of another that would begin earlier
    and end later; of those that end at the same character, the longest, which is the one that begins earliest.
    Held back is only the longest end of the text that begins some stop string.

    Args:
        stops: the strings; empty ones are ignored.
        include: leave the matched string in the text.
    """

    __slots__ = ("_automaton", "_first", "_held", "_include", "_matched", "_state")

    def __init__(self, stops: tuple[str, ...], *, include: bool) -> None:
        self._automaton = _compile(tuple(stop for stop in stops if stop))
        self._first = self._automaton.edges[0]
        self._include = include
        self._state = 0
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; returns what may be shown now, and the stop string if one is complete.

        After a match there is no more text: later pushes return nothing.
        """
        if not self._first:
            return text, None
        if self._matched:
            return "", None
        if not self._state and self._first.keys().isdisjoint(text):
            return text, None
        edges, fail, _, match = self._automaton
        state = self._state
        for position, char in enumerate(text):
            while char not in edges[state] and state:
                state = fail[state]
            state = edges[state].get(char, 0)
            if (stop := match[state]) is not None:
                return self._finish(text[: position + 1], stop), stop
        self._state = state
        return self._hold(self._held + text, self._automaton.depth[state]), None

    def _hold(self, text: str, length: int) -> str:
        cut = len(text) - length
        self._held = text[cut:]
        return text[:cut]

    def _finish(self, text: str, stop: str) -> str:
        text = self._held + text
        self._held = ""
        self._matched = True
        return text if self._include else text[: len(text) - len(stop)]

    def flush(self) -> str:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        self._state = 0
        return held
