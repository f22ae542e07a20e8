"""Phrases and regexes that an answer must not contain: found on its text, and undone by going back.

The idea is that of antislop samplers (Paech, arXiv 2510.15061; KoboldCpp's `banned_strings`): tokens are held back
while a ban may still complete in their text. When one does, the answer goes back to the first token that touches
the match, which is barred at its position, and another is chosen there. (A token that was let go before, because what
followed it then was harmless, cannot come back: the first one behind it is barred instead.) The guard follows one
answer in the engine process; the front end sees only what is released.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aphrodite.core.request import OutputToken, Rewind
from aphrodite.engine.stops import first_match, stop_scanners
from aphrodite.matching.phrases import PhraseScanner, compile_phrases
from aphrodite.matching.regex import RegexScanner, compile_regexes
from aphrodite.matching.scanner import Match, Scanner
from aphrodite.outputs import FinishReason
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.detokenizer import IncrementalDetokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

MAX_BARRED = 32  # tokens barred at one position before the model's own choice is let through
MAX_REWINDS = 1024  # of one answer before its text is not searched any more


def has_bans(params: SamplingParams) -> bool:
    return bool(params.banned_strings or params.banned_regex)


class _Search:
    """One scanner over the answer's text, as it is or case-folded. Lengths are in characters of that text."""

    def __init__(self, scanner: Scanner, *, folded: bool) -> None:
        self.scanner = scanner
        self.folded = folded
        self.length = 0

    def text(self, text: str) -> str:
        # Folding looks at one character at a time, so pieces may be folded one by one; it may lengthen them.
        return text.casefold() if self.folded else text


class _Held(NamedTuple):
    token: OutputToken
    ends: tuple[int, ...]  # for each search, the characters that the token and all before it touch
    before: tuple[Any, ...]  # the guard's state before the token; see `_save`


