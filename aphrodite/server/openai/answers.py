"""Chat answers taken apart: what of a model's text is reasoning, what calls tools, and what the user is told."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from aphrodite.chat.answer import AnswerFormat
from aphrodite.chat.events import CallArguments, CallStart, Event, ParsedAnswer, ReasoningPiece, TextPiece
from aphrodite.outputs import CompletionOutput
from aphrodite.server.openai.finish import openai_finish_reason
from aphrodite.server.openai.tools import ToolUse
from aphrodite.tokenizer.detokenizer import IncrementalDetokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer


class AnswerReader:
    """Reads the answers of one request, each in its pieces or at once.

    The engine has to show special tokens in the text, for some of them are marks; those that are not are taken out
    here, unless the request wants them.

    Args:
        tools: what the request says of tools.
        show_special: special tokens stay in the text.
        include_reasoning: reasoning is told; else it is left out.

    Attributes:
        short_ids: ids of calls have the form that Mistral's templates demand when they come back.
    """

    def __init__(
        self,
        answers: AnswerFormat,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        *,
        tools: ToolUse,
        show_special: bool,
        include_reasoning: bool,
    ) -> None:
        self._tools = tools
        self.short_ids = answers.tool_format == "mistral"
        self._format = answers
        self._tokenizer = tokenizer
        self._prompt_token_ids = prompt_token_ids
        self._include_reasoning = include_reasoning
        self._hidden = {} if show_special else _hidden_tokens(tokenizer, answers.marks)
        self._open: dict[int, _OpenAnswer] = {}

    def read(self, answer: CompletionOutput) -> list[Event]:
        """What a piece of an answer brings, with the answer's end all that was held back."""
        state = self._open.get(answer.index)
        if state is None:
            state = self._open[answer.index] = _OpenAnswer(self._format)
        state.token_ids += answer.token_ids
        events = state.parser.feed(self._without_hidden(answer.text, answer.token_ids))
        if answer.finish_reason is not None:
            events += state.parser.finish()
        if not self._include_reasoning:
            events = [event for event in events if not isinstance(event, ReasoningPiece)]
        if not self._tools.parallel:
            events = [event for event in events if not isinstance(event, CallStart | CallArguments) or not event.number]
        state.called = state.called or any(isinstance(event, CallStart) for event in events)
        return _joined(events)

    def finish_reason(self, answer: CompletionOutput) -> str | None:
        """`finish_reason` of an answer that was read as far."""
        reason = openai_finish_reason(answer)
        if reason != "stop" or not self._open[answer.index].called:
            return reason
        return "function_call" if self._tools.legacy else "tool_calls"

    def message(self, answer: CompletionOutput) -> dict[str, Any]:
        """A whole answer as a message."""
        parsed = ParsedAnswer.of(self.read(answer))
        content = parsed.text or (None if parsed.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if parsed.reasoning:
            message |= {"reasoning_content": parsed.reasoning, "reasoning": parsed.reasoning}
        functions = [{"name": call.name, "arguments": call.arguments} for call in parsed.calls]
        if functions and self._tools.legacy:
            message["function_call"] = functions[0]
        elif functions:
            message["tool_calls"] = [
                {"id": self.call_id(), "type": "function", "function": function} for function in functions
            ]
        return message

    def delta(self, event: Event) -> dict[str, Any]:
        """An event as the delta of a chunk."""
        match event:
            case TextPiece(text):
                return {"content": text}
            case ReasoningPiece(text):
                return {"reasoning_content": text, "reasoning": text}
            case CallStart(number, name):
                function = {"name": name, "arguments": ""}
                call = {"index": number, "id": self.call_id(), "type": "function", "function": function}
            case CallArguments(number, text):
                function = {"arguments": text}
                call = {"index": number, "function": function}
        return {"function_call": function} if self._tools.legacy else {"tool_calls": [call]}

    def call_id(self) -> str:
        """A call's id; Mistral's templates demand nine letters and digits when it comes back."""
        return uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"

    def usage_details(self) -> dict[str, Any]:
        """`completion_tokens_details` of all answers."""
        count = sum(map(self._reasoning_tokens, self._open.values()))
        return {"completion_tokens_details": {"reasoning_tokens": count}}

    def _reasoning_tokens(self, state: _OpenAnswer) -> int:
        """How many of an answer's tokens hold its reasoning and the marks around it."""
        wanted = state.parser.reasoning_chars
        if not wanted:
            return 0
        detokenizer = IncrementalDetokenizer(self._tokenizer, self._prompt_token_ids, skip_special_tokens=False)
        seen = 0
        for count, token_id in enumerate(state.token_ids, 1):
            text = detokenizer.push(token_id)
            seen += 0 if token_id in self._hidden else len(text)
            if seen >= wanted:
                return count
        return len(state.token_ids)

    def _without_hidden(self, text: str, token_ids: Sequence[int]) -> str:
        """`text` without the special tokens among `token_ids` that are no marks, in their order."""
        if self._hidden.keys().isdisjoint(token_ids):
            return text
        kept, position = [], 0
        for token_id in token_ids:
            found = text.find(self._hidden[token_id], position) if token_id in self._hidden else -1
            if found >= 0:
                kept.append(text[position:found])
                position = found + len(self._hidden[token_id])
        return "".join((*kept, text[position:]))


class _OpenAnswer:
    """One answer that is being read."""

    def __init__(self, answers: AnswerFormat) -> None:
        self.parser = answers.parser()
        self.token_ids: list[int] = []
        self.called = False


# Found once a format; a model's tokenizer goes when the model is unloaded.
_hidden: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], dict[int, str]]] = WeakKeyDictionary()


def _hidden_tokens(tokenizer: Tokenizer, marks: tuple[str, ...]) -> dict[int, str]:
    """Special tokens that are part of no mark, with their texts."""
    known = _hidden.setdefault(tokenizer, {})
    if marks not in known:
        shown = "\n".join(marks)
        texts = {token_id: tokenizer.token_text(token_id) for token_id in tokenizer.special_ids}
        known[marks] = {token_id: text for token_id, text in texts.items() if text and text not in shown}
    return known[marks]


def _joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbours of one kind as one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            joined[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, ReasoningPiece) and isinstance(last, ReasoningPiece):
            joined[-1] = ReasoningPiece(last.text + event.text)
        else:
            joined.append(event)
    return joined
