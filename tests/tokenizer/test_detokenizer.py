"""Streaming text: every way to cut a text into tokens gives the same text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from aphrodite.tokenizer.detokenizer import IncrementalDetokenizer
from aphrodite.tokenizer.pieces import BYTE_ALPHABET
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

SPELLING = {byte: char for char, byte in BYTE_ALPHABET.items()}
SAMPLES = [
    "👩‍👩‍👧‍👦 family",
    "🇩🇪🏳️‍🌈❤️‍🔥",
    "你好，世界",
    "नमस्ते क्षत्रिय",
    "e\u0301é",
    "plain text",
    "\ufffd",
    "\x00\x01",
    " lead",
]


def byte_level(chunks: list[bytes]) -> Tokenizer:
    """A vocabulary with one token for each of these byte strings; `<end>` is special."""
    vocab = {"".join(SPELLING[byte] for byte in chunk): i for i, chunk in enumerate(dict.fromkeys(chunks))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, SpecialTokens(), "test")


def sentencepiece(pieces: list[str], *, strip: bool = True) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["<s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, SpecialTokens(), "test")


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@st.composite
def cut_bytes(draw: st.DrawFn) -> list[bytes]:
    data = draw(st.one_of(st.text(), st.sampled_from(SAMPLES), st.text("👩‍é你क्ष a"))).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)))))
    bounds = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


@given(cut_bytes())
def test_text_cut_at_any_byte_comes_out_whole_and_without_replacement(chunks: list[bytes]) -> None:
    tokenizer = byte_level(chunks)
    ids = [tokenizer.token_to_id("".join(SPELLING[b] for b in chunk)) for chunk in chunks]
    text = b"".join(chunks).decode()
    for _ in range(2):  # the second time the shared cache of texts is warm
        out = stream(tokenizer, [i for i in ids if i is not None])
        assert "".join(out) == text
        assert out[-1] == ""
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in out)


@given(st.lists(st.binary(min_size=1, max_size=4), max_size=12))
def test_bytes_that_are_no_text_decode_as_the_library_does(chunks: list[bytes]) -> None:
    tokenizer = byte_level(chunks)
    ids = [i for chunk in chunks if (i := tokenizer.token_to_id("".join(SPELLING[b] for b in chunk))) is not None]
    expected = tokenizer._backend.decode(ids)
    assert tokenizer.decode(ids) == expected
    assert "".join(stream(tokenizer, ids)) == expected


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    data = "a👩b".encode()
    tokenizer = byte_level([bytes([byte]) for byte in data])
    ids = [tokenizer.token_to_id(SPELLING[byte]) or 0 for byte in data]
    assert stream(tokenizer, ids) == ["a", "", "", "", "👩", "b", ""]


def test_a_cut_character_shows_only_at_the_end() -> None:
    tokenizer = byte_level([b"ok ", "👩".encode()[:3]])
    assert stream(tokenizer, [0, 1]) == ["ok ", "", "\ufffd"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.push(1)
    assert detokenizer.pending == "👩".encode()[:3]


def test_special_tokens_are_skipped_or_shown_even_inside_a_character() -> None:
    first, last = "é".encode()[:1], "é".encode()[1:]
    tokenizer = byte_level([first, last])
    end = tokenizer.token_to_id("<end>")
    assert end is not None
    ids = [0, end, 1, end]
    for skip in (True, False):
        expected = tokenizer._backend.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip=skip)) == expected == tokenizer.decode(ids, skip)
    assert "".join(stream(tokenizer, ids)) == "é"


def test_ids_outside_the_vocabulary_add_nothing() -> None:
    tokenizer = byte_level([b"a"])
    assert stream(tokenizer, [0, 99, 0]) == ["a", "", "a", ""]
    assert tokenizer.decode([0, 99, 0]) == "aa"


@given(st.text(max_size=12), st.lists(st.sampled_from(["▁", "▁the", "cat", "s", "▁▁"]), max_size=6), st.booleans())
def test_byte_fallback_text_equals_the_library(text: str, words: list[str], strip: bool) -> None:
    tokenizer = sentencepiece(["▁", "▁the", "cat", "s", "▁▁"], strip=strip)
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in text.encode()), *words]
    ids = [i for piece in pieces if (i := tokenizer.token_to_id(piece)) is not None]
    expected = tokenizer._backend.decode(ids)
    assert tokenizer.decode(ids) == expected
    assert "".join(stream(tokenizer, ids)) == expected


def test_bad_fallback_bytes_give_one_mark_each_and_spare_their_neighbours() -> None:
    tokenizer = sentencepiece(["x"])
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") or 0 for byte in b"\xe4\xbd\xa0\xff\xe4\xbd"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "你\ufffd\ufffd\ufffd"


@given(
    st.lists(st.sampled_from(["▁the", "cat", "▁", "<0xC3>", "<0xA9>"]), max_size=5),
    st.lists(st.sampled_from(["▁the", "cat", "▁", "s"]), max_size=5),
)
def test_prompt_and_answer_together_are_the_whole_text(prompt: list[str], answer: list[str]) -> None:
    tokenizer = sentencepiece(["▁the", "cat", "▁", "s"])
    first = [0, *(tokenizer.token_to_id(piece) or 0 for piece in prompt)]
    then = [tokenizer.token_to_id(piece) or 0 for piece in answer]
    assert tokenizer.decode(first) + "".join(stream(tokenizer, then, first)) == tokenizer.decode(first + then)


def test_an_answer_to_bos_alone_loses_the_dummy_space_and_one_after_text_keeps_it() -> None:
    tokenizer = sentencepiece(["▁Hello"])
    bos, hello = 0, tokenizer.token_to_id("▁Hello") or 0
    assert "".join(stream(tokenizer, [hello, hello], [bos])) == "Hello Hello"
    assert "".join(stream(tokenizer, [hello], [bos, hello])) == " Hello"
    assert tokenizer.decode([hello], continuation=True) == " Hello"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_drops_the_mark_of_the_first_token_only(scheme: str) -> None:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("b", -3.0)], 0))
    backend.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
    tokenizer = Tokenizer(backend, SpecialTokens(), "test")
    for ids in ([2, 2, 3], [1, 2], [1, 1, 3], [3, 2], []):
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == backend.decode(ids)
    assert "".join(stream(tokenizer, [2], [3])) == " a"


def test_real_text_streams_as_it_decodes(smollm: Tokenizer, corpus: list[str]) -> None:
    for text in corpus:
        ids = smollm.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert "".join(stream(smollm, ids, [1], skip)) == smollm.decode(ids, skip)
