"""Vocabularies by rank (tekken.json, tiktoken.model) against the algorithm that defines them."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.pieces import BYTE_ALPHABET

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = 20
KIMI_SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", None, "<|im_middle|>"]


@pytest.fixture(scope="module")
def ranks(corpus: list[str]) -> list[bytes]:
    """Tokens by rank: the bytes, then what byte pair encoding learns of the corpus, then a word that no merge makes."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    merges = [pair[0] + pair[1] for pair in json.loads(backend.to_str())["model"]["merges"]]
    learned = [bytes(BYTE_ALPHABET[letter] for letter in token) for token in dict.fromkeys(merges)]
    return [*(bytes([byte]) for byte in range(256)), *learned, b"zyzzyva"]


def encoded(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """The definition: of all neighbours those with the lowest joint rank are joined, until none are left."""
    found: list[int] = []
    for word in regex.findall(pattern, text):
        data = word.encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while True:
            joint = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not joint:
                break
            _, i = min(joint)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ranks[part] for part in parts]
    return found


def base64_of(token: bytes) -> str:
    return base64.b64encode(token).decode()


def tekken(ranks: list[bytes], **changes: Any) -> dict[str, Any]:
    size = RESERVED + len(ranks)
    config = {"pattern": PATTERN, "default_vocab_size": size, "default_num_special_tokens": RESERVED, "version": "v7"}
    beyond = [b"not counted"]
    vocab = [{"rank": i, "token_bytes": base64_of(token)} for i, token in enumerate(ranks + beyond)]
    special = [{"rank": 1, "token_str": "<s>"}, {"rank": 2, "token_str": "</s>"}, {"rank": 3, "token_str": "[INST]"}]
    return {"config": {**config, **changes.pop("config", {})}, "vocab": vocab, "special_tokens": special, **changes}


def kimi(ranks: list[bytes]) -> tuple[str, dict[str, Any]]:
    lines = "".join(f"{base64_of(token)} {rank}\n" for rank, token in enumerate(ranks))
    named = {str(len(ranks) + i): {"content": name} for i, name in enumerate(KIMI_SPECIAL) if name}
    return lines, {"added_tokens_decoder": named, "bos_token": "[BOS]", "eos_token": "[EOS]"}


def plain(corpus: list[str]) -> list[str]:
    """Texts without what may be a special token."""
    texts = [text for text in corpus if "<" not in text and "[" not in text]
    return [*texts[::2], "zyzzyva zyzzyva"]


def test_tekken_encodes_by_rank(tmp_path: Path, ranks: list[bytes], corpus: list[str]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks)))
    tokenizer = load_tokenizer(tmp_path)
    by_bytes = {token: RESERVED + rank for rank, token in enumerate(ranks)}
    for text in plain(corpus):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encoded(text, PATTERN, by_bytes), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == RESERVED + len(ranks)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.token_text(5)) == ("<s>", "</s>", "<SPECIAL_5>")
    assert tokenizer.encode("[INST]a", add_special_tokens=True) == [1, 3, by_bytes[b"a"]]
    assert tokenizer.special_ids == frozenset(range(RESERVED))


def test_older_tekken_files_do_not_list_special_tokens(tmp_path: Path, ranks: list[bytes]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks, special_tokens=None)))
    tokenizer = load_tokenizer(tmp_path / "tekken.json")
    assert [tokenizer.token_to_id(name) for name in ("<unk>", "[/INST]", "[SYSTEM_PROMPT]")] == [0, 4, 17]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"config": None}, "it has no config"),
        ({"vocab": []}, "has not the"),
        ({"config": {"pattern": "("}}, "no regular expression"),
        ({"config": {"default_vocab_size": RESERVED}}, "default_vocab_size should be"),
        ({"vocab": [{"token_bytes": "AA=="}] * 2000}, "lacks some single bytes"),
        ({"vocab": [{"token_bytes": "?"}] * 2000}, "instead of bytes in base64"),
    ],
)
def test_damaged_tekken_files_are_refused(
    tmp_path: Path, ranks: list[bytes], changes: dict[str, Any], problem: str
) -> None:
    values = tekken(ranks, **changes) if changes.get("config", {}) is not None else {**tekken(ranks), **changes}
    (tmp_path / "tekken.json").write_text(json.dumps(values))
    with pytest.raises(ModelFormatError, match=problem):
        load_tokenizer(tmp_path)


def test_tiktoken_of_kimi_encodes_by_rank(tmp_path: Path, ranks: list[bytes], corpus: list[str]) -> None:
    lines, config = kimi(ranks)
    (tmp_path / "tiktoken.model").write_text(lines)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    upper, lower = r"[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]", r"[[\p{Ll}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]"
    lead, ends = r"[^\r\n\p{L}\p{N}]?", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
    pattern = (
        rf"(?V1)\p{{Han}}+|{lead}{upper}*{lower}+{ends}|{lead}{upper}+{lower}*{ends}|\p{{N}}{{1,3}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    by_bytes = {token: rank for rank, token in enumerate(ranks)}
    for text in plain(corpus):
        assert tokenizer.encode(text, add_special_tokens=False) == encoded(text, pattern, by_bytes), text
    names = [tokenizer.token_text(len(ranks) + i) for i in range(len(KIMI_SPECIAL))]
    assert names == [name or f"<|reserved_token_{len(ranks) + i}|>" for i, name in enumerate(KIMI_SPECIAL)]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[BOS]", "[EOS]")


def test_tiktoken_of_others_is_refused(tmp_path: Path, ranks: list[bytes]) -> None:
    lines, config = kimi(ranks)
    (tmp_path / "tiktoken.model").write_text(lines)
    with pytest.raises(ModelFormatError, match="only in code that comes with the model, which is never run"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for wrong in ("301", "9" * 5000):
        (tmp_path / "tiktoken.model").write_text(lines.replace(" 300\n", f" {wrong}\n"))
        with pytest.raises(ModelFormatError, match="its ranks do not count upwards at"):
            load_tokenizer(tmp_path)


def test_ids_that_no_vocabulary_reaches_are_refused(tmp_path: Path, ranks: list[bytes]) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks)))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1 << 40}))
    with pytest.raises(ModelFormatError, match="outside the vocabulary"):
        load_tokenizer(tmp_path)
