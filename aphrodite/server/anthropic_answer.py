"""One message of Anthropic's: its content blocks and its events."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from aphrodite.chat.events import CallArguments, CallStart, Event, ReasoningPiece, TextPiece, ToolCall
from aphrodite.outputs import CompletionOutput
from aphrodite.server.anthropic_reading import signature_of
from aphrodite.server.body import off_loop
from aphrodite.server.context import ModelContext
from aphrodite.server.generation import Generation, UsageCounter, collect, stream_pieces
from aphrodite.server.openai.answers import AnswerReader
from aphrodite.server.sse import EventStream, named_event

INVALID_JSON: Final = "INVALID_JSON"  # Anthropic's name for arguments that are none


class ContentBlocks:
    """The blocks of one message as an answer's pieces come.

    Args:
        new_id: of a tool's call.
        shown: what the model thinks is told; else its blocks have their signatures alone.

    Attributes:
        blocks: those that are complete.
    """

    def __init__(self, new_id: Callable[[], str], *, shown: bool) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._new_id = new_id
        self._shown = shown
        self._open: _Block | None = None

    def feed(self, pieces: Iterable[Event]) -> bytes:
        """The events of an answer's pieces."""
        return b"".join(map(self._take, pieces))

    def finish(self) -> bytes:
        """The events of the answer's end. A message without a block has an empty text: clients look for one."""
        data = self._close()
        return data if self.blocks else self._begin(_Block("text")) + self._close()

    def _take(self, piece: Event) -> bytes:
        match piece:
            case TextPiece(text):
                return self._write("text", text, {"type": "text_delta", "text": text})
            case ReasoningPiece(text):
                told = {"type": "thinking_delta", "thinking": text} if self._shown else None
                return self._write("thinking", text, told)
            case CallStart(_, name):
                return self._close() + self._begin(_Block("tool_use", self._new_id(), name))
            case CallArguments(_, text):
                return self._write("tool_use", text, {"type": "input_json_delta", "partial_json": text})

    def _write(self, kind: Literal["text", "thinking", "tool_use"], text: str, delta: dict[str, Any] | None) -> bytes:
        data = b""
        if self._open is None or self._open.kind != kind:
            data = self._close() + self._begin(_Block(kind))
        if self._open is not None:
            self._open.texts.append(text)
        return data + (b"" if delta is None else self._delta(delta))

    def _begin(self, block: _Block) -> bytes:
        self._open = block
        return event("content_block_start", index=len(self.blocks), content_block=block.opening())

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=len(self.blocks), delta=delta)

    def _close(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        whole, data = block.whole(shown=self._shown), b""
        if block.kind == "thinking":
            data = self._delta({"type": "signature_delta", "signature": whole["signature"]})
        data += event("content_block_stop", index=len(self.blocks))
        self.blocks.append(whole)
        return data


@dataclass(slots=True)
class _Block:
    """A block that is being written."""

    kind: Literal["text", "thinking", "tool_use"]
    id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)

    def opening(self) -> dict[str, Any]:
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}

    def whole(self, *, shown: bool) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.kind == "tool_use":
            arguments = ToolCall(self.name, text).arguments_object()
            return self.opening() | {"input": {INVALID_JSON: text} if arguments is None else arguments}
        if self.kind == "thinking":
            signature = signature_of(text, carried=not shown)
            return {"type": "thinking", "thinking": text if shown else "", "signature": signature}
        return {"type": "text", "text": text}


@dataclass(slots=True)
class Answer:
    """One message, streamed or whole.

    Attributes:
        reader: takes the answer apart; None: it is text.
        stops: the request's own stop sequences.
        shown: what the model thinks is told.
        warnings: about the request.
    """

    context: ModelContext
    generation: Generation
    reader: AnswerReader | None
    stops: list[str]
    shown: bool
    warnings: list[str]
    content: ContentBlocks = field(init=False)
    counter: UsageCounter = field(init=False)

    def __post_init__(self) -> None:
        self.content = ContentBlocks(self._call_id, shown=self.shown)
        self.counter = UsageCounter(self.generation.prompts)

    async def whole(self) -> bytes:
        """The response's body."""
        (output,), self.counter = await collect(self.context, self.generation)
        (answer,) = output.outputs
        return await off_loop(self.generation.body_bytes(answer.num_tokens), lambda: self._body(answer))

    def _body(self, answer: CompletionOutput) -> bytes:
        self.content.feed(self._read(answer))
        self.content.finish()
        message = self._message(self.content.blocks) | self._ending(answer)
        warnings = [*self.warnings, *answer.warnings]
        return msgspec.json.encode(message | {"warnings": warnings} if warnings else message)

    async def stream(self, events: EventStream) -> None:
        """Write the message's events."""
        opened = False
        pieces = stream_pieces(self.context, self.generation)
        async with aclosing(pieces):
            async for number, output in pieces:
                self.counter.observe(number, output)
                (answer,) = output.outputs
                data = b"" if opened else self._opening()
                opened = True
                data += self.content.feed(self._read(answer))
                if answer.finish_reason is not None:
                    data += self.content.finish() + self._closing(answer)
                if data:
                    await events.write(data)

    def _read(self, answer: CompletionOutput) -> list[Event]:
        if self.reader is not None:
            return self.reader.read(answer)
        return [TextPiece(answer.text)] if answer.text else []

    def _opening(self) -> bytes:
        extra = {"warnings": self.warnings} if self.warnings else {}
        return event("message_start", message=self._message([]) | {"stop_reason": None, "stop_sequence": None} | extra)

    def _closing(self, answer: CompletionOutput) -> bytes:
        extra = {"warnings": answer.warnings} if answer.warnings else {}
        ending = event("message_delta", delta=self._ending(answer), usage=self._usage(), **extra)
        return ending + event("message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.generation.response_id.replace("msg-", "msg_", 1),
            "type": "message",
            "role": "assistant",
            "model": self.generation.model,
            "content": content,
            "usage": self._usage(),
        }

    def _ending(self, answer: CompletionOutput) -> dict[str, Any]:
        """Why it ended. A stop of the template's own is the end of the turn."""
        named = isinstance(answer.stop_reason, str) and answer.stop_reason in self.stops
        called = any(block["type"] == "tool_use" for block in self.content.blocks)
        if answer.finish_reason == "length":
            reason = "max_tokens"
        else:
            reason = "stop_sequence" if named else "tool_use" if called else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stop_reason if named else None}

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what the cache brought apart from the rest of the prompt."""
        usage = self.counter.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        thought = 0
        if self.reader is not None:
            thought = self.reader.usage_details()["completion_tokens_details"]["reasoning_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
            **({"output_tokens_details": {"thinking_tokens": thought}} if thought else {}),
        }

    def _call_id(self) -> str:
        """In Anthropic's form, unless the model's template demands another of what comes back."""
        if self.reader is not None and self.reader.short_ids:
            return self.reader.call_id()
        return f"toolu_{uuid.uuid4().hex[:24]}"


def event(name: str, **content: Any) -> bytes:
    """An event on the wire."""
    return named_event(name, msgspec.json.encode({"type": name, **content}))
