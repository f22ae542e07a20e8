"""Where a terminal command's text comes from: an engine in this process, or a running server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError

if TYPE_CHECKING:
    from aphrodite.chat.answer import AnswerFormat
    from aphrodite.llm import LLM
    from aphrodite.outputs import CompletionOutput, RequestOutput
    from aphrodite.sampling.params import SamplingParams

Message = dict[str, str]  # role, content


class Piece(NamedTuple):
    """The next piece of an answer, or of what the model thinks before it (`thought`)."""

    text: str
    num_tokens: int
    finish_reason: str | None = None
    thought: bool = False


class TextSource(Protocol):
    """Streams answers. Closing a stream early ends the request."""

    interruptible: bool  # a KeyboardInterrupt may be raised anywhere inside a stream

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds where a person names no value."""

    def chat(self, messages: Sequence[Message], params: SamplingParams, *, continues: bool = False) -> Iterator[Piece]:
        """Answer a conversation, or go on with the answer that is its last message (`continues`)."""

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]: ...

    def close(self) -> None: ...


def load_llm(config: EngineConfig) -> LLM:
    """The offline engine with these settings, its log on standard error."""
    from aphrodite.llm import LLM
    from aphrodite.logs import configure_logging

    configure_logging(config.log_level)
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

    def chat(self, messages: Sequence[Message], params: SamplingParams, *, continues: bool = False) -> Iterator[Piece]:
        answers = self._format(messages, continues)
        if answers.plain:
            return self._pieces(self._llm.stream(list(messages), params, continue_final_message=continues))
        shown = msgspec.structs.replace(params, skip_special_tokens=False)  # some are marks
        stream = self._llm.stream(list(messages), shown, continue_final_message=continues)
        return self._read_pieces(stream, answers, show_special=not params.skip_special_tokens)

    def _format(self, messages: Sequence[Message], continues: bool) -> AnswerFormat:
        """How the answer marks reasoning."""
        from aphrodite.chat.answer import reasoning_format

        template = self._llm.chat_template
        prompt = template.render(messages, continue_final_message=continues)
        return reasoning_format(template.traits.reasoning, prompt, begun=messages[-1]["content"] if continues else None)

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]:
        return self._pieces(self._llm.stream(prompt, params))

    def _pieces(self, stream: Iterator[RequestOutput]) -> Iterator[Piece]:
        for answer in _answers(stream):
            yield Piece(answer.text, len(answer.token_ids), answer.finish_reason)

    def _read_pieces(
        self, stream: Iterator[RequestOutput], answers: AnswerFormat, *, show_special: bool
    ) -> Iterator[Piece]:
        """The pieces of an answer that may have reasoning, without its marks."""
        from aphrodite.chat.events import ReasoningPiece, TextPiece
        from aphrodite.server.openai.answers import AnswerReader
        from aphrodite.server.openai.tools import ToolUse

        reader = AnswerReader(
            answers, self._llm.tokenizer, [], tools=ToolUse(), show_special=show_special, include_reasoning=True
        )
        for answer in _answers(stream):
            tokens = len(answer.token_ids)  # counted with the first of what they bring
            for event in reader.read(answer):
                if isinstance(event, TextPiece | ReasoningPiece):
                    yield Piece(event.text, tokens, thought=isinstance(event, ReasoningPiece))
                    tokens = 0
            yield Piece("", tokens, answer.finish_reason)

    def close(self) -> None:
        self._llm.close()


def _answers(stream: Iterator[RequestOutput]) -> Iterator[CompletionOutput]:
    """What an answer brings step by step.

    Raises:
        AphroditeError: the answer failed.
    """
    try:
        for output in stream:
            for answer in output.outputs:
                if answer.error:
                    raise AphroditeError(answer.error)
                yield answer
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


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