class PhraseGuard:
    """The `TokenGuard` of a request with banned phrases or regexes.

    A stop string or stop regex that completes first ends the answer before the ban does, so stops are followed
    too. After `MAX_BARRED` tokens at a position the bans that begin there are let through, with the token that the
    model chose first; after `MAX_REWINDS` in all, everything is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self._params = params
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._bans: list[_Search] = []
        if params.banned_strings:
            folded = not params.banned_strings_case_sensitive
            phrases = tuple(text.casefold() for text in params.banned_strings) if folded else params.banned_strings
            self._bans.append(_Search(PhraseScanner(compile_phrases(phrases)), folded=folded))
        if params.banned_regex:
            self._bans.append(_Search(RegexScanner(compile_regexes(params.banned_regex)), folded=False))
        self._stops = stop_scanners(params.stop, params.stop_regex)
        self._held: list[_Held] = []
        self._num_released = 0
        self._barred: dict[int, list[int]] = {}  # by position in the answer
        self._waived: set[int] = set()  # positions at which matches may begin
        self._num_rewinds = 0
        self._num_let_through = 0
        self._done = False  # nothing is searched any more

    @property
    def warning(self) -> str | None:
        """What could not be kept out of the answer, or was not searched for."""
        told = []
        if self._num_let_through:
            times = "once" if self._num_let_through == 1 else f"{self._num_let_through} times"
            told.append(f"Banned text could not be avoided and was let through {times}.")
        if self._num_let_through and self._num_rewinds >= MAX_REWINDS:
            told.append(f"After {MAX_REWINDS} attempts the rest of the answer was not searched.")
        if any(ban.scanner.exhausted for ban in self._bans):
            told.append("Searching for `banned_regex` took too much work and was given up before the answer's end.")
        return " ".join(told) or None

    def push(
        self, token: OutputToken, finish_reason: FinishReason | None, *, complete: bool = False
    ) -> list[OutputToken] | Rewind:
        if self._done:
            return [token]
        text = self._append(token, finish_reason, complete=complete)
        stop_end = self._find_stop(text)
        for number, ban in enumerate(self._bans):
            rewind = self._search(number, ban, text, stop_end, ended=finish_reason is not None)
            if rewind is not None:
                return rewind
        # The front end cuts the answer at a stop, so nothing behind it matters.
        self._done = self._done or stop_end is not None
        return self._release(everything=self._done or finish_reason is not None)

    def relent(self) -> Rewind | None:
        position = self._num_released + len(self._held)
        if not self._barred.pop(position, None):
            return None
        self._waived.add(position)
        return Rewind(position, [])

    def _append(self, token: OutputToken, finish_reason: FinishReason | None, *, complete: bool) -> str:
        """Hold a token; returns the text that became certain with it."""
        before = self._save()
        # As in the front end: the text of the token that ends an answer is not shown unless asked for.
        silent = finish_reason == "stop" and not complete and not self._params.include_stop_str_in_output
        text = "" if silent else self._detokenizer.push(token.token_id)
        if finish_reason is not None:
            text += self._detokenizer.flush()
        unfinished = 1 if self._detokenizer.pending else 0  # of a character, which is touched all the same
        for ban in self._bans:
            ban.length += len(ban.text(text))
        self._held.append(_Held(token, tuple(ban.length + unfinished for ban in self._bans), before))
        return text

    def _find_stop(self, text: str) -> int | None:
        """How many characters of `text` it takes to complete a stop; None: it completes none."""
        if not self._stops or self._num_released + len(self._held) <= self._params.min_tokens:
            return None
        began = self._stops[0].position
        match = first_match([scanner.push(text) for scanner in self._stops])
        return None if match is None else max(0, match.end - began)

    def _search(self, number: int, ban: _Search, text: str, stop_end: int | None, *, ended: bool) -> Rewind | None:
        """Search the last token's text, up to the stop in it if there is one."""
        text = ban.text(text if stop_end is None else text[:stop_end])
        while True:
            position = ban.scanner.position
            match = ban.scanner.push(text)
            text = text[ban.scanner.position - position :]
            if match is None and ended and stop_end is None:
                match = ban.scanner.finish()
                ended = False
            if match is None:
                return None
            rewind = self._undo(number, match)
            if rewind is not None or self._done:
                return rewind

    def _undo(self, number: int, match: Match) -> Rewind | None:
        """Go back to before the match, or let it through: None."""
        index = next(index for index, held in enumerate(self._held) if held.ends[number] > match.start)
        position = self._num_released + index
        if position in self._waived or self._num_rewinds >= MAX_REWINDS:
            self._let_through()
            return None
        self._num_rewinds += 1
        for passed in [later for later in self._barred if later > position]:
            del self._barred[passed]  # of another text
        self._waived = {waived for waived in self._waived if waived < position}
        barred = self._barred.setdefault(position, [])
        if len(barred) < MAX_BARRED:
            barred.append(self._held[index].token.token_id)
        else:
            del self._barred[position]
            self._waived.add(position)
            barred = []
        self._restore(self._held[index].before)
        del self._held[index:]
        return Rewind(position, list(barred))

    def _let_through(self) -> None:
        self._num_let_through += 1
        self._done = self._num_rewinds >= MAX_REWINDS

    def _release(self, *, everything: bool) -> list[OutputToken]:
        count = len(self._held)
        if not everything:
            lives = [ban.scanner.live_start for ban in self._bans]
            for index, held in enumerate(self._held):
                if any(end > live for end, live in zip(held.ends, lives, strict=True)):
                    count = index
                    break
        released = [held.token for held in self._held[:count]]
        del self._held[:count]
        self._num_released += count
        if released and (self._barred or self._waived):
            first = self._num_released
            self._barred = {position: ids for position, ids in self._barred.items() if position >= first}
            self._waived = {position for position in self._waived if position >= first}
        return released

    def _save(self) -> tuple[Any, ...]:
        searches = tuple((ban.length, ban.scanner.save()) for ban in self._bans)
        return self._detokenizer.save(), searches, tuple(stop.save() for stop in self._stops)

    def _restore(self, state: tuple[Any, ...]) -> None:
        detokenizer, searches, stops = state
        self._detokenizer.restore(detokenizer)
        for ban, (length, scanner) in zip(self._bans, searches, strict=True):
            ban.length = length
            ban.scanner.restore(scanner)
        for stop, scanner in zip(self._stops, stops, strict=True):
            stop.restore(scanner)
