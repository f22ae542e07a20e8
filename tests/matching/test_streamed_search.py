"""Streamed searching against plain searches of the whole text: Python's `re`, and `str.endswith`."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aphrodite.errors import InvalidRequestError
from aphrodite.matching import phrases as phrases_module
from aphrodite.matching import regex as regex_module
from aphrodite.matching.phrases import PhraseScanner, PhraseSet
from aphrodite.matching.regex import MAX_LOOK_BACK, RegexScanner, RegexSet, compile_regexes
from aphrodite.matching.regex_syntax import MAX_INSTRUCTIONS
from aphrodite.matching.scanner import Match, Scanner

ALPHABET = "abAB _.\né"
texts = st.text(ALPHABET, max_size=30)
phrase_sets = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=12)


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


ATOMS = ["a", "b", "A", "é", " ", r"\.", ".", "[ab]", "[^a]", r"\w", r"\s", r"\W", r"[^\s]", "[a-bA]", r"\n"]
CONDITIONS = [r"\b", r"\B", "^", "$"]
REPETITIONS = ["*", "+", "?", "{2}", "{1,2}", "{2,}", "{0,1}", "*?", "+?"]


def _extend(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(children, min_size=1, max_size=3).map("".join),
        st.tuples(children, children).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(children, st.sampled_from(REPETITIONS)).map(lambda pair: f"({pair[0]}){pair[1]}"),
    )


patterns = st.recursive(st.sampled_from(ATOMS + CONDITIONS), _extend, max_leaves=6)
flags = st.sampled_from(["", "i", "m", "s", "im"])


def oracle(flags: str, pattern: str) -> str:
    """The pattern for `re`, whose `$` would also match before a newline that ends the text."""
    return f"(?{flags}:{pattern})" if "m" in flags else f"(?{flags or '-i'}:{pattern})".replace("$", r"\Z")


def starts_of(pattern: str, text: str, end: int) -> list[int]:
    """Where matches begin that end at `end`, by trying all."""
    # Only a look ahead can fix the end without hiding from \b and $ what comes behind it.
    bounded = re.compile(rf"{pattern}(?=(?s:.{{{len(text) - end}}})\Z)")
    return [start for start in range(end) if (found := bounded.match(text, start)) is not None and found.end() == end]


def first_matches(patterns: list[str], several: list[str], text: str) -> list[tuple[int, int, str]]:
    """(end, start, pattern) of the matches that end first, the one to report first."""
    for end in range(1, len(text) + 1):
        found = [(start, index) for index, pattern in enumerate(patterns) for start in starts_of(pattern, text, end)]
        if found:
            return [(end, start, several[index]) for start, index in sorted(found)]
    return []


def check_first(match: Match | None, expected: list[tuple[int, int, str]], several: list[str]) -> None:
    """What only the next character completes counts as ending later than what is complete without it."""
    if any(condition in pattern for pattern in several for condition in CONDITIONS):
        assert (match and (match.end, match.start, match.pattern)) in (expected or [None])
    else:
        assert (match and (match.end, match.start, match.pattern)) == (expected[0] if expected else None)


def search(scanner: Scanner, pieces: list[str]) -> Match | None:
    """The first match; on the way, everything before `live_start` must be certain to be outside of it."""
    certain = 0
    match = None
    for piece in pieces:
        match = scanner.push(piece)
        if match is not None:
            break
        assert certain <= scanner.live_start <= scanner.position
        certain = scanner.live_start
    else:
        match = scanner.finish()
    assert match is None or match.start >= certain
    return match


@settings(max_examples=400, deadline=None)
@given(split_texts(), flags, patterns)
@example(["a", "b"], "", r"\ba\b|ab")
@example(["aab"], "", "a+b")
@example(["ab", "\n"], "m", "b$")
@example(["a b"], "", r"a\b")
@example(["ab"], "", r"ab\b|b")
def test_a_regex_finds_what_trying_every_place_finds(pieces: list[str], flags: str, pattern: str) -> None:
    try:
        regexes = RegexSet((f"(?{flags}){pattern}" if flags else pattern,))
    except InvalidRequestError:
        assert re.compile(re.sub(r"\\[bB]|\^|\$", "(?:)", pattern)).fullmatch("") is not None
        return
    match = search(RegexScanner(regexes), pieces)
    check_first(match, first_matches([oracle(flags, pattern)], list(regexes.patterns), "".join(pieces)), [pattern])


@settings(deadline=None)
@example(["."], [r"\.\B", r"\."])
@given(split_texts(), st.lists(patterns, min_size=2, max_size=4))
def test_of_several_regexes_the_one_that_ends_first_is_named(pieces: list[str], several: list[str]) -> None:
    try:
        regexes = RegexSet(tuple(several))
    except InvalidRequestError:
        return
    match = search(RegexScanner(regexes), pieces)
    expected = first_matches([oracle("", pattern) for pattern in several], several, "".join(pieces))
    check_first(match, expected, several)


@given(split_texts(), phrase_sets)
def test_phrases_are_found_where_the_first_one_ends(pieces: list[str], phrases: list[str]) -> None:
    text = "".join(pieces)
    expected = None
    for end in range(1, len(text) + 1):
        ending = [phrase for phrase in phrases if text.endswith(phrase, 0, end)]
        if ending:
            longest = max(ending, key=len)
            expected = Match(end - len(longest), end, longest)
            break
    assert search(PhraseScanner(PhraseSet(phrases)), pieces) == expected


@given(texts, phrase_sets)
def test_searching_on_finds_every_end_of_a_phrase(text: str, phrases: list[str]) -> None:
    scanner = PhraseScanner(PhraseSet(phrases))
    ends = []
    while (match := scanner.push(text[scanner.position :])) is not None:
        ends.append(match.end)
    assert ends == [end for end in range(1, len(text) + 1) if any(text.endswith(p, 0, end) for p in phrases)]


@pytest.mark.parametrize("scanner", [PhraseScanner(PhraseSet(["abab", "b a"])), RegexScanner(RegexSet(("a.*b a",)))])
def test_a_restored_search_goes_on_as_if_nothing_had_happened(scanner: Scanner) -> None:
    assert scanner.push("xab") is None
    saved, live = scanner.save(), scanner.live_start
    first = scanner.push("ab a")
    scanner.push("b a and more")
    scanner.restore(saved)
    assert scanner.live_start == live
    assert scanner.push("ab a") == first is not None


def test_forgotten_states_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abcabdabeab" * 50
    phrases = [f"{a}{b}{c}!" for a in "abcde" for b in "abcde" for c in "abcde"]
    pattern = r"(a|b)\w{3,7}(c|d)e!"
    spacious = [PhraseScanner(PhraseSet(phrases)), RegexScanner(RegexSet((pattern,)))]
    monkeypatch.setattr(phrases_module, "MAX_STATES", 3)
    monkeypatch.setattr(regex_module, "MAX_SIZE", 10)
    cramped = [PhraseScanner(PhraseSet(phrases)), RegexScanner(RegexSet((pattern,)))]
    for wide, narrow in zip(spacious, cramped, strict=True):
        for char in text:
            assert wide.push(char) == narrow.push(char)
            assert wide.live_start == narrow.live_start
        assert wide.push("abce!") == narrow.push("abce!")


def test_a_partial_match_is_given_up_after_the_look_back() -> None:
    scanner = RegexScanner(RegexSet(("a[^!]*!",)))
    assert scanner.push("a" + "." * (MAX_LOOK_BACK - 1)) is None
    assert scanner.live_start == 0
    assert scanner.push(".") is None
    assert scanner.live_start == scanner.position
    assert scanner.push("!") is None
    match = scanner.push("a!")
    assert match is not None
    assert match.end - match.start == 2


def test_a_hostile_pattern_keeps_a_bounded_automaton(monkeypatch: pytest.MonkeyPatch) -> None:
    # A backtracking engine needs 2^n attempts here, an eager determinisation 2^12 states.
    monkeypatch.setattr(regex_module, "MAX_SIZE", 1000)
    regexes = RegexSet((r"(a*)*(a|aa)+b", r"(a|b)*a(a|b){12}c"))
    scanner = RegexScanner(regexes)
    assert scanner.push("ab" * 20 + "a" * 3000) is not None
    assert scanner.push("a" * 3000) is None
    assert regexes._size <= 1000 + MAX_INSTRUCTIONS


HOSTILE = {  # and the characters of a text that suits them
    (r"(a|b)*a(a|b){500}c",): "ab",
    (r".{1000}",): "ab",
    tuple(f"(x|y)*{'xy'[i % 2]}(x|y){{{90 + i}}}z" for i in range(5)): "xy",
}
EVERYDAY = [
    (r"(?i)\b(shivers?|a chill) (ran|run|runs|running) (down|up) (his|her|my|the) spine\b",),
    (r"(\w+), not (\w+)", r"[Ii]t wasn't .{1,80}[;,.] it was", r"(?m)^\s*(\*{3}|-{3})$"),
    (r"\n\n(User|You|[A-Z][a-z]+):", r"<\|[a-z_]+\|>", r"[\u4e00-\u9fff]{2,}"),
    (r"(?s)[^.]{40}!!", r"\b\w{20,}\b"),
    ("|".join(f"{a}{b}{c}ing" for a in "bcdfgh" for b in "aeiou" for c in "klmnprst"),),
]


@pytest.mark.parametrize("patterns", HOSTILE)
def test_patterns_that_would_take_too_much_work_are_refused(patterns: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="too much work"):
        compile_regexes(patterns)


@pytest.mark.parametrize("patterns", EVERYDAY)
def test_a_search_for_everyday_patterns_is_not_given_up(patterns: tuple[str, ...]) -> None:
    generator = random.Random(1)
    words = [
        "It",
        "wasn't",
        "her",
        "spine",
        "shivers",
        "ran",
        "baking",
        "cold",
        "not",
        "warm,",
        "down",
        "\n\n",
        "-",
        "U:",
    ]
    regexes = compile_regexes(patterns)
    scanner = RegexScanner(regexes)
    began = regexes.work
    text = " ".join(generator.choice(words) for _ in range(4000))
    while scanner.push(text[scanner.position :]) is not None:
        pass
    assert not scanner.exhausted
    assert regexes.work - began < 20 * len(text)


@pytest.mark.parametrize("patterns", HOSTILE)
def test_a_search_stops_when_it_has_taken_more_work_than_its_text_may_cost(patterns: tuple[str, ...]) -> None:
    generator = random.Random(2)
    regexes = RegexSet(patterns)  # as if its hostility had not been noticed
    scanner = RegexScanner(regexes)
    text = "".join(generator.choice(HOSTILE[patterns]) for _ in range(3000))
    for start in range(0, len(text), 4):
        assert scanner.push(text[start : start + 4]) is None
        assert scanner.position == start + 4
        allowed = regex_module.WORK_AT_ONCE + regex_module.WORK_PER_CHARACTER * scanner.position
        assert regexes.work <= allowed + 4 * MAX_INSTRUCTIONS  # one step may go over
    assert scanner.exhausted
    assert scanner.live_start == scanner.position  # nothing is held back for a match that will not be found
    assert scanner.finish() is None


def test_what_searches_share_is_paid_for_once() -> None:
    regexes = RegexSet((r"(a|b)*a(a|b){8}c",))
    text = "".join(random.Random(3).choice("ab") for _ in range(2000))
    RegexScanner(regexes).push(text)
    first = regexes.work
    RegexScanner(regexes).push(text)
    assert regexes.work == first


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a*", "empty text"),
        (r"\b", "empty text"),
        ("(", "closing parenthesis"),
        ("a)", "opening"),
        ("[a", "too early"),
        ("a\\", "too early"),
        ("*a", "nothing to repeat"),
        ("a**", "repeats a repetition"),
        ("a++", "repeats a repetition"),
        ("a{3}{3}", "repeats a repetition"),
        (r"(a)\1", "back reference"),
        ("(?=a)b", "look-around"),
        ("(?<!a)b", "look-around"),
        ("(?>a)b", "not supported"),
        ("(?P<1>a)", "proper name"),
        (r"\q", "not supported"),
        (r"\x1", "hexadecimal"),
        ("[b-a]", "range"),
        ("a{2,1}", "repeats"),
        ("a{1001}", "more than 1000"),
        ("(a{100}){100}", "too large"),
        ("((((b{0}){1000}){1000}){1000}){1000}a", "too large"),
        ("(" * 60 + "a" + ")" * 60, "deep"),
    ],
)
def test_what_is_no_pattern_of_the_subset_is_refused_with_the_reason(pattern: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        RegexSet((pattern,))
