"""SentencePiece vocabularies against the sentencepiece library, from .model files and from GGUF metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.sentencepiece import read_model_file
from aphrodite.tokenizer.tokenizer import Tokenizer

STORY = """The little dragon lived in a cave by the sea, and every morning it watched the ships go by.
Nobody had ever told the dragon that ships carry people; it thought that they were a kind of bird.
"Where do they sleep?" it asked the gulls. The gulls laughed, for gulls always laugh, and flew away.
In the winter of 1843, 12 ships came; in the spring of 1844 there were 300, and the dragon was happy.
""".splitlines()


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>"],
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(STORY), model_writer=model, **settings | options)
    return model.getvalue()


@pytest.fixture(scope="module")
def bpe() -> bytes:
    return train(model_type="bpe")


@pytest.fixture(scope="module")
def unigram() -> bytes:
    return train(model_type="unigram", vocab_size=320)


def oracle(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def from_model_file(tmp_path: Path, model: bytes) -> Tokenizer:
    (tmp_path / "tokenizer.model").write_bytes(model)
    return load_tokenizer(tmp_path)


def from_gguf(tmp_path: Path, model: bytes) -> Tokenizer:
    """Write the vocabulary as GGUF, as llama.cpp's converter does."""
    processor = oracle(model)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    ids = range(processor.get_piece_size())
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    kinds[processor.piece_to_id("<tool>")] = 4
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(path)


Loader = Callable[[Path, bytes], Tokenizer]


@pytest.mark.parametrize("load", [from_model_file, from_gguf])
def test_bpe_encodes_and_decodes_as_sentencepiece(tmp_path: Path, bpe: bytes, corpus: list[str], load: Loader) -> None:
    ours, theirs = load(tmp_path, bpe), oracle(bpe)
    # Text that spells control or byte tokens is special to a serving engine and plain to sentencepiece.
    texts = [*STORY, "  two  spaces ", "\n", *(text for text in corpus if "\x00" not in text)]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.adds_bos
    assert ours.encode("a", add_special_tokens=True)[0] == ours.bos_token_id == 1
    assert ours.eos_token_id == 2


def test_unigram_encodes_and_decodes_as_sentencepiece(tmp_path: Path, unigram: bytes) -> None:
    ours, theirs = from_model_file(tmp_path, unigram), oracle(unigram)
    for text in [*STORY, "unknown words: Zürich 你好 👩", "the sea", "gulls' birds 1999"]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)


def test_compiled_normalization_rules_are_applied(tmp_path: Path) -> None:
    model = train(model_type="bpe", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    ours, theirs = from_model_file(tmp_path, model), oracle(model)
    for text in ["ＦＵＬＬ　ｗｉｄｔｈ", "ﬁne  ligature", "  edges  ", "①②"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text


def test_a_user_defined_token_is_found_in_text_and_is_not_special(tmp_path: Path, bpe: bytes) -> None:
    ours = from_gguf(tmp_path, bpe)
    token_id = ours.token_to_id("<tool>")
    assert token_id is not None
    ids = ours.encode("use<tool>now", add_special_tokens=False)
    assert token_id in ids
    assert not ours.is_special(token_id)
    assert ours.decode([token_id]) == "<tool>"


def test_added_tokens_have_the_ids_that_they_are_listed_with(tmp_path: Path, bpe: bytes) -> None:
    """InternLM 2 names entries of its vocabulary anew; others leave ids out behind theirs."""
    size = oracle(bpe).get_piece_size()
    listed = {
        str(size - 1): {"content": "<|im_start|>", "special": True},
        str(size - 2): {"content": "<|plain|>", "special": False},
        str(size): {"content": "<|first|>", "special": True},
        str(size + 3): {"content": "<|last|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tokenizer = from_model_file(tmp_path, bpe)
    assert {token_id: tokenizer.token_text(int(token_id)) for token_id in listed} == {
        token_id: entry["content"] for token_id, entry in listed.items()
    }
    assert tokenizer.encode("<|im_start|><|last|><|plain|>", add_special_tokens=False) == [size - 1, size + 3, size - 2]
    assert tokenizer.is_special(size - 1)
    assert not tokenizer.is_special(size - 2)
    assert tokenizer.vocab_size == size + 4


def test_byte_tokens_are_bytes_and_pieces_have_spaces(tmp_path: Path, bpe: bytes) -> None:
    ours = from_model_file(tmp_path, bpe)
    ids = ours.encode("the 👩", add_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)) == " the 👩".encode()
    assert ours.token_text(ids[0]).startswith(" t")


def test_encoding_equals_transformers_llama_tokenizer(tmp_path: Path, bpe: bytes, corpus: list[str]) -> None:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = read_model_file_of(tmp_path, bpe)
    scores = dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    skip = [p for p, kind in zip(vocabulary.pieces, vocabulary.types, strict=True) if kind not in (1, 4)]
    vocab = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores, skip))
    ours = load_tokenizer(tmp_path)
    # transformers drops the dummy space before text that begins with a space; sentencepiece and llama.cpp do not.
    for text in [text for text in corpus if text[:1] not in " " and "<|" not in text]:
        assert ours.encode(text, add_special_tokens=True) == [1, *theirs(text)["input_ids"]], repr(text)


def read_model_file_of(tmp_path: Path, model: bytes) -> Any:
    (tmp_path / "tokenizer.model").write_bytes(model)
    return read_model_file(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("cut", [1, 7, 100, 1001])
def test_a_truncated_model_file_is_one_clear_error(tmp_path: Path, bpe: bytes, cut: int) -> None:
    with pytest.raises(ModelFormatError):
        read_model_file_of(tmp_path, bpe[:cut])


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x08\x01", b"\x0a\xff\xff\xff\xff\x7f", b"{}", b"\x0f\x00"])
def test_what_is_no_model_file_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ModelFormatError):
        read_model_file_of(tmp_path, data)


def test_word_models_are_refused(tmp_path: Path) -> None:
    model = train(model_type="word", byte_fallback=False, vocab_size=20, user_defined_symbols=[])
    with pytest.raises(ModelFormatError, match="kind 3"):
        read_model_file_of(tmp_path, model)
