"""Where a terminal command's text comes from: an engine in this process, or a running server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError

if TYPE_CHECKING:
    from aphrodite.llm import LLM
    from aphrodite.outputs import RequestOutput
    from aphrodite.sampling.params import SamplingParams

Message = dict[str, str]  # role, content


class Piece(NamedTuple):
    """The next piece of an answer."""

    text: str
    num_tokens: int
    finish_reason: str | None = None


class TextSource(Protocol):
    """Streams answers. Closing a stream early ends the request."""

    interruptible: bool  # a KeyboardInterrupt may be raised anywhere inside a stream

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds where a person names no value."""

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Piece]: ...

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]: ...

    def close(self) -> None: ...


def load_llm(config: EngineConfig) -> LLM:
    """The offline engine with these settings."""
    from aphrodite.llm import LLM

    settings = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name != "model"}
    return LLM(config.model, **settings)


class EngineSource:
    """An engine in this process. It must not be interrupted inside a step, only between pieces."""

    interruptible = False

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @property
    def sampling_defaults(self) -> SamplingParams:
        return self._llm.sampling_defaults

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Piece]:
        return self._pieces(self._llm.stream(list(messages), params))

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]:
        return self._pieces(self._llm.stream(prompt, params))

    def _pieces(self, stream: Iterator[RequestOutput]) -> Iterator[Piece]:
        try:
            for output in stream:
                for answer in output.outputs:
                    if answer.error:
                        raise AphroditeError(answer.error)
                    yield Piece(answer.text, len(answer.token_ids), answer.finish_reason)
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    def close(self) -> None:
        self._llm.close()


def printable(text: str) -> str:
    """`text` without control characters but newline and tab: a model must not steer the terminal."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160)
    )


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Speed of an answer; nan where it is too short to tell."""
    return tokens / seconds if seconds > 0 and tokens > 1 else math.nan
