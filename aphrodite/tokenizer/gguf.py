"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from aphrodite.errors import ModelFormatError
from aphrodite.loading.gguf import read_gguf_metadata
from aphrodite.tokenizer.pieces import WORD_START
from aphrodite.tokenizer.pretokenizers import DEFAULT_KIND, PRE_TOKENIZERS, PreTokenizerKind, kind_of_tokens
from aphrodite.tokenizer.sentencepiece import PieceType, Vocabulary, build
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

logger = logging.getLogger(__name__)

_T = TypeVar("_T", str, int, bool)
_PREFIX = "tokenizer.ggml."
_NO_ID = (1 << 32) - 1  # with which GGUF stands for none
# Control tokens that end an answer in some chat format. Many files name only one of theirs as eos.
_END_OF_TURN = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>",
        "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<EOT>", "<|eot|>", "</s>",
    }
)  # fmt: skip


def load_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Raises:
        ModelFormatError: the file has none, it is damaged, or its kind is not supported.
    """
    return from_metadata(read_gguf_metadata(path), str(path))


def from_metadata(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """The tokenizer that GGUF metadata describes.

    Args:
        metadata: keys and values of the file; arrays are sequences.
        source: what to name in errors and warnings.
    """
    meta = _Metadata(metadata, source)
    kind = meta.get("model", str, "")
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level(meta)
        elif kind in ("llama", "t5"):
            backend, add_bos = _sentencepiece(meta, unigram=kind == "t5"), kind == "llama"
        else:
            raise ModelFormatError(
                f"{source}: tokenizer model {kind!r} is not supported; gpt2 (byte-level BPE), llama (SentencePiece "
                "BPE) and t5 (SentencePiece unigram) are; name a tokenizer.json with --tokenizer"
            )
    except ModelFormatError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for every fault in the data
        raise ModelFormatError(f"{source}: damaged tokenizer ({error}); download or convert the file again") from None
    special = _special_tokens(meta)
    add_bos, add_eos = meta.get("add_bos_token", bool, add_bos), meta.get("add_eos_token", bool, False)
    eos_id = special.eos_ids[0] if special.eos_ids else None
    surround(backend, special.bos_id if add_bos else None, eos_id if add_eos else None)
    return Tokenizer(backend, special, source)


def surround(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Make a tokenizer put bos before and eos after a text where special tokens are asked for.

    Ids outside the vocabulary are left for `Tokenizer` to refuse.
    """
    before, after = (
        [(name, i)] if i is not None and 0 <= i < _NO_ID and (name := backend.id_to_token(i)) else []
        for i in (bos_id, eos_id)
    )
    names = [*(name for name, _ in before), "$A", *(name for name, _ in after)]
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{name}:0" for name in names], special_tokens=before + after
    )


