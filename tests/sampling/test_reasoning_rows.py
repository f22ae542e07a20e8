"""Where a budget forces which token: against a plain search in the whole text, over marks of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.reasoning import NO_TOKEN, ReasoningRow
from aphrodite.sampling.table import ReasoningMarks
from aphrodite.sampling.vocabulary import Vocabulary
from aphrodite.tokenizer.loader import load_tokenizer

PROMPT = 5
THINK = 256  # <think>, </think> and two more as tokens of their own
SPECIAL = ("<think>", "</think>", "<|end|>", "<|message|>")


class Bytes:
    """A token a byte, one for `</`, and some special ones."""

    special_ids = frozenset(range(THINK, THINK + len(SPECIAL)))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        for number, mark in enumerate(SPECIAL):
            text = text.replace(mark, chr(0xE000 + number))
        return [
            token
            for character in text
            for token in ([THINK + ord(character) - 0xE000] if character >= "\ue000" else character.encode())
        ]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        names = (*SPECIAL, "</")
        return names[token_id - THINK].encode() if token_id < THINK + len(names) else b""


VOCABULARY = Vocabulary(THINK + len(SPECIAL) + 1, Bytes())
TOKENS = Bytes()


def forced(marks: ReasoningMarks, budget: int, wanted: Sequence[int]) -> tuple[list[int], list[int]]:
    """An answer whose model wants these tokens, and the positions in it where another was forced."""
    row = ReasoningRow(marks, budget, VOCABULARY, PROMPT)
    answer: list[int] = []
    where: list[int] = []
    queue = list(wanted)
    while queue:
        position = PROMPT + len(answer)
        row.refresh(position)
        token = int(row.forced[0])
        assert (row.words is None) == (token == NO_TOKEN)
        if token == NO_TOKEN:
            token = queue.pop(0)
        else:
            bits = np.unpackbits(row.words.view(np.uint8), bitorder="little")
            assert np.flatnonzero(bits).tolist() == [token]
            where.append(len(answer))
        answer.append(token)
        row.tell(position, token)
    return answer, where


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(map(TOKENS.token_bytes, tokens)).decode()


def ids(text: str) -> list[int]:
    return TOKENS.encode(text, add_special_tokens=False)


CASES = [
    # marks, budget, what the model wants, what comes of it
    (ReasoningMarks("<think>", "</think>", False), 3, "<think>abcdef", "<think>abc</think>def"),
    (ReasoningMarks("<think>", "</think>", False), 3, "\n <think>ab</think>cdef", "\n <think>ab</think>cdef"),
    (ReasoningMarks("<think>", "</think>", False), 0, "<think>abc", "<think></think>abc"),
    (ReasoningMarks("<think>", "</think>", False), 2, "plain <think>abc", "plain <think>abc"),
    (ReasoningMarks("<think>", "</think>", True), 0, "abc", "</think>abc"),
    (ReasoningMarks("<think>", "</think>", True), 2, "ab</think>cd", "ab</think></think>cd"),
    (ReasoningMarks("<think>", "</think>", True), 4, "ab</think>cd", "ab</think>cd"),
    (ReasoningMarks("<think>", "</think>", True), 2, "a<bcd", "a<</think>bcd"),
    (ReasoningMarks("[THINK]", "[/THINK]", False), 3, "[THINK]abcde", "[THINK]abc[/THINK]de"),
    (ReasoningMarks("[THINK]", "[/THINK]", False), 3, "[THINK]ab[c", "[THINK]ab[/THINK]c"),
    (ReasoningMarks("[THINK]", "[/THINK]", False), 4, "[THINK]ab[/c", "[THINK]ab[/THINK]c"),
    (ReasoningMarks("Thought:", "So:", True), 2, "xyz", "xySo:z"),
    (ReasoningMarks("<|message|>", "<|end|>", False, "<|end|>final"), 2, "a<|message|>bcde<|message|>fg",
     "a<|message|>bc<|end|>de<|message|><|end|>finalfg"),
    (ReasoningMarks("<|message|>", "<|end|>", False, "<|end|>final"), 3, "<|message|>ab<|end|>x<|message|>fghi",
     "<|message|>ab<|end|>x<|message|><|end|>fghi"),
]  # fmt: skip


@pytest.mark.parametrize(("marks", "budget", "wanted", "expected"), CASES)
def test_what_becomes_of_an_answer(marks: ReasoningMarks, budget: int, wanted: str, expected: str) -> None:
    answer, _ = forced(marks, budget, ids(wanted))
    assert text_of(answer) == expected


TEXTS = st.lists(st.sampled_from([*b"a<>/ thinkTHINK[]", THINK, THINK + 1, THINK + 4]), max_size=25)


@settings(max_examples=60, deadline=None)
@given(wanted=TEXTS, budget=st.integers(0, 12), is_open=st.booleans(), number=st.integers(0, 1))
def test_against_a_search_in_the_text(wanted: list[int], budget: int, is_open: bool, number: int) -> None:
    start, end = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))[number]
    answer, where = forced(ReasoningMarks(start, end, is_open), budget, wanted)
    assert [token for index, token in enumerate(answer) if index not in where] == wanted
    # Where reasoning begins, in tokens; the answer may not get there.
    begin = 0
    while not is_open and start not in text_of(answer[:begin]):
        if begin == len(answer):
            assert not where
            return
        begin += 1
    if not is_open and not text_of(answer).lstrip().startswith(start):
        assert not where
        return
    thought = answer[begin : begin + budget]
    rest = text_of(answer[:begin]).partition(start)[2] if not is_open else ""
    if end in rest + text_of(thought) or len(answer) <= begin + budget:
        assert not where
    else:
        assert where == list(range(begin + budget, begin + budget + len(where)))
        closed = rest + text_of(answer[begin : begin + budget + len(where)])
        assert closed.endswith(end)
        assert len(closed) - len(rest + text_of(thought)) <= len(end)


@settings(max_examples=40, deadline=None)
@given(wanted=TEXTS, budget=st.integers(0, 8), is_open=st.booleans(), data=st.data())
def test_going_back_forgets_all_of_it(wanted: list[int], budget: int, is_open: bool, data: st.DataObject) -> None:
    marks = ReasoningMarks("<think>", "</think>", is_open)
    answer, where = forced(marks, budget, wanted)
    row = ReasoningRow(marks, budget, VOCABULARY, PROMPT)
    told = 0
    for _ in range(4):
        upto = data.draw(st.integers(0, len(answer)))
        if upto < told:
            row.rewind(PROMPT + upto)
        for index in range(told, upto):
            row.tell(PROMPT + index, answer[index])
            row.tell(PROMPT + index, 7)  # a second time changes nothing
        told = upto
        row.refresh(PROMPT + told)
        if told < len(answer):
            assert int(row.forced[0]) == (answer[told] if told in where else NO_TOKEN)


@settings(max_examples=40, deadline=None)
@given(wanted=TEXTS, budget=st.integers(0, 8), is_open=st.booleans(), unheard=st.integers(0, 2))
def test_a_device_may_run_ahead_where_nothing_is_forced(
    wanted: list[int], budget: int, is_open: bool, unheard: int
) -> None:
    """What does not wait is not forced, even if some tokens before it are not known yet."""
    marks = ReasoningMarks("<think>", "</think>", is_open)
    answer, where = forced(marks, budget, wanted)
    row = ReasoningRow(marks, budget, VOCABULARY, PROMPT)
    for index in range(len(answer)):
        if index >= unheard:
            told = index - unheard
            if told:
                row.tell(PROMPT + told - 1, answer[told - 1])
            if not row.waits(PROMPT + index):
                assert index not in where
                row.refresh(PROMPT + index)
                assert row.forced[0] == NO_TOKEN


def test_an_answer_that_is_over_with_reasoning_waits_for_nothing() -> None:
    row = ReasoningRow(ReasoningMarks("<think>", "</think>", True), 5, VOCABULARY, PROMPT)
    assert not row.waits(PROMPT + 4)
    assert row.waits(PROMPT + 5)
    for index, token in enumerate(ids("ab</think>cd")):
        row.tell(PROMPT + index, token)
    assert not row.waits(PROMPT + 1000)


def test_marks_in_a_real_vocabulary(smollm2_path: Path) -> None:
    """SmolLM2 has no token for the mark, so several are forced; the text is the mark."""
    tokenizer = load_tokenizer(smollm2_path)
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer)
    row = ReasoningRow(ReasoningMarks("<think>", "</think>", True), 2, vocabulary, 0)
    text = b""
    for position, token in enumerate(tokenizer.encode("Let us see", add_special_tokens=False)[:2]):
        row.tell(position, token)
    position = 2
    while True:
        row.refresh(position)
        if row.forced[0] == NO_TOKEN:
            break
        text += tokenizer.token_bytes(int(row.forced[0]))
        row.tell(position, int(row.forced[0]))
        position += 1
    assert text == b"</think>"
    assert position > 3


def test_a_mark_without_tokens_is_refused() -> None:
    class Letters(Bytes):
        def token_bytes(self, token_id: int) -> bytes:
            return b"a"

    for marks in (ReasoningMarks("a", "</x>", True), ReasoningMarks("a", "a", True, "</x>")):
        with pytest.raises(InvalidRequestError, match="</x>") as raised:
            ReasoningRow(marks, 2, Vocabulary(300, Letters()), 0)
        assert raised.value.param == "thinking_token_budget"
