"""From a vocabulary string to the exact bytes that its token adds to a text.

Two families of decoders cover decoder-only models. Byte-level BPE (GPT-2) spells every byte as one printable
character. SentencePiece spells a space as U+2581 and a byte outside its vocabulary as `<0xNN>`, and drops the
space that it put before the text. Formats: the `decoder` section of tokenizer.json, as the `tokenizers` library
documents it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import tokenizers

from aphrodite.errors import ModelFormatError

WORD_START: Final = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_ALPHABET: Final = _byte_alphabet()


def _one_mark_a_byte(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler: U+FFFD for each bad byte, as SentencePiece decodes, not one for a cut character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


_BYTEWISE: Final = "aphrodite.replace_bytewise"
codecs.register_error(_BYTEWISE, _one_mark_a_byte)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceDecoder:
    """How the strings of one vocabulary turn into bytes.

    Attributes:
        byte_level: the strings are spelled in `BYTE_ALPHABET`; the other fields then keep their defaults.
        replacements: (from, to) pairs applied to each string in turn.
        byte_fallback: `<0xNN>` is a byte.
        strip_start: so many spaces are dropped at the start of the whole text.
        bare_first: the first token of the text loses its `WORD_START`s (the Metaspace decoder).
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_start: int = 0
    bare_first: bool = False

    @property
    def errors(self) -> str:
        """Name of the codec error handler for bytes that are not UTF-8."""
        return "replace" if self.byte_level else _BYTEWISE

    def to_bytes(self, piece: str) -> bytes:
        """The bytes of a vocabulary string anywhere but at the start of the text."""
        if self.byte_level:
            try:
                return bytes([BYTE_ALPHABET[char] for char in piece])
            except KeyError:  # an added token, spelled as plain text
                return piece.encode()
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        return piece.encode()


def decoder_of(tokenizer: tokenizers.Tokenizer, source: str) -> PieceDecoder:
    """Read a tokenizer's decoder section.

    Args:
        source: what to name in an error.

    Raises:
        ModelFormatError: the decoder is of a kind that decoder-only models do not use.
    """
    if tokenizer.decoder is None:
        raise ModelFormatError(f"{source}: the tokenizer has no decoder, so its tokens cannot be turned into text")
    return _parse(json.loads(tokenizer.decoder.__getstate__()), source)


def _flatten(section: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if section.get("type") == "Sequence":
        for part in section["decoders"]:
            yield from _flatten(part)
    else:
        yield section


def _parse(section: dict[str, Any], source: str) -> PieceDecoder:
    replacements: list[tuple[str, str]] = []
    byte_fallback = bare_first = False
    strip_start = 0
    for part in _flatten(section):
        match part:
            case {"type": "ByteLevel"}:
                return PieceDecoder(byte_level=True)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                bare_first = part.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                strip_start += start
            case _:
                kind = part.get("type")
                raise ModelFormatError(
                    f"{source}: the tokenizer's decoder has a part {kind!r} that is not supported; "
                    "ByteLevel, Metaspace, Replace (of a string), ByteFallback, Fuse and Strip (at the start) are"
                )
    return PieceDecoder(
        replacements=tuple(replacements), byte_fallback=byte_fallback, strip_start=strip_start, bare_first=bare_first
    )
