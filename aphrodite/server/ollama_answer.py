"""One answer of Ollama's, as lines or whole: its text, what the model thinks, and its calls of tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aphrodite.chat.events import CallArguments, CallStart, Event, ReasoningPiece, TextPiece, ToolCall
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.server.context import ModelContext
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.ollama_format import line, timestamp
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.sse import EventStream

Part = Mapping[str, Any]
"""Some of `content`, `thinking` and `tool_calls`."""


@dataclass(slots=True)
class Answer:
    """One answer, streamed or whole.

    Attributes:
        reader: takes the answer apart; None: it is text.
        told: puts a part of it where the endpoint's clients look for it.
        tells_context: the last line has the token ids of prompt and answer.
    """

    context: ModelContext
    generation: Generation
    reader: AnswerReader | None
    told: Callable[[Part], dict[str, Any]]
    tells_context: bool = False
    began: float = field(default_factory=time.perf_counter)
    call: ToolCall | None = None  # that is being written: clients take calls whole
    num_calls: int = 0

    async def whole(self) -> bytes:
        """The response's body."""
        (output,), counter = await collect(self.context, self.generation)
        (answer,) = output.outputs
        parts = self._parts(self._read(answer), ended=True)
        return msgspec.json.encode(self._end(answer, _joined(parts), answer.token_ids, counter))

    async def stream(self, events: EventStream) -> None:
        """Write the answer's lines."""
        token_ids: list[int] = []
        counter = UsageCounter(self.generation.prompts)
        pieces = stream_pieces(self.context, self.generation)
        async with aclosing(pieces):
            async for number, output in pieces:
                counter.observe(number, output)
                if data := self._lines(output, token_ids, counter):
                    await events.write(data)

    def _lines(self, output: RequestOutput, token_ids: list[int], counter: UsageCounter) -> bytes:
        (answer,) = output.outputs
        token_ids += answer.token_ids
        ended = answer.finish_reason is not None
        parts = self._parts(self._read(answer), ended=ended)
        data = b"".join(line({**self._head(), **self.told(part), "done": False}) for part in parts)
        return data + line(self._end(answer, {}, token_ids, counter)) if ended else data

    def _read(self, answer: CompletionOutput) -> list[Event]:
        if self.reader is not None:
            return self.reader.read(answer)
        return [TextPiece(answer.text)] if answer.text else []

    def _parts(self, pieces: Iterable[Event], *, ended: bool) -> list[dict[str, Any]]:
        """What is certain, a key each: content, thinking or tool_calls."""
        parts: list[dict[str, Any]] = []
        for piece in pieces:
            if not isinstance(piece, CallArguments):
                parts += self._close()
            match piece:
                case TextPiece(text):
                    parts.append({"content": text})
                case ReasoningPiece(text):
                    parts.append({"thinking": text})
                case CallStart(_, name):
                    self.call = ToolCall(name)
                case CallArguments(_, text):
                    if self.call is not None:
                        self.call.arguments += text
        return parts + (self._close() if ended else [])

    def _close(self) -> list[dict[str, Any]]:
        """The call that was being written; arguments that are no object, as of a call that was cut off, are text."""
        call, self.call = self.call, None
        if call is None:
            return []
        arguments = call.arguments_object()
        if arguments is None:
            return [{"content": f"{call.name} {call.arguments}"}]
        function = {"index": self.num_calls, "name": call.name, "arguments": arguments}
        self.num_calls += 1
        told = {"function": function} if self.reader is None else {"id": self.reader.call_id(), "function": function}
        return [{"tool_calls": [told]}]

    def _head(self) -> dict[str, Any]:
        return {"model": self.generation.model, "created_at": timestamp()}

    def _end(self, answer: CompletionOutput, part: Part, token_ids: list[int], counter: UsageCounter) -> dict[str, Any]:
        timings = counter.timings()
        (prompt,) = self.generation.prompts
        extra = {"context": [*prompt, *token_ids]} if self.tells_context else {}
        return {
            **self._head(),
            **self.told(part),
            "done": True,
            "done_reason": "length" if answer.finish_reason == "length" else "stop",
            **extra,
            "total_duration": _nanoseconds(time.perf_counter() - self.began),
            "load_duration": 0,
            "prompt_eval_count": len(prompt),
            "prompt_eval_duration": _nanoseconds(timings["prompt_ms"] / 1e3),
            "eval_count": answer.num_tokens,
            "eval_duration": _nanoseconds(timings["predicted_ms"] / 1e3),
        }


def told_as_message(part: Part) -> dict[str, Any]:
    """As `/api/chat` has it."""
    return {"message": {"role": "assistant", "content": "", **part}}


def told_as_response(part: Part) -> dict[str, Any]:
    """As `/api/generate` has it, where there are no calls."""
    thinking = {"thinking": part["thinking"]} if "thinking" in part else {}
    return {"response": part.get("content", ""), **thinking}


def _joined(parts: Iterable[Part]) -> dict[str, Any]:
    """All parts as one."""
    joined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            joined[key] = joined[key] + value if key in joined else value
    return joined


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
