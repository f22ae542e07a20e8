"""Log-probabilities in the shapes of the completions and the chat endpoint."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from aphrodite.core.plan import TokenLogprobs
from aphrodite.server.engine import ModelInfo
from aphrodite.server.errors import invalid
from aphrodite.tokenizer.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
# JSON has no infinity; OpenAI writes this for tokens that cannot be drawn.
_LEAST = -9999.0


def num_top_logprobs(wanted: int, model: ModelInfo) -> int:
    """`top_logprobs` of a request, checked.

    Raises:
        ApiError: 400: it is more than OpenAI's clients or the model may ask for.
    """
    limit = min(MAX_TOP_LOGPROBS, model.max_logprobs)
    if wanted > limit:
        raise invalid("top_logprobs", f"must be at most {limit}")
    return wanted


class TokenNames:
    """How tokens are written. A token that is no whole character is `bytes:\\xNN…`, so that names stay distinct."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


class TextOffsets:
    """Where each token starts in the returned text, in characters. Tokens of `silent` are not in the text."""

    def __init__(self, names: TokenNames, silent: frozenset[int], *, start: int = 0) -> None:
        self._names = names
        self._silent = silent
        self._position = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> int:
        """The start of the next token."""
        start = self._position
        if token_id not in self._silent:
            self._position += len(self._decoder.decode(self._names.data(token_id)))
        return start


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], names: TokenNames, offsets: TextOffsets, end: int
) -> dict[str, Any]:
    """The completions shape of some tokens; `end` is the text's length, beyond which no offset points.

    An entry is None for a prompt's first token, about which the model says nothing.
    """
    return {
        "tokens": [names.name(token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top_table(entry, names) for entry in entries],
        "text_offset": [min(offsets.push(token_id), end) for token_id in token_ids],
    }


def join_logprobs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: first[key] + second[key] for key in first}


def chat_logprobs(entries: Sequence[TokenLogprobs], names: TokenNames) -> dict[str, Any]:
    """The chat shape: each token with its bytes and its alternatives."""
    content = []
    for entry in entries:
        row = _chat_token(entry.token_id, entry.logprob, names)
        row["top_logprobs"] = [
            _chat_token(token_id, logprob, names)
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        content.append(row)
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], names: TokenNames) -> list[dict[str, Any] | None]:
    """Per prompt token: token id → logprob, rank (of the prompt's own token only) and text."""
    rows: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            rows.append(None)
            continue
        row = {
            str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.name(token_id)}
            for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)
        }
        row[str(entry.token_id)] = {
            "logprob": _finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": names.name(entry.token_id),
        }
        rows.append(row)
    return rows


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _top_table(entry: TokenLogprobs, names: TokenNames) -> dict[str, float]:
    table = {
        names.name(token_id): _finite(logprob)
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    }
    table[names.name(entry.token_id)] = _finite(entry.logprob)
    return table


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.name(token_id), "logprob": _finite(logprob), "bytes": list(names.data(token_id))}
