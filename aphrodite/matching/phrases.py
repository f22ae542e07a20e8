"""Many phrases searched at once in streamed text.

An Aho-Corasick automaton (doi 10.1145/360825.360855) whose states, the prefixes of phrases, are made when the
text first reaches them: thousands of phrases cost a sort, not a trie, and a text visits few of their prefixes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from aphrodite.matching.scanner import Match

MAX_STATES = 16_384  # kept at once; a text that reaches more has them made anew


@dataclass(slots=True, eq=False)
class _State:
    """A prefix of a phrase: the longest one that the text read so far ends with."""

    prefix: str
    match: str | None  # the longest phrase that the prefix ends with
    edges: dict[str, _State] = field(default_factory=dict)


class PhraseSet:
    """Phrases compiled for searching. Make one with `compile_phrases`, which shares them.

    Attributes:
        first_characters: what a phrase may begin with.
    """

    def __init__(self, phrases: Iterable[str]) -> None:
        self._phrases = sorted({phrase for phrase in phrases if phrase})
        self._known = frozenset(self._phrases)
        self._lengths = sorted({len(phrase) for phrase in self._phrases}, reverse=True)
        self.first_characters = frozenset(phrase[0] for phrase in self._phrases)
        self.root = _State("", None)
        self._states = {"": self.root}

    def step(self, state: _State, char: str) -> _State:
        """The state after one more character. Shortening is paid for by earlier growth: O(log phrases) amortised."""
        prefix = state.prefix + char
        while prefix and not self._begins(prefix):
            prefix = prefix[1:]
        if not prefix:  # not noted: any character of the world may lead here
            return self.root
        reached = self._states.get(prefix) or self._make(prefix)
        state.edges[char] = reached
        return reached

    def _begins(self, prefix: str) -> bool:
        index = bisect_left(self._phrases, prefix)
        return index < len(self._phrases) and self._phrases[index].startswith(prefix)

    def _make(self, prefix: str) -> _State:
        if len(self._states) >= MAX_STATES:
            # Searches under way hold states of their own: without edges those lead to the new ones.
            for state in self._states.values():
                state.edges.clear()
            self._states = {"": self.root}
        lengths = (length for length in self._lengths if length <= len(prefix))
        match = next((prefix[-length:] for length in lengths if prefix[-length:] in self._known), None)
        state = self._states[prefix] = _State(prefix, match)
        return state


@lru_cache(maxsize=64)
def compile_phrases(phrases: tuple[str, ...]) -> PhraseSet:
    return PhraseSet(phrases)


class _Saved(NamedTuple):
    position: int
    state: _State


class PhraseScanner:
    """Searches one text for a set of phrases; see `Scanner`."""

    __slots__ = ("_phrases", "_state", "position")

    exhausted = False  # a character costs little, whatever the phrases

    def __init__(self, phrases: PhraseSet) -> None:
        self._phrases = phrases
        self._state = phrases.root
        self.position = 0

    @property
    def live_start(self) -> int:
        return self.position - len(self._state.prefix)

    def push(self, text: str) -> Match | None:
        phrases, state = self._phrases, self._state
        if state is phrases.root and phrases.first_characters.isdisjoint(text):
            self.position += len(text)
            return None
        for count, char in enumerate(text, 1):
            state = state.edges.get(char) or phrases.step(state, char)
            if state.match is not None:
                self._state = state
                self.position += count
                return Match(self.position - len(state.match), self.position, state.match)
        self._state = state
        self.position += len(text)
        return None

    def finish(self) -> Match | None:
        return None

    def save(self) -> _Saved:
        return _Saved(self.position, self._state)

    def restore(self, state: _Saved) -> None:
        self.position, self._state = state
