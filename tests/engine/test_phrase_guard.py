"""The guard of banned phrases with a made-up model, whose choices follow from the text before them alone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aphrodite.core.request import OutputToken, Rewind
from aphrodite.engine.phrase_bans import MAX_BARRED, MAX_REWINDS, PhraseGuard
from aphrodite.engine.stops import StopMatcher
from aphrodite.matching import regex as regex_module
from aphrodite.matching.regex import RegexScanner
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

# Pieces that overlap one another, characters of several bytes and the bytes they are made of.
PIECES = ["a", "b", "ab", "ba", " a", " b", "A", "B", "aa", "ß", "é", " the", " The", "\n", ".", "ing", "ss"]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> list[int]:
    ids = {token for piece in [*PIECES, "🚢"] for token in tokenizer.encode(piece, add_special_tokens=False)}
    ids |= {
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([b])) for b in "é".encode()
    }
    return sorted(ids | {tokenizer.eos_token_ids[0]})


class Run(NamedTuple):
    token_ids: list[int]  # that were released
    rewinds: list[Rewind]
    warning: str | None


def run(
    guard: PhraseGuard | None, vocabulary: Iterable[int], seed: int, *, length: int, stop: Iterable[int] = ()
) -> Run:
    """Generate `length` tokens, or up to one of `stop`."""
    tokens: list[int] = []
    released: list[int] = []
    rewinds: list[Rewind] = []
    barred: dict[int, list[int]] = {}
    while True:
        order = random.Random(f"{seed}:{tokens}").sample(sorted(vocabulary), len(list(vocabulary)))
        left = [token for token in order if token not in barred.get(len(tokens), ())]
        if left:
            tokens.append(left[0])
            reason = "stop" if left[0] in stop else "length" if len(tokens) == length else None
        if guard is None:
            if reason is not None:
                return Run(tokens, [], None)
            continue
        verdict = guard.push(OutputToken(tokens[-1], None, None), reason) if left else guard.relent()
        if isinstance(verdict, Rewind):
            assert verdict.num_tokens >= len(released), "takes back what has left"
            assert len(verdict.barred) <= MAX_BARRED
            del tokens[verdict.num_tokens :]
            barred = {position: ids for position, ids in barred.items() if position < verdict.num_tokens}
            barred[verdict.num_tokens] = verdict.barred
            rewinds.append(verdict)
            continue
        assert verdict is not None
        released += [token.token_id for token in verdict]
        assert released == tokens[: len(released)]
        if reason is not None:
            assert released == tokens
            return Run(released, rewinds, guard.warning)


def guard_of(tokenizer: Tokenizer, **fields: object) -> PhraseGuard:
    return PhraseGuard(tokenizer, [1], SamplingParams(**fields))  # type: ignore[arg-type]


bans = st.lists(st.text("abABß s.é", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), banned=bans, exact=st.booleans(), length=st.integers(1, 40))
@example(seed=0, banned=("ss",), exact=False, length=40)  # ß is ss in every case
def test_what_is_released_has_no_banned_phrase(
    tokenizer: Tokenizer, vocabulary: list[int], seed: int, banned: tuple[str, ...], exact: bool, length: int
) -> None:
    guard = guard_of(tokenizer, banned_strings=banned, banned_strings_case_sensitive=exact)
    result = run(guard, vocabulary, seed, length=length)
    assert len(result.token_ids) == length
    text = tokenizer.decode(result.token_ids, continuation=True)
    found = [b for b in banned if (b in text if exact else b.casefold() in text.casefold())]
    assert bool(found) == (result.warning is not None)
    plain = run(None, vocabulary, seed, length=length)
    free = tokenizer.decode(plain.token_ids, continuation=True)
    if not any((b in free if exact else b.casefold() in free.casefold()) for b in banned):
        assert result == Run(plain.token_ids, [], None), "a text without bans is left alone"


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from([r"\bab?\b", r"(?i)the", r"[ab]{3}", r"a.*b", r"\w+ing\b", "ß|é", r"(?m)^b", r"b$"]),
    length=st.integers(1, 40),
)
def test_what_is_released_has_no_match_of_a_banned_regex(
    tokenizer: Tokenizer, vocabulary: list[int], seed: int, pattern: str, length: int
) -> None:
    result = run(guard_of(tokenizer, banned_regex=(pattern,)), vocabulary, seed, length=length)
    text = tokenizer.decode(result.token_ids, continuation=True)
    if result.warning is None:
        assert re.search(pattern.replace("$", r"\Z"), text) is None
    plain = run(None, vocabulary, seed, length=length)
    if re.search(pattern.replace("$", r"\Z"), tokenizer.decode(plain.token_ids, continuation=True)) is None:
        assert result == Run(plain.token_ids, [], None)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), banned=bans, stops=bans, include=st.booleans())
def test_a_stop_ends_the_answer_where_it_would_without_bans_that_come_later(
    tokenizer: Tokenizer,
    vocabulary: list[int],
    seed: int,
    banned: tuple[str, ...],
    stops: tuple[str, ...],
    include: bool,
) -> None:
    guard = guard_of(
        tokenizer,
        banned_strings=banned,
        banned_strings_case_sensitive=True,
        stop=stops,
        include_stop_str_in_output=include,
    )
    shown, stopped = _shown(tokenizer, run(guard, vocabulary, seed, length=40).token_ids, stops, include)
    plain, plain_stopped = _shown(tokenizer, run(None, vocabulary, seed, length=40).token_ids, stops, include)
    if guard.warning is None:
        assert not any(b in shown for b in banned)
    whole, _ = _shown(tokenizer, run(None, vocabulary, seed, length=40).token_ids, stops, True)
    if plain_stopped and not any(b in whole for b in banned):
        assert (shown, stopped) == (plain, plain_stopped)


def _shown(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    text, stop = matcher.push(tokenizer.decode(ids, continuation=True))
    return (text + matcher.finish()[0], stop) if stop is None else (text, stop)


def test_nothing_is_held_that_no_ban_can_begin_with(tokenizer: Tokenizer) -> None:
    guard = guard_of(tokenizer, banned_strings=("shivers down",))
    text = "She sat. A shiver ran. It shivers up"
    held = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        released = guard.push(OutputToken(token, None, None), None)
        assert isinstance(released, list)
        held += tokenizer.token_text(token)
        held = held[len("".join(tokenizer.token_text(one.token_id) for one in released)) :]
        begins = next((n for n in range(len("shivers dow"), 0, -1) if held.lower().endswith("shivers dow"[:n])), 0)
        assert bool(held) == bool(begins)


def test_an_unavoidable_ban_is_let_through_as_the_model_wrote_it(tokenizer: Tokenizer) -> None:
    # More tokens begin with an "a" than may be barred, and they are all that there are.
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).startswith(b"a")][: MAX_BARRED + 10]
    guard = guard_of(tokenizer, banned_strings=("a",))
    result = run(guard, ids, 3, length=5)
    assert result.token_ids == run(None, ids, 3, length=5).token_ids
    assert result.warning is not None
    assert len(result.rewinds) >= 5 * (MAX_BARRED + 1)


def test_a_position_without_alternatives_is_let_through(tokenizer: Tokenizer) -> None:
    (only,) = tokenizer.encode("a", add_special_tokens=False)
    result = run(guard_of(tokenizer, banned_strings=("a",)), [only], 3, length=5)
    assert result.token_ids == [only] * 5
    assert result.warning == "Banned text could not be avoided and was let through 5 times."


def test_after_so_many_attempts_the_rest_is_not_searched(tokenizer: Tokenizer) -> None:
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).startswith(b"a")][: MAX_BARRED + 10]
    result = run(guard_of(tokenizer, banned_strings=("a",)), ids, 3, length=60)
    assert len(result.token_ids) == 60
    assert len(result.rewinds) == MAX_REWINDS
    assert result.warning is not None
    assert "not searched" in result.warning


def test_a_regex_that_costs_too_much_is_given_up_and_phrases_are_not(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guard_of(tokenizer, banned_strings=("shivers",), banned_regex=("[bB]ut .* (ran|shivers)",))
    monkeypatch.setattr(regex_module, "WORK_PER_CHARACTER", 0)
    released = 0
    for token in tokenizer.encode("She sat." * 3 + " But she", add_special_tokens=False):
        verdict = guard.push(OutputToken(token, None, None), None)
        assert isinstance(verdict, list)
        released += len(verdict)
    assert guard.warning is None
    held = guard.push(OutputToken(tokenizer.encode(" sat", add_special_tokens=False)[0], None, None), None)
    assert held == []
    for scanner in (ban.scanner for ban in guard._bans):
        if isinstance(scanner, RegexScanner):
            scanner._work = 0
    verdicts = [
        guard.push(OutputToken(token, None, None), None)
        for token in tokenizer.encode(" and ran. It shivers", add_special_tokens=False)
    ]
    assert isinstance(verdicts[0], list)
    assert len(verdicts[0]) > 1  # what was held for the regex
    assert isinstance(verdicts[-1], Rewind)
    assert guard.warning is not None
    assert "`banned_regex` took too much work" in guard.warning


def test_the_token_that_ends_the_answer_completes_no_ban(tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "ab")
    for include, rewinds in ((False, 0), (True, 1)):
        guard = guard_of(tokenizer, banned_strings=("ab",), include_stop_str_in_output=include)
        guard.push(OutputToken(a, None, None), None)
        verdict = guard.push(OutputToken(b, None, None), "stop")
        assert isinstance(verdict, Rewind) == bool(rewinds), "the text of a stop token is not shown unless asked for"


def test_thousands_of_phrases_are_searched_together(tokenizer: Tokenizer, vocabulary: list[int]) -> None:
    rng = random.Random(5)
    banned = ("ba", *("".join(rng.choices("xyz w", k=rng.randint(20, 200))) for _ in range(4000)))
    result = run(guard_of(tokenizer, banned_strings=banned), vocabulary, 11, length=60)
    assert "ba" not in tokenizer.decode(result.token_ids, continuation=True).lower()
    assert result.rewinds
