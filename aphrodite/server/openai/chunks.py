"""Chunks of a stream as JSON. A plain piece of text, by far the most common, is three joined byte strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aphrodite.server.sse import event

_encode = msgspec.json.encode
_encode_text: Callable[[str], bytes] = msgspec.json.Encoder().encode


class ChunkWriter:
    """Writes the chunks of one response.

    Args:
        head: the keys that every chunk has: id, object, created, model.
        wrap: the keys of a choice that hold a piece of text: `{"text": …}` or `{"delta": {"content": …}}`; or whatever
            else `choice` is given for it.
        usage_key: every chunk has a `usage`, null but in the last.
        warnings: about the request; the first chunk brings them if there are any.
    """

    def __init__(
        self,
        head: dict[str, Any],
        wrap: Callable[[Any], dict[str, Any]],
        *,
        usage_key: bool,
        warnings: Sequence[str] = (),
    ) -> None:
        self._head = head
        self._wrap = wrap
        self._usage_key = usage_key
        self._warnings = warnings
        self._affixes: dict[int, tuple[bytes, bytes]] = {}

    def text(self, index: int, text: str) -> bytes:
        """The event of a piece of text and nothing else."""
        if self._warnings:
            return self.choice(index, text)
        affixes = self._affixes.get(index)
        if affixes is None:
            marker = "\x00text\x00"
            before, after = self.choice(index, marker).split(_encode_text(marker))
            affixes = self._affixes[index] = (before, after)
        return affixes[0] + _encode_text(text) + affixes[1]

    def choice(
        self,
        index: int,
        text: Any,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        usage: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        beside: dict[str, Any] | None = None,
    ) -> bytes:
        """The event of one choice with all it may have; `extra` goes into the choice, `beside` next to it."""
        choice = {"index": index, **self._wrap(text), "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice | extra if extra else choice], usage, beside)

    def usage(self, usage: dict[str, Any], beside: dict[str, Any] | None = None) -> bytes:
        """The event after the last choice's end."""
        return self._event([], usage, beside)

    def _event(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, beside: dict[str, Any] | None = None
    ) -> bytes:
        chunk = {**self._head, "choices": choices, **(beside or {})}
        if self._warnings:
            chunk["warnings"] = list(self._warnings)
            self._warnings = ()
        if self._usage_key:
            chunk["usage"] = usage
        return event(_encode(chunk))
