"""Stop strings against a plain search of the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aphrodite.engine.stops import StopMatcher

ALPHABET = "abé👩 \n<"
texts = st.text(ALPHABET, max_size=40)
stop_sets = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=5, unique=True).map(tuple)


def first_match(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """(start, end, stop) of the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text.endswith(stop, 0, end)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), end, stop
    return None


def run(pieces: list[str], stops: tuple[str, ...], include: bool) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include=include)
    shown, matched = [], None
    for piece in pieces:
        released, stop = matcher.push(piece)
        shown.append(released)
        if stop is not None:
            matched = stop
            break
    else:
        rest, matched = matcher.finish()
        shown.append(rest)
    return shown, matched


@st.composite
def split_texts(draw: st.DrawFn) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@given(split_texts(), stop_sets, st.booleans())
@example(["ab", "ab", "c"], ("abc", "b"), False)
@example(["a", "a", "b"], ("aab", "ab"), False)
@example(["👩"], ("👩",), True)
def test_any_split_shows_the_text_up_to_the_first_match(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    text = "".join(pieces)
    shown, matched = run(pieces, stops, include)
    expected = first_match(text, stops)
    if expected is None:
        assert matched is None
        assert "".join(shown) == text
    else:
        start, end, stop = expected
        assert matched == stop
        assert "".join(shown) == text[: end if include else start]


@given(split_texts(), stop_sets)
def test_only_the_longest_possible_beginning_of_a_stop_is_held_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops, include=False)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        released, stop = matcher.push(piece)
        shown += released
        if stop is not None:
            return
        held = max(
            (n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops)), default=0
        )
        assert shown == seen[: len(seen) - held]


@pytest.mark.parametrize("include", [False, True])
def test_nothing_comes_after_a_match(include: bool) -> None:
    matcher = StopMatcher(("</s>",), include=include)
    assert matcher.push("hello</") == ("hello", None)
    assert matcher.push("s> and more") == ("</s>" if include else "", "</s>")
    assert matcher.push("more") == ("", None)
    assert matcher.finish() == ("", None)


def test_a_match_at_the_very_start_leaves_no_text() -> None:
    assert StopMatcher(("User:",), include=False).push("User: hi") == ("", "User:")


def test_no_stops_and_empty_stops_pass_everything_at_once() -> None:
    for stops in ((), ("",)):
        matcher = StopMatcher(stops, include=False)
        assert matcher.push("anything") == ("anything", None)
        assert matcher.finish() == ("", None)


def test_a_match_inside_a_longer_candidate_is_found() -> None:
    # "abcd" is begun when "bc" completes: the automaton must see the stop that ends inside its prefix.
    assert run(["a", "b", "c", "e"], ("abcd", "bc"), False) == (["", "", "a"], "bc")
