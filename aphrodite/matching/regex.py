"""Regular expressions searched at once in streamed text, in time linear in the text.

The program of `regex_syntax` runs as a deterministic automaton whose states are made when the text first reaches
them (lazy subset construction; Cox, "Regular Expression Matching Can Be Simple And Fast", 2007). A state groups
the places in the program by where their partial matches began, the earliest first; of partial matches at the same
place only the earliest is kept. So the automaton knows at every character whether a match may still be coming,
and from where.

Linear is not cheap: a pattern such as `(a|b)*a(a|b){500}c` makes a new state of hundreds of places at every character.
So work is counted, in places looked at. Patterns that a text of their own characters shows to need too much are
refused, and a search that needs more than its text may cost gives up and says so (`RegexScanner.exhausted`).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from aphrodite.errors import InvalidRequestError
from aphrodite.matching.regex_syntax import (
    Accept,
    CharSet,
    Condition,
    Consume,
    Require,
    Split,
    compile_program,
    is_kind,
)
from aphrodite.matching.scanner import Match

MAX_LOOK_BACK = 2048  # characters; a partial match that is longer is given up
MAX_SIZE = 65_536  # places in states, and edges, of one automaton kept at once
WORK_PER_CHARACTER = 64  # places that a search may look at for each character read, about 40 us
WORK_AT_ONCE = 32_768  # and before that, for states of patterns that nobody has searched for yet
_WORK_PER_GROUP = 8  # what a group of places costs beside them

_PROBE_SETS = 6
_PROBE_LENGTH = 192
_PROBE_COUNTED = 64  # last characters of a probe, where the automaton has no new states to make if it has few
_CHARACTERS = "aB1_ .\n\u00e9"  # tried first for what a set of characters holds

_Around = str  # what stands beside a place: "" nothing, "\n" a newline, "w" part of a word, "-" anything else


@dataclass(slots=True, eq=False)
class _State:
    """Places in the program, grouped by where their partial matches began; and what was read last."""

    groups: tuple[tuple[int, ...], ...]
    before: _Around
    edges: dict[str, _Edge] = field(default_factory=dict)


class _Edge(NamedTuple):
    """What one more character leads to.

    Attributes:
        origins: for each group of `state`, the group that it continues; the number of those: it begins here.
        accepted: (pattern, group as in `origins`) of a complete match.
        early: the match was complete before the character, which only told that it was.
    """

    state: _State
    origins: tuple[int, ...]
    accepted: tuple[int, int] | None
    early: bool


class RegexSet:
    """Patterns compiled for searching. Make one with `compile_regexes`, which shares them.

    Attributes:
        work: places looked at so far, by all searches.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self._program, self._start = compile_program(patterns)
        self._accepts = {place: found.pattern for place, found in enumerate(self._program) if isinstance(found, Accept)}
        self._consumes = {place: found for place, found in enumerate(self._program) if isinstance(found, Consume)}
        numbers: dict[CharSet, int] = {}
        # Many instructions share a set of characters, and one step asks each set once.
        self._set_numbers = {place: numbers.setdefault(c.chars, len(numbers)) for place, c in self._consumes.items()}
        self._states: dict[tuple[tuple[tuple[int, ...], ...], _Around], _State] = {}
        self._entries: dict[tuple[_Around, str], list[int]] = {}
        self._size = 0
        self.work = 0
        self.root = self.state((), "")

    def state(self, groups: tuple[tuple[int, ...], ...], before: _Around) -> _State:
        key = (groups, before)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = _State(groups, before)
            self._size += 1 + sum(map(len, groups))
        return found

    def step(self, state: _State, char: str) -> _Edge:
        """Make the edge of one character: O(places that the state's partial matches may go on from)."""
        if self._size >= MAX_SIZE:
            # Searches under way hold states of their own: without edges those lead to the new ones.
            for old in self._states.values():
                old.edges.clear()
            self._states = {((), ""): self.root}
            self._entries.clear()
            self._size = 0
        after = _around(char)
        expanded, accepted = self._expand(state, after)
        if accepted is not None:
            edge = _Edge(state, (), accepted, True)
        else:
            edge = self._consume([*expanded, self._entering(state.before, char)], char, after)
        state.edges[char] = edge
        self._size += 1
        return edge

    def characters(self) -> list[str]:
        """Of each of the sets of characters that are in the patterns most often, one that it holds."""
        counted = Counter(consume.chars for consume in self._consumes.values())
        found = set()
        for chars, _ in counted.most_common(_PROBE_SETS):
            tried = [chr(low) for low, _ in chars.ranges] + list(_CHARACTERS)
            found.update([char for char in tried if chars.contains(char)][:1])
        return sorted(found) or ["a"]

    def at_end(self, state: _State) -> tuple[int, int] | None:
        """(pattern, group) of the match that the text's end completes."""
        return self._expand(state, "")[1]

    def _expand(self, state: _State, after: _Around) -> tuple[list[list[int]], tuple[int, int] | None]:
        """Each group's consuming places; and the first group that accepts. No match is empty: none begins here."""
        seen: set[int] = set()
        expanded = [self._closure(group, seen, state.before, after) for group in state.groups]
        if not seen.isdisjoint(self._accepts):
            for number, places in enumerate(expanded):
                patterns = [self._accepts[place] for place in places if place in self._accepts]
                if patterns:
                    return expanded, (min(patterns), number)
        return expanded, None

    def _entering(self, before: _Around, char: str) -> list[int]:
        """Places that consume `char` as the first one of a match."""
        found = self._entries.get((before, char))
        if found is None:
            places = self._closure((self._start,), set(), before, _around(char))
            found = [place for place in places if self._consumes[place].chars.contains(char)]
            self._entries[before, char] = found
            self._size += 1 + len(found)
        return found

    def _consume(self, expanded: list[list[int]], char: str, after: _Around) -> _Edge:
        taken: set[int] = set()
        groups: list[tuple[int, ...]] = []
        origins: list[int] = []
        accepted: tuple[int, int] | None = None
        seen: set[int] = set()
        holds: dict[int, bool] = {}
        for origin, places in enumerate(expanded):
            self.work += len(places) + _WORK_PER_GROUP
            reached: list[int] = []
            for place in places:
                consume = self._consumes.get(place)
                if consume is None or consume.then in taken:
                    continue
                number = self._set_numbers[place]
                if number not in holds:
                    holds[number] = consume.chars.contains(char)
                if holds[number]:
                    taken.add(consume.then)
                    reached.append(consume.then)
            if not reached:
                continue
            groups.append(tuple(sorted(reached)))
            origins.append(origin)
            if accepted is None:
                # Complete whatever comes next; what did not accept for an earlier group need not be tried again.
                ends = [place for place in self._closure(groups[-1], seen, None, None) if place in self._accepts]
                accepted = (min(self._accepts[place] for place in ends), origin) if ends else None
        return _Edge(self.state(tuple(groups), after), tuple(origins), accepted, False)

    def _closure(
        self, places: tuple[int, ...], seen: set[int], before: _Around | None, after: _Around | None
    ) -> list[int]:
        """Consuming and accepting places reached without a character; None: no condition is known to hold."""
        stack, found = list(places), []
        while stack:
            place = stack.pop()
            if place in seen:
                continue
            seen.add(place)
            instruction = self._program[place]
            self.work += 1
            if isinstance(instruction, Split):
                stack += [instruction.second, instruction.first]
            elif not isinstance(instruction, Require):
                found.append(place)
            elif before is not None and after is not None and _holds(instruction.condition, before, after):
                stack.append(instruction.then)
        return found


