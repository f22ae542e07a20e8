"""GGUF tokenizers: the real model against transformers, and small ones written for the test."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aphrodite.errors import InvalidRequestError, ModelFormatError
from aphrodite.tokenizer.gguf import from_metadata
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.pretokenizers import PRE_TOKENIZERS, kind_of_tokens
from aphrodite.tokenizer.tokenizer import Tokenizer


def test_real_model_encodes_as_transformers(smollm: Tokenizer, smollm_oracle: Any, corpus: list[str]) -> None:
    expected = smollm_oracle(corpus, add_special_tokens=False)["input_ids"]
    assert smollm.encode_batch(corpus, add_special_tokens=False) == expected
    assert [smollm.encode(text, add_special_tokens=True) for text in corpus[:50]] == expected[:50]


def test_real_model_decodes_as_transformers(smollm: Tokenizer, smollm_oracle: Any, corpus: list[str]) -> None:
    for text in corpus:
        ids = smollm.encode(text, add_special_tokens=False)
        for cut in {len(ids), len(ids) // 2, 1}:  # half a text often ends inside a character
            for skip in (True, False):
                assert smollm.decode(ids[:cut], skip) == smollm_oracle.decode(ids[:cut], skip_special_tokens=skip)


def test_real_model_describes_itself(smollm: Tokenizer) -> None:
    assert smollm.vocab_size == 49152
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.adds_bos) == (1, 2, False)
    assert smollm.eos_token_ids == (2, 0)
    assert smollm.special_ids == frozenset(range(17))
    assert smollm.token_to_id("<|im_end|>") == 2
    assert smollm.token_to_id("no such token") is None
    assert smollm.chat_template is not None
    assert "SmolLM" in smollm.chat_template


def test_token_bytes_add_up_to_the_text(smollm: Tokenizer, corpus: list[str]) -> None:
    for text in corpus:
        ids = smollm.encode(text, add_special_tokens=False)
        assert b"".join(map(smollm.token_bytes, ids)) == text.encode()
        assert all(len(smollm.token_bytes(token_id)) <= smollm.max_token_bytes for token_id in ids)
    assert smollm.token_bytes(2) == b"<|im_end|>"
    assert smollm.token_bytes(49152) == b""
    assert smollm.token_bytes(-1) == b""


def test_token_text_shows_parts_of_characters_as_replacement(smollm: Tokenizer) -> None:
    ids = smollm.encode(" story👩", add_special_tokens=False)
    assert smollm.token_text(ids[0]) == " story"
    assert "\ufffd" in {smollm.token_text(token_id) for token_id in ids[1:]}


def test_limits_refuse_before_and_after_tokenizing(smollm: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="limit of 10"):
        smollm.encode("x" * 11, add_special_tokens=False, max_chars=10)
    with pytest.raises(InvalidRequestError, match="has 5 tokens") as error:
        smollm.encode("1 2 3", add_special_tokens=False, max_tokens=4)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequestError, match="at least"):
        smollm.encode("x" * 10_000_000, add_special_tokens=False, max_tokens=8192)
    assert len(smollm.encode("1 2 3", add_special_tokens=False, max_tokens=5)) == 5


@pytest.mark.parametrize("text", ["a" * 1_000_000, "\n" * 1_000_000, "abcdefghij" * 100_000, " " * 1_000_000])
def test_huge_words_are_tokenized_exactly(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text, add_special_tokens=False)
    assert smollm.decode(ids) == text


def test_half_a_surrogate_pair_is_refused(smollm: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        smollm.encode("a\ud800b", add_special_tokens=False)


# --- pre-tokenizer kinds ---


def _words(pre_tokenizer: Any, text: str) -> list[str]:
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def test_kinds_cut_words_as_transformers_does(corpus: list[str]) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = sorted(set(GGUF_PRE_TOKENIZER_SPLITS) & set(PRE_TOKENIZERS))
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35"} <= set(shared)
    for name in shared:
        expected = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        ours = PRE_TOKENIZERS[name].build()
        for text in corpus[::3]:
            assert _words(ours, text) == _words(expected, text), (name, text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("smollm", "in  2024", ["in", "ĠĠ", "2", "0", "2", "4"]),
        ("gpt-2", "in  2024", ["in", "Ġ", "Ġ2024"]),
        ("falcon", "x==12345", ["x", "==", "123", "45"]),
        ("default", "x==12345", ["x", "==", "123", "45"]),
        ("deepseek-v3", "a12345!word", ["a", "123", "45", "!word"]),
        ("deepseek-coder", "a 12!\r\n", ["a", "Ġ", "1", "2", "!", "č", "Ċ"]),
        ("deepseek-llm", "Ab, 12", ["Ab", ",", "Ġ", "1", "2"]),
        ("deepseek-llm", "\u1f7d\u1fbeא", ["á½½á¾¾", "×Ĳ"]),
        ("stablelm2", "I'LL 12", ["I", "'LL", "Ġ", "1", "2"]),
        ("dbrx", "1234", ["123", "4"]),
        ("seed-coder", "x! 12\n\nw", ["x", "!", "Ġ", "1", "2", "ĊĊ", "w"]),
        ("kimi-k2", "aB你b1234!\n", ["a", "B", "ä½ł", "b", "123", "4", "!Ċ"]),
        ("bailingmoe", "I'll 1\n\n", ["I", "'ll", "Ġ", "1", "ĊĊ"]),
        ("tiny_aya", "in 1234567", ["in", "Ġ", "1", "234", "567"]),
        ("minicpm5", "I'm 1234", ["I", "'m", "Ġ", "123", "4"]),
        ("viking", "a,b 12", ["a", ",", "b", "Ġ", "1", "2"]),
        ("youtu", "字aB 12", ["åŃĹ", "a", "B", "Ġ", "1", "2"]),
    ],
)
def test_kinds_cut_words_as_their_models_were_trained(kind: str, text: str, words: list[str]) -> None:
    assert _words(PRE_TOKENIZERS[kind].build(), text) == words


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZERS))
def test_every_kind_keeps_every_byte(kind: str, corpus: list[str]) -> None:
    decode = decoders.ByteLevel().decode
    for text in corpus[::20]:
        assert decode(_words(PRE_TOKENIZERS[kind].build(), text)) == text


@pytest.mark.parametrize(
    ("marks", "count", "kind"),
    [
        (["<|begin_of_text|>", "<|eot_id|>"], 128_256, "llama-bpe"),
        (["<|begin_of_text|>", "<|eot_id|>"], 32_000, None),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 151_936, "qwen2"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 49_152, None),
        (["<｜begin▁of▁sentence｜>", "<｜Assistant｜>"], 129_280, "deepseek-v3"),
        (["<｜begin▁of▁sentence｜>"], 102_400, "deepseek-llm"),
        (["<｜begin▁of▁sentence｜>", "<｜fim▁begin｜>"], 32_256, "deepseek-coder"),
    ],
)
def test_vocabularies_of_well_known_models_show_their_kind(marks: list[str], count: int, kind: str | None) -> None:
    assert kind_of_tokens({*marks, *map(str, range(count - len(marks)))}) == kind


# --- small tokenizers ---


@pytest.fixture(scope="module")
def trained(corpus: list[str]) -> tokenizers.Tokenizer:
    """A small byte-level BPE with special tokens and a plain added token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS["llama-bpe"].build()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|a b|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def metadata(trained: tokenizers.Tokenizer) -> Metadata:
    import json

    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def test_a_written_file_equals_the_tokenizer_it_came_from(
    tmp_path: Path, trained: tokenizers.Tokenizer, metadata: Metadata, corpus: list[str]
) -> None:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_tokenizer(path)
    texts = [*corpus, "x<|a b|>y</s>z", "<|a b|>"]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == trained.encode(text).ids
        assert ours.encode(text, add_special_tokens=True) == [0, *trained.encode(text).ids]
    assert ours.adds_bos
    assert ours.special_ids == {0, 1}
    assert dict(ours.chat_templates) == {"default": "D", "tool_use": "T"}


