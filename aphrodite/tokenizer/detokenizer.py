"""Text from a stream of token ids, each piece as soon as it is certain."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence

from aphrodite.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text, one at a time and in constant time each.

    All pushes and the flush together are `tokenizer.decode` of the answer as the continuation of its prompt: the
    space that SentencePiece drops at the start of a text is dropped only where the prompt has no text. A
    character that is spread over several tokens is held back until it is complete or cannot become so.

    Args:
        prompt_token_ids: the prompt; only looked at up to its first token that has text.

    Attributes:
        pending: the bytes that are held back.
    """

    __slots__ = ("_at_start", "_errors", "_skip", "_strip", "_texts", "_tokenizer", "pending")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Iterable[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = tokenizer.text_table(skip_special_tokens)
        self._errors = tokenizer.pieces.errors
        self._skip: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self.pending = b""
        self._strip = tokenizer.pieces.strip_start
        # False once nothing special can happen any more at the start of the text, which is nearly always at once.
        self._at_start = (self._strip > 0 or tokenizer.pieces.bare_first) and not self._has_text(prompt_token_ids)

    def _has_text(self, token_ids: Iterable[int]) -> bool:
        return any(i not in self._skip and self._tokenizer.token_bytes(i) for i in token_ids)

    def save(self) -> tuple[bytes, int, bool]:
        """What is remembered of the tokens so far, for `restore`."""
        return self.pending, self._strip, self._at_start

    def restore(self, state: tuple[bytes, int, bool]) -> None:
        self.pending, self._strip, self._at_start = state

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often the token's own text, sometimes none."""
        try:
            text = self._texts[token_id]
        except IndexError:  # rows that pad the model's output matrix have no text
            return ""
        if text is not None and not self.pending and not self._at_start:
            return text
        return self._push_slowly(token_id)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens, one after the other."""
        return "".join(map(self.push, token_ids))

    def _push_slowly(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        alone = not self.pending and not self._at_start
        data = self._start_bytes(token_id) if self._at_start else self._tokenizer.token_bytes(token_id)
        data = self.pending + data
        text, used = utf_8_decode(data, self._errors, False)
        self.pending = data[used:]
        if alone and not self.pending and "\ufffd" not in text:
            self._texts[token_id] = text
        return text

    def _start_bytes(self, token_id: int) -> bytes:
        """Bytes of a token while the text has not begun; ends the start when text is there."""
        if self._tokenizer.pieces.bare_first:
            self._at_start = False
            return self._tokenizer.first_token_bytes(token_id)
        data = self._tokenizer.token_bytes(token_id)
        while self._strip and data.startswith(b" "):
            data = data[1:]
            self._strip -= 1
        self._at_start = bool(self._strip) and not data
        return data

    def flush(self) -> str:
        """What was held back, at the end of the answer: U+FFFD for a character that was cut."""
        text = utf_8_decode(self.pending, self._errors, True)[0]
        self.pending = b""
        return text