def _around(char: str) -> _Around:
    if char == "\n":
        return "\n"
    return "w" if is_kind(char, "w") else "-"


def _holds(condition: Condition, before: _Around, after: _Around) -> bool:
    if condition == "start":
        return before == ""
    if condition == "end":
        return after == ""
    if condition == "line_start":
        return before in ("", "\n")
    if condition == "line_end":
        return after in ("", "\n")
    return ((before == "w") != (after == "w")) == (condition == "word")


@lru_cache(maxsize=16)
def compile_regexes(patterns: tuple[str, ...]) -> RegexSet:
    """The automaton of one or more patterns.

    Raises:
        InvalidRequestError: see `compile_program`; or to search for them would take too much work.
    """
    regexes = RegexSet(patterns)
    if _is_costly(regexes):
        raise InvalidRequestError(
            "The regular expressions would take too much work to search for: too many places of them can be half "
            "matched at the same time. Make their repetitions fewer, or what is repeated less alike."
        )
    return regexes


def _is_costly(regexes: RegexSet) -> bool:
    """Whether a text that keeps many places half matched takes more work than a search may do."""
    generator = random.Random(0)
    characters = regexes.characters()
    state, before = regexes.root, 0
    for place in range(_PROBE_LENGTH):
        if place == _PROBE_LENGTH - _PROBE_COUNTED:
            before = regexes.work
        edges = [state.edges.get(char) or regexes.step(state, char) for char in characters]
        if regexes.work > 2 * WORK_AT_ONCE:  # and not more than this is done here
            return True
        sizes = [sum(map(len, edge.state.groups)) for edge in edges]
        wide = [edge for edge, size in zip(edges, sizes, strict=True) if 2 * size >= max(sizes)]
        state = generator.choice(wide).state
    return regexes.work - before > WORK_PER_CHARACTER * _PROBE_COUNTED * len(characters)


