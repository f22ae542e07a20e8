"""Stop strings and stop regexes in a stream of text: nothing of a match leaks, nothing else is held back longer
than it must. The searching itself is in `aphrodite.matching`."""

from __future__ import annotations

from aphrodite.matching.phrases import PhraseScanner, compile_phrases
from aphrodite.matching.regex import RegexScanner, compile_regexes
from aphrodite.matching.scanner import Match, Scanner


def stop_scanners(stops: tuple[str, ...], regexes: tuple[str, ...]) -> list[Scanner]:
    """What searches a text for stop strings and stop regexes; empty without any."""
    scanners: list[Scanner] = []
    if any(stops):
        scanners.append(PhraseScanner(compile_phrases(stops)))
    if regexes:
        scanners.append(RegexScanner(compile_regexes(regexes)))
    return scanners


def first_match(matches: list[Match | None]) -> Match | None:
    """The match that ends first; of several, the one that begins first."""
    found = [match for match in matches if match is not None]
    return min(found, key=lambda match: (match.end, match.start)) if found else None


class StopMatcher:
    """Finds the first stop in a text that arrives in pieces.

    The match that ends first in the text wins, since a stream cannot know of another that would begin earlier
    and end later; of those that end at the same character, the one that begins earliest. So `a+` ends the
    answer at its first `a`. A regex may hold back at most `MAX_LOOK_BACK` characters; the beginning of a longer
    match has been shown already when it completes.

    Args:
        include: keep the stop itself in the text.
    """

    def __init__(self, stops: tuple[str, ...], *, regexes: tuple[str, ...] = (), include: bool) -> None:
        self._scanners = stop_scanners(stops, regexes)
        self._include = include
        self._held = ""
        self._length = 0  # characters taken; of those all but `_held` were released
        self._matched = False

    @property
    def exhausted(self) -> bool:
        """Whether a search was given up, so that the answer may run past a stop."""
        return any(scanner.exhausted for scanner in self._scanners)

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; returns what may be shown now, and the stop if one is complete.

        After a match there is no more text: later pushes return nothing.
        """
        if self._matched:
            return "", None
        match = first_match([scanner.push(text) for scanner in self._scanners])
        text = self._held + text
        released = self._length - len(self._held)
        self._length = released + len(text)
        if match is not None:
            return self._cut(text, released, match)
        # What one search has given up may have been held for another, so the earliest counts.
        live = min((scanner.live_start for scanner in self._scanners), default=self._length)
        self._held = text[live - released :]
        return text[: live - released], None

    def finish(self) -> tuple[str, str | None]:
        """The answer has ended: the text that was held back, and the stop that only the end completes."""
        if self._matched:
            return "", None
        match = first_match([scanner.finish() for scanner in self._scanners])
        text, self._held = self._held, ""
        if match is None:
            return text, None
        return self._cut(text, self._length - len(text), match)

    def _cut(self, text: str, released: int, match: Match) -> tuple[str, str]:
        self._held = ""
        self._matched = True
        end = match.end if self._include else match.start
        return text[: max(0, end - released)], match.pattern
