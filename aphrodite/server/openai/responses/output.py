"""An answer as items: reasoning, messages and calls in their order, and the events that tell how they come about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aphrodite.chat.events import CallArguments, CallStart, Event, ReasoningPiece, TextPiece
from aphrodite.server.openai.responses.items import (
    FunctionCall,
    Item,
    Message,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
    new_id,
)

StreamEvent = dict[str, Any]
"""An event without its `sequence_number`, `type` first."""

Logprobs = Sequence[dict[str, Any]]
"""One entry a token, in a chat completion's form."""


class OutputBuilder:
    """Makes items of one answer's events.

    Log-probabilities are told of the text's tokens only. Those of tokens that brought nothing yet wait for the text
    that they belong to; those of reasoning, calls and the marks around them are left out.

    Args:
        call_id: makes the id by which the output of a call will name it.

    Attributes:
        items: what is complete.
    """

    def __init__(self, call_id: Callable[[], str]) -> None:
        self.items: list[Item] = []
        self._call_id = call_id
        self._open: _OpenText | _OpenCall | None = None
        self._waiting: list[dict[str, Any]] = []

    def feed(self, events: Sequence[Event], logprobs: Logprobs = ()) -> list[StreamEvent]:
        """Take what a piece of the answer brings, with the log-probabilities of all its tokens."""
        told: list[StreamEvent] = []
        fresh = list(logprobs)
        for event in events:
            match event:
                case TextPiece(text):
                    told += self._say(text, fresh)
                    fresh = []
                case ReasoningPiece(text):
                    told += self._think(text)
                case CallStart(_, name):
                    told += self._begin(_OpenCall(self._num_begun, self._call_id(), name))
                case CallArguments(_, text) if isinstance(self._open, _OpenCall):
                    told.append(self._open.add(text))
        silent = bool(events) and not isinstance(events[-1], TextPiece)
        self._waiting = [] if silent else [*self._waiting, *fresh]
        return told

    def finish(self, *, incomplete: bool) -> list[StreamEvent]:
        """Take the end of the answer; `incomplete`: it was cut off. An answer of nothing is an empty message."""
        told = [] if self._open is not None else self._begin(_OpenText(0, is_reasoning=False))
        return told + self._close("incomplete" if incomplete else "completed")

    @property
    def begun(self) -> bool:
        """Whether there is anything of the answer."""
        return self._num_begun > 0

    @property
    def _num_begun(self) -> int:
        return len(self.items) + (self._open is not None)

    def _say(self, text: str, fresh: list[dict[str, Any]]) -> list[StreamEvent]:
        told: list[StreamEvent] = []
        message = self._open
        if not isinstance(message, _OpenText) or message.is_reasoning:
            if message is not None:
                self._waiting = []  # of what stood between
            message = _OpenText(self._num_begun, is_reasoning=False)
            told += self._begin(message)
        told.append(message.add(text, [*self._waiting, *fresh]))
        self._waiting = []
        return told

    def _think(self, text: str) -> list[StreamEvent]:
        told: list[StreamEvent] = []
        thoughts = self._open
        if not isinstance(thoughts, _OpenText) or not thoughts.is_reasoning:
            thoughts = _OpenText(self._num_begun, is_reasoning=True)
            told += self._begin(thoughts)
        return [*told, thoughts.add(text, [])]

    def _begin(self, opened: _OpenText | _OpenCall) -> list[StreamEvent]:
        told = self._close("completed")
        self._open = opened
        return told + opened.opening()

    def _close(self, status: Status) -> list[StreamEvent]:
        if self._open is None:
            return []
        item, told = self._open.close(status)
        self.items.append(item)
        self._open = None
        return told


class _OpenText:
    """A message or a reasoning item that is being written; either has one part."""

    def __init__(self, index: int, *, is_reasoning: bool) -> None:
        self.is_reasoning = is_reasoning
        self._id = new_id("rs" if is_reasoning else "msg")
        self._kind = "response.reasoning_text" if is_reasoning else "response.output_text"
        self._index = index
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> list[StreamEvent]:
        part = {"type": "response.content_part.added", **self._place, "part": self._part("")}
        return [_item_event("added", self._index, self._item([], "in_progress")), part]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> StreamEvent:
        self._texts.append(text)
        self._logprobs += logprobs
        return {"type": f"{self._kind}.delta", **self._place, "delta": text, **self._beside(logprobs)}

    def close(self, status: Status) -> tuple[Item, list[StreamEvent]]:
        text = "".join(self._texts)
        part = self._part(text)
        item = self._item([part], status)
        return item, [
            {"type": f"{self._kind}.done", **self._place, "text": text, **self._beside(self._logprobs)},
            {"type": "response.content_part.done", **self._place, "part": part},
            _item_event("done", self._index, item),
        ]

    def _item(self, parts: list[Any], status: Status) -> Item:
        if self.is_reasoning:
            return ReasoningItem(self._id, [], parts, status)
        return Message(self._id, "assistant", parts, status)

    def _part(self, text: str) -> ReasoningText | OutputText:
        return ReasoningText(text) if self.is_reasoning else OutputText(text, logprobs=self._logprobs)

    def _beside(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {} if self.is_reasoning else {"logprobs": logprobs}


class _OpenCall:
    """A call that is being written."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self._id = new_id("fc")
        self._call_id = call_id
        self._name = name
        self._index = index
        self._place = {"item_id": self._id, "output_index": index}
        self._pieces: list[str] = []

    def opening(self) -> list[StreamEvent]:
        return [_item_event("added", self._index, self._item("", "in_progress"))]

    def add(self, text: str) -> StreamEvent:
        self._pieces.append(text)
        return {"type": "response.function_call_arguments.delta", **self._place, "delta": text}

    def close(self, status: Status) -> tuple[Item, list[StreamEvent]]:
        arguments = "".join(self._pieces)
        item = self._item(arguments, status)
        done = {"type": "response.function_call_arguments.done", **self._place, "arguments": arguments}
        # Older clients demand the name, too.
        return item, [{**done, "name": self._name}, _item_event("done", self._index, item)]

    def _item(self, arguments: str, status: Status) -> FunctionCall:
        return FunctionCall(self._id, self._call_id, self._name, arguments, status)


def _item_event(what: str, index: int, item: Item) -> StreamEvent:
    return {"type": f"response.output_item.{what}", "output_index": index, "item": item}
