"""Errors that reach a user. Each message answers what is wrong, why, and what to do.

Internal invariants are not errors of this kind: they fail loudly with ordinary Python exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AphroditeError(Exception):
    """Base of every error that is shown to a user as one clear line."""


class ConfigError(AphroditeError):
    """A setting (flag, environment variable, YAML key) is unknown, out of range or contradicts another."""


class ModelFormatError(AphroditeError):
    """A checkpoint, tokenizer or template is damaged, incomplete or not supported."""


class UnknownArchitectureError(ModelFormatError):
    """A checkpoint's architecture is none of the built-in families."""


class InvalidRequestError(AphroditeError):
    """A request field is wrong; the request was refused and had no effect.

    Attributes:
        param: path of the field in the request (`"messages[0].role"`), or None.
        code: OpenAI's machine-readable code (`"context_length_exceeded"`), or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(AphroditeError):
    """The waiting queue is at its limit.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(AphroditeError):
    """The engine process has ended or no longer answers."""


class RequestFailedError(AphroditeError):
    """One request failed inside the engine (for example non-finite logits); the others go on."""


def did_you_mean(word: str, known: Iterable[str], quote: str = "") -> str:
    """A sentence for the end of a message, with a leading blank: the known word closest to `word`; or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {quote}{close[0]}{quote}?" if close else ""