class _Metadata:
    """Typed access to `tokenizer.ggml.*`."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        value = self.values.get(_PREFIX + key, default)
        if not isinstance(value, kind):
            raise ModelFormatError(
                f"{self.source}: {_PREFIX}{key} is {type(value).__name__} instead of {kind.__name__}; "
                "the file is damaged or was converted wrongly"
            )
        return value

    def array(self, key: str) -> list[Any]:
        """An array as a list; empty where the file has none."""
        value = self.values.get(_PREFIX + key, ())
        return value.tolist() if hasattr(value, "tolist") else list(value)

    def tokens(self) -> list[str]:
        tokens = self.array("tokens")
        if not tokens:
            raise ModelFormatError(f"{self.source}: the file has no tokenizer ({_PREFIX}tokens is missing)")
        return tokens

    def types(self, count: int) -> list[int]:
        types = self.array("token_type") or [int(PieceType.NORMAL)] * count
        if len(types) != count:
            raise ModelFormatError(
                f"{self.source}: {count} tokens but {len(types)} token types; the file is damaged or truncated"
            )
        return types


def _byte_level(meta: _Metadata) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether its pre-tokenizer kind adds bos by default."""
    tokens = meta.tokens()
    kind = _pre_tokenizer(meta, tokens)
    merges = [tuple(merge.split(" ")) for merge in meta.array("merges")]
    if not merges:
        raise ModelFormatError(f"{meta.source}: {_PREFIX}merges is missing; convert the model to GGUF again")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(zip(tokens, range(len(tokens)), strict=True)), merges=merges, ignore_merges=kind.ignore_merges
        )
    )
    if (normalizer := kind.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = kind.build()
    backend.decoder = decoders.ByteLevel()
    special, plain = [], []
    for token, token_type in zip(tokens, meta.types(len(tokens)), strict=True):
        if token_type == PieceType.CONTROL:
            special.append(AddedToken(token, special=True, normalized=False))
        elif token_type == PieceType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    return backend, kind.add_bos


def _pre_tokenizer(meta: _Metadata, tokens: list[str]) -> PreTokenizerKind:
    """How words are cut: as the file says, or as the models do that have these tokens.

    Files before May 2024 name no kind, some converters write "default" for what they do not know, and new kinds come.
    """
    name = meta.get("pre", str, "")
    kind = PRE_TOKENIZERS.get(name)
    if kind is not None and kind is not DEFAULT_KIND:
        return kind
    problem = f"pre-tokenizer kind {name!r} is not known" if name else "no pre-tokenizer kind is named"
    shown = kind_of_tokens(set(tokens))
    if shown is not None:
        logger.info("%s: %s; by its tokens it is %s", meta.source, "it says 'default'" if kind else problem, shown)
        return PRE_TOKENIZERS[shown]
    if kind is None:
        logger.warning(
            "%s: %s, so words are cut as for 'default'; answers may be worse than the model can give, "
            "and a newer file of it may be better",
            meta.source,
            problem,
        )
    return DEFAULT_KIND


def _sentencepiece(meta: _Metadata, *, unigram: bool) -> tokenizers.Tokenizer:
    pieces = meta.tokens()
    scores = meta.array("scores")
    if len(scores) != len(pieces):
        raise ModelFormatError(
            f"{meta.source}: {len(pieces)} tokens but {len(scores)} scores; the file is damaged or truncated"
        )
    gemma = str(meta.values.get("general.architecture", "")).startswith("gemma")
    if gemma:  # its files spell runs of spaces as spaces, and order merges by id
        pieces = [piece if piece.strip(" ") else WORD_START * len(piece) for piece in pieces]
    charsmap = meta.values.get(_PREFIX + "precompiled_charsmap")
    return build(
        Vocabulary(
            pieces=pieces,
            scores=scores,
            types=meta.types(len(pieces)),
            unigram=unigram,
            unk_id=meta.get("unknown_token_id", int, 2 if unigram else 0),
            rank_by_id=gemma,
            charsmap=b"" if charsmap is None else charsmap.tobytes(),
            add_space_prefix=meta.get("add_space_prefix", bool, True),
            remove_extra_spaces=meta.get("remove_extra_whitespaces", bool, unigram),
        )
    )


def _special_tokens(meta: _Metadata) -> SpecialTokens:
    tokens = meta.tokens()
    types = meta.types(len(tokens))
    sentencepiece = meta.get("model", str, "") == "llama"
    bos_id = meta.get("bos_token_id", int, 1 if sentencepiece else -1)
    ends = [meta.get(key, int, -1) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    if sentencepiece and ends[0] < 0:
        ends[0] = 2
    marked = (PieceType.CONTROL, PieceType.USER_DEFINED)
    ends += [i for i, token in enumerate(tokens) if token in _END_OF_TURN and types[i] in marked]
    return SpecialTokens(
        bos_id=bos_id if 0 <= bos_id != _NO_ID else None,
        eos_ids=tuple(token_id for token_id in ends if 0 <= token_id != _NO_ID),
        templates=_templates(meta.values),
    )


def _templates(values: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` and the named ones, `tokenizer.chat_template.NAME`."""
    base = "tokenizer.chat_template"
    named = {key.removeprefix(base + "."): value for key, value in values.items() if key.startswith(base + ".")}
    if base in values:
        named["default"] = values[base]
    return {name: value for name, value in named.items() if isinstance(value, str)}
