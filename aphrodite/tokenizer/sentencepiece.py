"""SentencePiece vocabularies (BPE and unigram) as `tokenizers` objects, and the reader of their .model files.

Format of the file: sentencepiece_model.proto of https://github.com/google/sentencepiece. GGUF files carry the
same vocabulary as arrays, so both go through `build`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.pieces import WORD_START

MAX_FILE_BYTES = 1 << 28


class PieceType(IntEnum):
    """Kind of a vocabulary entry; the numbers are the same in SentencePiece and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(slots=True, kw_only=True)
class Vocabulary:
    """A SentencePiece model.

    Attributes:
        pieces, scores, types: one entry a token id. Scores order the merges (BPE) or are log-probabilities.
        rank_by_id: merges are ordered by token id and not by score.
        charsmap: SentencePiece's compiled normalization rules; empty: none.
        add_space_prefix: a space is put before the text.
        remove_extra_spaces: runs of spaces become one, and spaces at the ends of the text go.
    """

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    unigram: bool = False
    unk_id: int | None = 0
    bos_id: int | None = None
    eos_id: int | None = None
    rank_by_id: bool = False
    charsmap: bytes = b""
    add_space_prefix: bool = True
    remove_extra_spaces: bool = False


def build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """A tokenizer with the vocabulary's segmentation, normalization, decoder and added tokens, without bos or eos."""
    byte_fallback = PieceType.BYTE in vocabulary.types
    if vocabulary.unigram:
        backend = tokenizers.Tokenizer(
            models.Unigram(
                list(zip(vocabulary.pieces, vocabulary.scores, strict=True)), vocabulary.unk_id, byte_fallback
            )
        )
    else:
        unknown = None if vocabulary.unk_id is None else vocabulary.pieces[vocabulary.unk_id]
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece: token_id for token_id, piece in enumerate(vocabulary.pieces)},
                merges=_merges(vocabulary),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        )
    backend.normalizer = _normalizer(vocabulary)
    if vocabulary.unigram:
        scheme = "always" if vocabulary.add_space_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, prepend_scheme=scheme)
    backend.decoder = _decoder(vocabulary)
    _add_tokens(backend, vocabulary)
    return backend


def _normalizer(vocabulary: Vocabulary) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.remove_extra_spaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if not vocabulary.unigram:  # a unigram's Metaspace does these two
        if vocabulary.add_space_prefix:
            steps.append(normalizers.Prepend(WORD_START))
        steps.append(normalizers.Replace(" ", WORD_START))
    return normalizers.Sequence(steps)


def _decoder(vocabulary: Vocabulary) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    special, plain = [], []
    for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True):
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN):
            special.append(AddedToken(piece, special=True, normalized=False))
        elif kind == PieceType.USER_DEFINED and piece.strip(WORD_START):  # runs of spaces are reached by merges
            plain.append(AddedToken(piece, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every way to make a piece from two others, the best pieces first."""
    mergeable = {
        piece: token_id
        for token_id, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        if kind in (PieceType.NORMAL, PieceType.USER_DEFINED)
    }
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for piece, token_id in mergeable.items():
        rank = float(token_id) if vocabulary.rank_by_id else -vocabulary.scores[token_id]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            left_id = mergeable.get(left)
            if left_id is not None and right in mergeable:
                ranked.append((rank, -cut, token_id, left_id, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def read_model_file(path: Path) -> Vocabulary:
    """Read a SentencePiece .model file.

    Raises:
        ModelFormatError: the file is damaged, too large, or of SentencePiece's kinds `word` or `char`.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelFormatError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no SentencePiece model is")
    try:
        vocabulary = _parse_model(path.read_bytes(), path)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path}: not a SentencePiece model or damaged ({error}); download it again") from None
    if not vocabulary.pieces:
        raise ModelFormatError(f"{path}: the SentencePiece model has no vocabulary; download it again")
    return vocabulary


def _parse_model(data: bytes, path: Path) -> Vocabulary:
    vocabulary = Vocabulary(unigram=True)
    for number, value in _fields(data):
        if number == 1:
            _parse_piece(_message(value), vocabulary)
        elif number == 2:
            _parse_trainer(_message(value), vocabulary, path)
        elif number == 3:
            _parse_normalizer(_message(value), vocabulary)
    count = len(vocabulary.pieces)
    for name in ("unk_id", "bos_id", "eos_id"):
        token_id = getattr(vocabulary, name)
        if token_id is not None and token_id >= count:
            raise ModelFormatError(f"{path}: {name} {token_id} is outside the vocabulary of {count}; download it again")
    return vocabulary


def _parse_piece(data: bytes, vocabulary: Vocabulary) -> None:
    piece, score, kind = "", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(data):
        if number == 1:
            piece = _message(value).decode()
        elif number == 2:
            score = struct.unpack("<f", _message(value))[0]
        elif number == 3:
            kind = _number(value)
    vocabulary.pieces.append(piece)
    vocabulary.scores.append(score)
    vocabulary.types.append(kind)


def _parse_trainer(data: bytes, vocabulary: Vocabulary, path: Path) -> None:
    vocabulary.bos_id, vocabulary.eos_id = 1, 2
    names = {40: "unk_id", 41: "bos_id", 42: "eos_id"}
    for number, value in _fields(data):
        if number == 3:
            kind = _number(value)
            if kind not in (1, 2):
                raise ModelFormatError(f"{path}: SentencePiece model kind {kind} is not supported; unigram and BPE are")
            vocabulary.unigram = kind == 1
        elif number in names:
            token_id = _number(value)
            setattr(vocabulary, names[number], token_id if token_id < 1 << 31 else None)  # -1: there is none


def _parse_normalizer(data: bytes, vocabulary: Vocabulary) -> None:
    vocabulary.remove_extra_spaces = True
    for number, value in _fields(data):
        if number == 2:
            vocabulary.charsmap = _message(value)
        elif number == 3:
            vocabulary.add_space_prefix = bool(_number(value))
        elif number == 4:
            vocabulary.remove_extra_spaces = bool(_number(value))


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise IndexError("a field has the wrong type")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise IndexError("a field has the wrong type")
    return value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("a number is too long")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; fixed-width values come as their bytes."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire} does not exist")
        if size > end - position:
            raise IndexError("a field ends after the file")
        yield tag >> 3, data[position : position + size]
        position += size