class _Saved(NamedTuple):
    position: int
    state: _State
    starts: list[int]


class RegexScanner:
    """Searches one text for a set of patterns; see `Scanner`.

    After a match the search begins anew behind it. Partial matches longer than `MAX_LOOK_BACK` are given up.

    Attributes:
        exhausted: the search took more work than its text may cost, and finds nothing any more. It stays so in a
            search that is restored.
    """

    __slots__ = ("_regexes", "_starts", "_state", "_work", "exhausted", "position")

    def __init__(self, regexes: RegexSet) -> None:
        self._regexes = regexes
        self._state = regexes.root
        self._starts: list[int] = []  # where the partial match of each group began
        self._work = WORK_AT_ONCE  # that may still be done
        self.exhausted = False
        self.position = 0

    @property
    def live_start(self) -> int:
        return self._starts[0] if self._starts and not self.exhausted else self.position

    def push(self, text: str) -> Match | None:
        if self.exhausted:
            self.position += len(text)
            return None
        state, starts, position = self._state, self._starts, self.position
        self._work += WORK_PER_CHARACTER * len(text)
        for char in text:
            edge = state.edges.get(char) or self._step(state, char)
            if edge is None:
                self.position += len(text)
                return None
            if edge.early:
                return self._found(edge.accepted, starts, position, state.before)
            if edge.origins or starts:
                before = [*starts, position]
                starts = [before[origin] for origin in edge.origins]
            position += 1
            state = edge.state
            if edge.accepted is not None:
                return self._found(edge.accepted, before, position, state.before)
            if starts and position - starts[0] > MAX_LOOK_BACK:
                starts = starts[1:]
                state = self._regexes.state(state.groups[1:], state.before)
        self._state, self._starts, self.position = state, starts, position
        return None

    def _step(self, state: _State, char: str) -> _Edge | None:
        """The edge, newly made; None if the work for it was too much."""
        before = self._regexes.work
        edge = self._regexes.step(state, char)
        self._work -= self._regexes.work - before
        self.exhausted = self._work < 0
        return None if self.exhausted else edge

    def finish(self) -> Match | None:
        if self.exhausted:
            return None
        accepted = self._regexes.at_end(self._state)
        return None if accepted is None else self._found(accepted, self._starts, self.position, self._state.before)

    def _found(self, accepted: tuple[int, int] | None, starts: list[int], end: int, before: _Around) -> Match:
        assert accepted is not None
        pattern, group = accepted
        # With a match the search starts afresh; what stands before the place is still known.
        self._state, self._starts, self.position = self._regexes.state((), before), [], end
        return Match([*starts, end][group], end, self._regexes.patterns[pattern])

    def save(self) -> _Saved:
        return _Saved(self.position, self._state, self._starts)

    def restore(self, state: _Saved) -> None:
        self.position, self._state, self._starts = state