def test_an_unknown_kind_is_said_once_and_works(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = from_metadata(metadata | {"tokenizer.ggml.pre": "made-up"}, "x.gguf")
    assert "made-up" in caplog.text
    assert ours.decode(ours.encode("Hello 123", add_special_tokens=False)) == "Hello 123"


def _without(key: str) -> Callable[[Metadata], Metadata]:
    return lambda metadata: {name: value for name, value in metadata.items() if name != "tokenizer.ggml." + key}


def _with(key: str, value: object) -> Callable[[Metadata], Metadata]:
    return lambda metadata: metadata | {"tokenizer.ggml." + key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("tokens"), "no tokenizer"),
        (_without("merges"), "merges"),
        (_with("merges", ["one two three"]), "damaged"),
        (_with("merges", ["nowhere tobefound"]), "damaged"),
        (_with("token_type", [1, 1]), "token types"),
        (_with("model", "rwkv"), "rwkv"),
        (_with("pre", 7), "int instead of str"),
        (_with("eos_token_id", 10**6), "outside the vocabulary"),
        (_with("bos_token_id", 10**6), "outside the vocabulary"),
    ],
)
def test_damaged_metadata_is_one_clear_error(
    metadata: Metadata, change: Callable[[Metadata], Metadata], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        from_metadata(change(metadata), "x.gguf")


def test_the_largest_id_of_32_bits_stands_for_none(metadata: Metadata) -> None:
    none = (1 << 32) - 1
    ids = {"tokenizer.ggml.bos_token_id": none, "tokenizer.ggml.eot_token_id": none}
    ours = from_metadata(metadata | ids, "x.gguf")
    assert (ours.bos_token_id, ours.eos_token_ids) == (None, (1,))


@pytest.mark.parametrize("named", [None, "default", "brand-new"])
def test_files_that_name_no_kind_are_known_by_their_tokens(
    named: str | None, metadata: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    """As Llama 3's first GGUF files."""
    marks = ["<|begin_of_text|>", "<|eot_id|>"]
    tokens = [*metadata["tokenizer.ggml.tokens"], *marks]
    tokens += [f"word {number}" for number in range(128_256 - len(tokens))]
    types = [*metadata["tokenizer.ggml.token_type"]]
    changes = {"tokens": tokens, "token_type": types + [3, 3] + [1] * (len(tokens) - len(types) - 2), "pre": named}
    changed = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items() if value is not None}}
    if named is None:
        del changed["tokenizer.ggml.pre"]
    with caplog.at_level(logging.INFO, "aphrodite.tokenizer"):
        found = from_metadata(changed, "old.gguf")
    assert "by its tokens it is llama-bpe" in caplog.text
    known = from_metadata({**changed, "tokenizer.ggml.pre": "llama-bpe"}, "new.gguf")
    text = "In 2024, we'll see 123456 of them!!\n"
    assert found.encode(text, add_special_tokens=True) == known.encode(text, add_special_tokens=True)


def test_a_small_vocabulary_without_a_kind_is_told(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    unnamed = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.pre"}
    from_metadata(unnamed, "old.gguf")
    assert "no pre-tokenizer kind is named, so words are cut as for 'default'" in caplog.text
