"""What may come next: against Python's own re and json, over vocabularies of every kind, forwards and backwards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.gbnf import lark_of_gbnf
from aphrodite.sampling.grammar import NOTHING_FITS, GrammarRow
from aphrodite.sampling.table import Grammar
from aphrodite.sampling.vocabulary import Vocabulary
from aphrodite.tokenizer.loader import load_tokenizer

END = 256


class Bytes:
    """A token a byte, and one that ends answers."""

    special_ids = frozenset({END})

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<end>"


BYTES = Vocabulary(257, Bytes())


def allowed(row: GrammarRow, position: int, size: int = 257) -> set[int]:
    row.refresh(position)
    return set(np.flatnonzero(np.unpackbits(row.words.view(np.uint8), bitorder="little")[:size]).tolist())


def fits(grammar: Grammar, text: str) -> bool:
    """Whether the text can be written, byte by byte, and may end there."""
    row = BYTES.grammars.follow(grammar, 3, (END,))
    for position, byte in enumerate(text.encode(), start=3):
        if byte not in allowed(row, position):
            return False
        row.tell(position, byte)
    return END in allowed(row, 3 + len(text.encode()))


@pytest.mark.parametrize(
    ("pattern", "alphabet"),
    [("a*b?(c|dd)+", "abcd"), (r"\d{2,3}-[^\d]", "12-x/"), ("(ab|a)(c|bcd)?", "abcd"), ("é+|x", "éx"), ("", "a")],
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_regular_expressions_are_pythons(pattern: str, alphabet: str, data: Any) -> None:
    text = data.draw(st.text(alphabet, max_size=6))
    assert fits(Grammar("regex", pattern or "()"), text) == (re.fullmatch(pattern, text) is not None)


ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*   # operators
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    ("rules", "good", "bad"),
    [
        ('root ::= "a"* "x"', ["x", "aax"], ["", "a", "xx"]),
        ('root ::= [a-z]+ "x"', ["abx", "xx"], ["x", "aby"]),
        ('root ::= [^a-c\\]\\-] . {2}', ["d\n]", "_ab"], ["abc", "-ab", "dd"]),
        (r'root ::= "\x41\u00e9\U0001F600\t\"\\"', ['Aé😀\t"\\'], ["A"]),
        ("root ::= a-b | c_d # comment\n\na-b ::= (\"x\" |\n \"y\"){2,3}\nc_d ::= \"z\"?", ["xy", "yyx", "z", ""],
         ["x", "xxxx", "zz"]),
        ('root ::= "(" root ")" | ws "x"\nws ::= " "*', ["((x))", "(  x)"], ["((x)", "( x )"]),
        ('root ::= item ("," root)?\nitem ::= [a-z]+', ["a,bc,d"], ["a,", ",a"]),
        (ARITHMETIC, ["(1+2)*x = 3\n", "1=2\n", "1=2\na_b/2= (x )\n"], ["1=\n", "1=2", "1=2 3\n"]),
        (JSON, ['{"a": [1, 2.5e3, "x\\n", {"b": null}], "c":true}', '{}'], ['{"a"}', '[1]', '{"a":1,}']),
    ],
)  # fmt: skip
def test_gbnf(rules: str, good: list[str], bad: list[str]) -> None:
    assert {text: fits(Grammar("gbnf", rules), text) for text in (*good, *bad)} == {
        **dict.fromkeys(good, True), **dict.fromkeys(bad, False),
    }  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    ['root ::= foo', 'x ::= "a"', 'root ::= "a', "root ::= (", "root ::= [z-a]", 'root = "a"', 'root ::= "a"{3,1}',
     'root ::= "\\q"', "root ::= " + "(" * 100, 'root ::= "a" ~', r'root ::= "\ud800"', 'root ::= "a"' + "*" * 100_000,
     "", 'root ::= "a"{1000000}', 'root ::= ) "a"'],
)  # fmt: skip
def test_what_is_not_gbnf_is_refused(rules: str) -> None:
    with pytest.raises(InvalidRequestError):
        BYTES.grammars.compile(Grammar("gbnf", rules))


def test_errors_of_gbnf_say_where() -> None:
    with pytest.raises(ValueError, match="line 2"):
        lark_of_gbnf('root ::= a\na ::= "x" ~')


@pytest.mark.parametrize(
    "grammar",
    [Grammar("regex", "(?=a)b"), Grammar("regex", "("), Grammar("lark", "start: foo"), Grammar("json_schema", "[1]"),
     Grammar("json_schema", '{"type":"nothing"}'), Grammar("json_schema", '{"not":{"type":"string"}}'),
     Grammar("json_schema", '{"$ref":"file:///etc/passwd"}')],
)  # fmt: skip
def test_errors_of_grammars_reach_the_client(grammar: Grammar) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be used") as caught:
        BYTES.grammars.compile(grammar)
    assert caught.value.param == "grammar"
    assert len(str(caught.value)) < 800


def test_a_grammar_that_nothing_fits_fails_its_row() -> None:
    row = BYTES.grammars.follow(
        Grammar("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}'), 0, ()
    )
    assert allowed(row, 0) == set()
    assert row.failure is not None
    assert NOTHING_FITS in row.failure


def test_choices_of_any_characters_and_number() -> None:
    texts = ['q"uo\\te', "é😀", "a/b", "\x01\n", *(f"number {number}" for number in range(4000))]
    grammar = Grammar("choice", json.dumps(texts))
    for text in (*texts[:4], "number 3999"):
        assert fits(grammar, text)
    assert not fits(grammar, "number 4000")
    assert not fits(grammar, "num")


def test_white_space_in_json_is_what_printers_write() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    flexible, tight = (
        Grammar("json_schema", json.dumps({**schema, **more}))
        for more in ({}, {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None}})
    )
    for indent in (None, 0, 2, 8, "\t"):
        for separators in (None, (",", ":"), (" ,", " : ")):
            text = json.dumps({"a": 1}, indent=indent, separators=separators)
            assert fits(flexible, text)
            assert fits(flexible, text.replace("\n", "\r\n"))
    for text in ('{"a":  1}', '{\n\n"a":1}', '{"a":1 \n}', "{\n" + " " * 41 + '"a":1}'):
        assert not fits(flexible, text)
    assert fits(tight, '{"a":1}')
    assert not fits(tight, '{"a": 1}')


def test_the_end_is_allowed_exactly_where_the_answer_may_end_and_needed_nowhere() -> None:
    row = BYTES.grammars.follow(Grammar("choice", '["ab","abc"]'), 5, (END,))
    assert allowed(row, 5) == {ord("a")}
    row.tell(5, ord("a"))
    assert allowed(row, 6) == {ord("b")}
    row.tell(6, ord("b"))
    assert allowed(row, 7) == {ord("c"), END}
    assert not row.completed_at(6)
    row.tell(7, ord("c"))
    assert row.completed_at(7)
    ignored = BYTES.grammars.follow(Grammar("choice", '["ab","abc"]'), 5, ())
    for position, byte in enumerate(b"ab", start=5):
        ignored.tell(position, byte)
    assert allowed(ignored, 7) == {ord("c")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12))
def test_going_back_is_as_if_nothing_had_been_written(steps: list[int]) -> None:
    grammar = Grammar("gbnf", JSON)
    row = BYTES.grammars.follow(grammar, 2, (END,))
    text = b'{"a":[1,{}]}'
    at = 0
    for step in (*steps, len(text)):
        if step < at:
            row.rewind(2 + step)
            at = step
        while at < step:
            row.tell(2 + at, text[at])
            row.tell(2 + at, ord("?"))  # told twice, and what follows a gap: passed over
            row.tell(2 + at + 5, ord("?"))
            at += 1
        fresh = BYTES.grammars.follow(grammar, 2, (END,))
        for position, byte in enumerate(text[:at], start=2):
            fresh.tell(position, byte)
        assert allowed(row, 2 + at) == allowed(fresh, 2 + at)
    assert allowed(row, 3 + at) == set()  # the token before it is not known


def test_an_ending_token_can_be_taken_back() -> None:
    row = BYTES.grammars.follow(Grammar("regex", "a*"), 0, (END,))
    for position, token in enumerate((ord("a"), END)):
        row.tell(position, token)
    assert allowed(row, 2) == set()
    row.rewind(1)
    assert allowed(row, 1) == {ord("a"), END}
    row.rewind(0)
    row.rewind(5)
    assert allowed(row, 0) == {ord("a"), END}


TEXTS = ('{"name": "Zoë – “the\\n cat”", "n": [1.5, -2], "ok": true}', '{"a":{"b":{}}}')


@pytest.mark.parametrize("kind", ["smollm2", "sentencepiece"])
def test_texts_as_real_tokenizers_cut_them(kind: str, smollm2_path: Path) -> None:
    """What is JSON may be written however it is cut, with words' spaces and tokens of single bytes."""
    tokenizer: Any = load_tokenizer(smollm2_path) if kind == "smollm2" else SentencePieceLike()
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer)
    for text in TEXTS:
        row = vocabulary.grammars.follow(Grammar("json_object", ""), 0, ())
        ids = vocabulary.spell(text.encode())
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
        for position, token in enumerate(ids):
            assert row.failure is None
            row.tell(position, token)
        assert row.completed_at(len(ids) - 1)


class SentencePieceLike:
    """Pieces with a space before words, some bytes that have a token of their own beside the character's."""

    special_ids = frozenset({0, 1, 2})
    pieces = (
        b"<unk>",
        b"<s>",
        b"</s>",
        *(bytes([byte]) for byte in range(256)),
        b" ",
        b"{",
        b' {"',
        b'": ',
        b" cat",
        b"a",
    )
    vocab_size = len(pieces)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [259, *(3 + byte for byte in text.encode())]  # a space before every text

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def test_tokens_of_the_same_text_are_allowed_alike() -> None:
    vocabulary = Vocabulary(SentencePieceLike.vocab_size, SentencePieceLike())
    row = vocabulary.grammars.follow(Grammar("regex", "[a-z ]+"), 0, ())
    found = allowed(row, 0, vocabulary.size)
    assert {3 + ord("a"), len(SentencePieceLike.pieces) - 1, 3 + ord(" "), 259} <= found
    assert not found & {0, 1, 2}
