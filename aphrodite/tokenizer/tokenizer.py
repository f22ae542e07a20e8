"""Tokenizer: text to token ids and back, over the `tokenizers` library, with bounds and exact bytes per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import tokenizers

from aphrodite.errors import InvalidRequestError, ModelFormatError
from aphrodite.tokenizer.pieces import WORD_START, decoder_of

# Below this many characters a token of the limit, a text is tokenized without asking first whether it can fit.
_CHARS_PER_TOKEN_UNCHECKED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """What a checkpoint says about its special tokens and templates, apart from the vocabulary itself.

    Attributes:
        eos_ids: every token that ends an answer: end of sequence first, then end of turn and the like.
        templates: chat templates by name; the one without a name is `"default"`.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """A checkpoint's tokenizer. All methods may be called from several threads at once.

    Encoding runs outside the interpreter lock and in time that is linear in the text but for a logarithm
    (measured: 1 to 3 microseconds a character, also for one word of 4 million characters).
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, source: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._source = source
        self._templates = dict(special.templates)
        self._added = {token_id: token.content for token_id, token in added.items()}
        # A token with lstrip or rstrip swallows any amount of white space, so text length bounds nothing then.
        self._keeps_all_bytes = not any(token.lstrip or token.rstrip for token in added.values())
        self.pieces = decoder_of(backend, source)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = special.bos_id
        self.eos_token_ids = tuple(dict.fromkeys(special.eos_ids))
        self._check_ids()
        around = backend.encode("", add_special_tokens=True).ids
        self.adds_bos = self.bos_token_id is not None and around[:1] == [self.bos_token_id]
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        self._texts: dict[bool, list[str | None]] = {False: [None] * self.vocab_size, True: [None] * self.vocab_size}
        for token_id in self.special_ids:
            self._texts[True][token_id] = ""

    def _check_ids(self) -> None:
        named = [("bos", self.bos_token_id)] + [("eos", token_id) for token_id in self.eos_token_ids]
        for name, token_id in named:
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ModelFormatError(
                    f"{self._source}: the {name} token id {token_id} is outside the vocabulary of {self.vocab_size} "
                    "tokens; the tokenizer files do not belong together or are damaged"
                )

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token; `eos_token_ids` has the other tokens that end an answer too."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def bos_token(self) -> str | None:
        """The text of `bos_token_id`."""
        return None if self.bos_token_id is None else self.token_text(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        """The text of `eos_token_id`."""
        return None if self.eos_token_id is None else self.token_text(self.eos_token_id)

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default chat template (Jinja source), or None."""
        return self._templates.get("default")

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """All chat templates of the checkpoint by name, `"default"` among them."""
        return self._templates

    @cached_property
    def max_token_bytes(self) -> int:
        """Length in bytes of the longest token, special ones included."""
        return max((len(self.token_bytes(token_id)) for token_id in range(self.vocab_size)), default=1)

    def encode(
        self, text: str, *, add_special_tokens: bool, max_chars: int | None = None, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of a text; the text of special tokens in it becomes those tokens.

        Args:
            add_special_tokens: also add what the checkpoint puts around a text (usually bos).
            max_chars: refuse longer texts before doing any work.
            max_tokens: refuse texts of more tokens. A text that is longer than so many of the longest tokens is
                refused unread where the tokenizer keeps every byte, so that a huge text costs nothing.

        Raises:
            InvalidRequestError: a limit is exceeded, or the text has half of a surrogate pair.
        """
        return self.encode_batch(
            [text], add_special_tokens=add_special_tokens, max_chars=max_chars, max_tokens=max_tokens
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool,
        max_chars: int | None = None,
        max_tokens: int | None = None,
    ) -> list[list[int]]:
        """`encode` for several texts, in parallel; the limits are for each text."""
        for text in texts:
            self._check_length(text, max_chars, max_tokens)
        try:
            # The batch call releases the interpreter lock, `Tokenizer.encode` does not.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            raise InvalidRequestError(
                "The text is not valid Unicode: it has half of a surrogate pair (U+D800 to U+DFFF). Remove it."
            ) from None
        results = [encoding.ids for encoding in encodings]
        for ids in results:
            if max_tokens is not None and len(ids) > max_tokens:
                raise _too_many_tokens(str(len(ids)), max_tokens)
        return results

    def _check_length(self, text: str, max_chars: int | None, max_tokens: int | None) -> None:
        if max_chars is not None and len(text) > max_chars:
            raise InvalidRequestError(
                f"The text has {len(text):,} characters, more than the limit of {max_chars:,}. Shorten it."
            )
        if max_tokens is None or len(text) <= max_tokens * _CHARS_PER_TOKEN_UNCHECKED:
            return
        lossless = self.pieces.byte_level and self._keeps_all_bytes and self._backend.normalizer is None
        if lossless and len(text) > max_tokens * self.max_token_bytes:
            raise _too_many_tokens(f"at least {len(text) // self.max_token_bytes}", max_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, *, continuation: bool = False) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary add nothing.

        Equal to transformers' `decode` but for two of its defects: an added token that happens to be spelled in
        the byte alphabet keeps its text, and valid characters beside an invalid `<0xNN>` survive.

        Args:
            continuation: the tokens follow others, so a space at their start is part of the text.
        """
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        else:
            ids = list(ids)
        pieces = [self.token_bytes(token_id) for token_id in ids]
        if pieces and not continuation and self.pieces.bare_first:
            pieces[0] = self.first_token_bytes(ids[0])
        data = b"".join(pieces)
        if not continuation:
            for _ in range(self.pieces.strip_start):
                data = data.removeprefix(b" ")
        return data.decode("utf-8", self.pieces.errors)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to a text (special tokens: their text); none if there is no such token."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        data = self._bytes[token_id]
        if data is None:
            data = self._find_bytes(token_id)
            self._bytes[token_id] = data
        return data

    def _find_bytes(self, token_id: int) -> bytes:
        if (content := self._added.get(token_id)) is not None:
            return content.encode() if self.pieces.byte_level else self.pieces.to_bytes(content)
        piece = self._backend.id_to_token(token_id)
        return b"" if piece is None else self.pieces.to_bytes(piece)

    def first_token_bytes(self, token_id: int) -> bytes:
        """`token_bytes` of a token that opens the text where the first token loses its word start (Metaspace)."""
        piece = self._backend.id_to_token(token_id)
        return b"" if piece is None else self.pieces.to_bytes(piece.replace(WORD_START, ""))

    def token_text(self, token_id: int) -> str:
        """A token as text, for showing it alone; bytes that are only part of a character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", self.pieces.errors)

    def text_table(self, skip_special_tokens: bool) -> list[str | None]:
        """[vocab_size] Shared cache: the text of tokens that are whole characters; None: not known yet, or not so."""
        return self._texts[skip_special_tokens]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which is left out of answers by default."""
        return token_id in self.special_ids

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its string in the vocabulary, or None."""
        return self._backend.token_to_id(token)


def _too_many_tokens(count: str, limit: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"The text has {count} tokens, more than the {limit} that are allowed here. Shorten it.",
        code="context_length_exceeded",
    )
