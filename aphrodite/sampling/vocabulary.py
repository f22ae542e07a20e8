"""What stages may know of the tokenizer: the bytes of every token, and how a text is cut into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from aphrodite.sampling.grammar import GrammarCompiler


class TokenizerLike(Protocol):
    """The part of `tokenizer.Tokenizer` that is used here."""

    special_ids: frozenset[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text; empty if there is no such token."""


class TokenTexts(NamedTuple):
    """The bytes of all tokens, one after the other: token i's are `data[starts[i] : starts[i + 1]]`."""

    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]  # [size + 1]
    tokens: npt.NDArray[np.int32]  # whose byte each of `data` is


class Vocabulary:
    """The model's vocabulary; what is computed from it is kept, for it never changes.

    Args:
        size: number of logits; the tokenizer may know more or fewer tokens.
    """

    def __init__(self, size: int, tokenizer: TokenizerLike) -> None:
        self.size = size
        self.special_ids = frozenset(token for token in tokenizer.special_ids if token < size)
        self._tokenizer = tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    @cached_property
    def texts(self) -> TokenTexts:
        texts = [self._tokenizer.token_bytes(token_id) for token_id in range(self.size)]
        lengths = [len(text) for text in texts]
        starts = np.zeros(self.size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        tokens = np.repeat(np.arange(self.size, dtype=np.int32), lengths)
        return TokenTexts(np.frombuffer(b"".join(texts), np.uint8), starts, tokens)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Grammars over these tokens."""
        return GrammarCompiler(self)

    @cached_property
    def newline_ids(self) -> frozenset[int]:
        """Tokens that hold a newline."""
        data, starts, _ = self.texts
        return frozenset((np.searchsorted(starts, np.flatnonzero(data == 0x0A), side="right") - 1).tolist())

    def encode_inside(self, text: bytes) -> list[int]:
        """Tokens of `text` where it stands in the middle of a text; empty if it cannot be made of tokens.

        It may begin inside a character. A tokenizer that puts a space before every text is led to leave it out.
        """
        inside = 0
        while inside < len(text) and text[inside] & 0xC0 == 0x80:
            inside += 1
        ids = _longest_first(text[:inside], self._inner_tokens, inside) if inside else []
        if ids is None:
            return []
        rest = text[inside:]
        if not rest:
            return ids
        for lead in ("", "\n"):
            tokens = self._tokenizer.encode(lead + rest.decode("utf-8", "replace"), add_special_tokens=False)
            suffix = _suffix_spelling(tokens, rest, self._tokenizer.token_bytes)
            if suffix is not None:
                return ids + suffix
        return []

    def spell(self, text: bytes) -> list[int]:
        """Tokens of `text`, each as long as it can be; empty if there are none for a part of it."""
        return _longest_first(text, self._tokens_by_text, self._longest) or []

    @cached_property
    def _tokens_by_text(self) -> dict[bytes, int]:
        plain = (token_id for token_id in reversed(range(self.size)) if token_id not in self.special_ids)
        return {self.token_bytes(token_id): token_id for token_id in plain if self.token_bytes(token_id)}

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self._tokens_by_text), default=0)

    @cached_property
    def _inner_tokens(self) -> dict[bytes, int]:
        """Tokens that begin inside a character, by their bytes."""
        data, starts, _ = self.texts
        tokens = np.flatnonzero(np.diff(starts) > 0)
        inner = tokens[data[starts[tokens]] & 0xC0 == 0x80]
        return {self.token_bytes(token): token for token in reversed(inner.tolist())}


def _longest_first(text: bytes, tokens: Mapping[bytes, int], longest: int) -> list[int] | None:
    """`text` made of `tokens` of at most `longest` bytes, each as long as it can be; None if it cannot go on so."""
    ids: list[int] = []
    done = 0
    while done < len(text):
        ends = range(min(len(text), done + longest), done, -1)
        end = next((end for end in ends if text[done:end] in tokens), None)
        if end is None:
            return None
        ids.append(tokens[text[done:end]])
        done = end
    return ids


def _suffix_spelling(tokens: Sequence[int], text: bytes, token_bytes: Callable[[int], bytes]) -> list[int] | None:
    """The last of `tokens` that together are exactly `text`, or None."""
    length = 0
    for first in range(len(tokens) - 1, -1, -1):
        length += len(token_bytes(tokens[first]))
        if length >= len(text):
            found = list(tokens[first:])
            return found if b"".join(map(token_bytes, found)) == text else None
    return None
