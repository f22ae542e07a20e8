"""Harmony, the format of gpt-oss: an answer is several messages, each with a channel and perhaps a recipient.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{…}<|call|>

The channel `analysis` is reasoning, `final` the answer's text; `commentary` is text for the user as well, unless it
goes to a function. Source: OpenAI's description of the format (https://github.com/openai/harmony).
"""

from __future__ import annotations

import re
from typing import Final, Literal

from aphrodite.chat.events import CallArguments, CallStart, Event, ReasoningPiece, TextPiece, held_suffix

MARKS: Final = (
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
# What ends a message for good: the next one is the answer's text.
FINAL_OPENING: Final = "<|end|><|start|>assistant<|channel|>final<|message|>"
_HEADER_END: Final = "<|message|>"
_BODY_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_BODY_END: Final = re.compile("|".join(map(re.escape, _BODY_ENDS)))
_RECIPIENT: Final = re.compile(r"to=([^\s<]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*([a-z]+)")
_FUNCTIONS: Final = "functions."
_OPENINGS: Final = ("<|channel|>", "<|start|>", " to=", "to=")
_Kind = Literal["text", "reasoning", "call"]


class HarmonyParser:
    """Parses the answer to a prompt that ends with `<|start|>assistant`, or inside a message.

    Args:
        calls: messages to functions are calls; else they are text.
        inside: the kind of message that the prompt ends in; None: its header is to come.
    """

    def __init__(self, *, calls: bool, inside: Literal["text", "reasoning"] | None = None) -> None:
        self._calls = calls
        self._kind: _Kind = inside or "text"
        self._phase: Literal["start", "header", "body"] = "start" if inside is None else "body"
        self._buffer = ""
        self._taken = 0
        self._num_calls = 0
        self._spoken: set[_Kind] = set()  # kinds that have text already
        self._opening = False  # the message has had no text yet
        self._reasoned = 0  # characters up to the end of the last message of reasoning

    @property
    def reasoning_chars(self) -> int:
        thinking = self._phase == "body" and self._kind == "reasoning"
        return self._taken if thinking else self._reasoned

    def feed(self, text: str) -> list[Event]:
        self._taken += len(text)
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        rest, self._buffer = self._buffer, ""
        if self._phase == "body":
            self._emit(rest, events)
            self._close(events)
        elif rest.strip() and not (self._phase == "header" and rest.startswith(MARKS)):  # a header that was cut off
            events.append(TextPiece(rest))
        return events

    def _step(self, events: list[Event]) -> bool:
        """Go on as far as the next change of phase; False when more text is needed."""
        if self._phase == "body":
            return self._body(events)
        if self._phase == "start":
            if not any(self._buffer.startswith(opening) for opening in _OPENINGS):
                if any(opening.startswith(self._buffer) for opening in _OPENINGS):
                    return False
                self._phase, self._kind, self._opening = "body", "text", True  # an answer without a header
                return True
            self._phase = "header"
        header, mark, rest = self._buffer.partition(_HEADER_END)
        if not mark:
            return False
        self._buffer = rest
        self._open(header, events)
        return True

    def _open(self, header: str, events: list[Event]) -> None:
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        to = recipient.group(1) if recipient else ""
        if self._calls and to.startswith(_FUNCTIONS) and len(to) > len(_FUNCTIONS):
            self._kind = "call"
            events.append(CallStart(self._num_calls, to[len(_FUNCTIONS) :]))
            self._num_calls += 1
        elif channel is not None and channel.group(1) == "analysis":
            self._kind = "reasoning"
        else:
            self._kind = "text"
        self._phase, self._opening = "body", True

    def _body(self, events: list[Event]) -> bool:
        end = _BODY_END.search(self._buffer)
        if end is None:
            certain = len(self._buffer) - held_suffix(self._buffer, _BODY_ENDS)
            text, self._buffer = self._buffer[:certain], self._buffer[certain:]
            self._emit(text, events)
            return False
        self._emit(self._buffer[: end.start()], events)
        self._close(events)
        keeps = end.group() in ("<|start|>", "<|channel|>")  # which open the next message's header
        self._buffer = self._buffer[end.start() if keeps else end.end() :]
        if self._kind == "reasoning":
            self._reasoned = self._taken - len(self._buffer)
        self._phase = "header"
        return True

    def _emit(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if self._kind == "call":
            events.append(CallArguments(self._num_calls - 1, text))
        else:
            apart = "\n\n" if self._opening and self._kind in self._spoken else ""
            events.append((ReasoningPiece if self._kind == "reasoning" else TextPiece)(apart + text))
            self._spoken.add(self._kind)
        self._opening = False

    def _close(self, events: list[Event]) -> None:
        """A call without a word has no arguments."""
        if self._kind == "call" and self._opening:
            events.append(CallArguments(self._num_calls - 1, "{}"))
            self._opening = False
