"""ToolParser: the calls of tools in an answer's text, in whichever format the model was asked to use.

A format is a table of marks and of what reads on behind each (`aphrodite.chat.tools.readers`). What turns out to be no
call is text again, with nothing lost; only a call whose arguments break off after they began stays what it is.

Formats by their authors' descriptions: the chat templates of NousResearch's Hermes, Qwen, Meta's Llama 3 and 4,
Mistral, DeepSeek V3 to V3.2, GLM 4, Cohere's Command R, IBM's Granite, Moonshot's Kimi K2, Liquid's LFM 2, Google's
Gemma 4, MiniMax M2, ByteDance's Seed-OSS, StepFun's Step 3, Tencent's Hunyuan, NVIDIA's Nemotron, Microsoft's Phi 4
mini, InternLM 2, Apertus, Ai2's OLMo 3, MiniCPM 5 and GigaChat 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

from aphrodite.chat.events import CallArguments, CallStart, Event, TextPiece, held_suffix
from aphrodite.chat.formats import ToolFormat
from aphrodite.chat.tools import gemma, markup, pythonic, readers
from aphrodite.chat.tools.json_text import MalformedCallError
from aphrodite.chat.tools.readers import Calls, Reader

ToolParserName = ToolFormat | Literal["none"]

_Readers = Mapping[str, Callable[[Calls], Reader]]


@dataclass(frozen=True, slots=True)
class _Format:
    """Marks that begin a call, anywhere or only where the text begins, and what reads on behind them."""

    anywhere: _Readers
    at_start: _Readers = field(default_factory=dict)


_BARE: Final[_Readers] = {"{": readers.bare_object, "[": pythonic.bare_list}
_FENCED: Final[_Readers] = {"```json": readers.fenced, "```\n": readers.fenced}
_TAGGED: Final[_Readers] = {"<tool_call>": markup.tagged}
_FORMATS: Final[dict[str, _Format]] = {
    "hermes": _Format(_TAGGED),
    "qwen3_coder": _Format({**_TAGGED, "<function=": markup.coder_function}),
    "llama3": _Format(
        {
            "<|python_tag|>": readers.python_tag,
            "<|python_start|>": pythonic.python_start,
            "<function=": markup.function_tag,
        },
        _BARE,
    ),
    "mistral": _Format({"[TOOL_CALLS]": readers.mistral}),
    "deepseek": _Format({"<｜tool▁calls▁begin｜>": readers.deepseek, "<｜tool▁call▁begin｜>": readers.deepseek_call}),
    "deepseek_v32": _Format(
        {
            f"<｜DSML｜{name}>": partial(markup.invocations, prefix="｜DSML｜", end=f"</｜DSML｜{name}>")
            for name in ("function_calls", "tool_calls")
        }
    ),
    "glm": _Format(_TAGGED),
    "glm4": _Format(_TAGGED),
    "command_r": _Format({"<|START_ACTION|>": readers.command_r_action, "Action:": readers.command_r_fenced}),
    "granite": _Format({"<|tool_call|>": readers.listed, **_TAGGED}),
    "kimi_k2": _Format({"<|tool_calls_section_begin|>": readers.kimi_k2, "<|tool_call_begin|>": readers.kimi_k2_call}),
    "lfm2": _Format({"<|tool_call_start|>": pythonic.lfm2}),
    "gemma4": _Format({"<|tool_call>": partial(gemma.gemma_call, quote='<|"|>', end="<tool_call|>")}),
    "functiongemma": _Format(
        {"<start_function_call>": partial(gemma.gemma_call, quote="<escape>", end="<end_function_call>")}
    ),
    "minimax_m2": _Format({"<minimax:tool_call>": partial(markup.invocations, prefix="", end="</minimax:tool_call>")}),
    "seed_oss": _Format({"<seed:tool_call>": markup.seed_oss}),
    "step3": _Format({"<｜tool_calls_begin｜>": markup.step3}),
    "hunyuan": _Format({"<tool_calls>": partial(readers.json_until, end="</tool_calls>"), **_TAGGED}),
    "nemotron": _Format({"<TOOLCALL>": partial(readers.json_until, end="</TOOLCALL>")}),
    "phi4_mini": _Format(
        {"<|tool_call|>": partial(readers.json_until, end="<|/tool_call|>"), "functools[": readers.functools}
    ),
    "internlm": _Format({"<|action_start|>": readers.internlm}),
    "apertus": _Format({"<|tools_prefix|>": readers.apertus}),
    "olmo3": _Format({"<function_calls>": pythonic.olmo3}),
    "minicpm5": _Format({"<function name=": markup.minicpm5}),
    "gigachat3": _Format({"<|function_call|>": readers.listed}),
    "json": _Format(_TAGGED, {**_BARE, **_FENCED}),
}
_INNER_MARKS: Final[dict[str, tuple[str, ...]]] = {
    "hermes": ("</tool_call>",),
    "qwen3_coder": ("</tool_call>",),
    "llama3": ("<|python_end|>",),
    "glm": ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "mistral": ("[ARGS]", "[CALL_ID]"),
    "deepseek": ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "command_r": ("<|END_ACTION|>",),
    "kimi_k2": ("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
    "lfm2": ("<|tool_call_end|>",),
    "gemma4": ('<|"|>', "<tool_call|>"),
    "functiongemma": ("<escape>", "<end_function_call>"),
    "minimax_m2": ("</minimax:tool_call>",),
    "seed_oss": ("</seed:tool_call>",),
    "step3": ("<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>", "<｜tool_calls_end｜>"),
    "hunyuan": ("</tool_calls>", "</tool_call>"),
    "nemotron": ("</TOOLCALL>",),
    "phi4_mini": ("<|/tool_call|>",),
    "internlm": ("<|plugin|>", "<|interpreter|>", "<|action_end|>"),
    "apertus": ("<|tools_suffix|>",),
    "olmo3": ("</function_calls>",),
}
# Characters that were read as calls in vain and are looked through once more. Behind them all is text, so that an
# answer of beginnings of calls takes no longer than its length.
_MAX_READ_AGAIN: Final = 262_144
_LEFT_OVER: Final = " \t\r\n,;]})`"  # of a list of calls that was cut off


def marks_of(tool_format: ToolFormat) -> tuple[str, ...]:
    """Texts that the format's parser has to see, be they special tokens or not."""
    return (*_FORMATS[tool_format].anywhere, *_INNER_MARKS.get(tool_format, ()))


class ToolParser:
    """Finds the calls in an answer's text.

    Args:
        tool_format: any but `gpt_oss`, whose messages `HarmonyParser` reads.
        schemas: the tools there are: JSON schemas of their parameters by name.
    """

    reasoning_chars = 0

    def __init__(self, tool_format: ToolFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        chosen = _FORMATS[tool_format]
        self._anywhere = chosen.anywhere
        self._at_start = dict(chosen.at_start)
        if tool_format == "glm4":  # which writes the name on the answer's first line
            self._at_start |= {f"{name}\n": partial(readers.behind_name, name=name) for name in schemas}
        self._marks = re.compile("|".join(map(re.escape, self._anywhere)))
        self._calls = _Sink(schemas)
        self._buffer = ""
        self._begins = True  # there was no text yet
        self._reader: Reader | None = None
        self._called = False  # nothing but white space since a call
        self._read_again = 0  # characters

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        while self._buffer and self._step():
            pass
        return self._calls.take()

    def finish(self) -> list[Event]:
        while self._reader is not None:
            self._end_reader(self._reader)
            while self._buffer and self._step():  # what came back may begin calls again
                pass
        if self._buffer and not (self._called and not self._buffer.strip()):
            self._calls.text(self._buffer)
        self._buffer = ""
        return self._calls.take()

    def _step(self) -> bool:
        """Go on until something changes; False when more text is needed."""
        if self._reader is not None:
            return self._read(self._reader)
        if self._read_again > _MAX_READ_AGAIN:
            self._calls.text(self._buffer)
            self._buffer = ""
            return False
        if self._begins and self._at_start:
            begun = self._buffer.lstrip()
            for mark, reader in self._at_start.items():
                if begun.startswith(mark):
                    self._begins = False
                    self._start(len(self._buffer) - len(begun), mark, reader)
                    return True
            if any(mark.startswith(begun) for mark in self._at_start):
                return False
            self._begins = False
        found = self._marks.search(self._buffer)
        if found is not None:
            self._start(found.start(), found.group(), self._anywhere[found.group()])
            return True
        certain = self._buffer[: len(self._buffer) - held_suffix(self._buffer, tuple(self._anywhere))].rstrip()
        if certain:
            self._calls.text(certain if not self._called else certain.lstrip())
            self._called = False
            self._buffer = self._buffer[len(certain) :]
        return False

    def _start(self, position: int, mark: str, reader: Callable[[Calls], Reader]) -> None:
        """Read a call; white space before it is told only if it is none."""
        before = self._buffer[:position]
        text = before.rstrip()
        if text:
            self._calls.text(text if not self._called else text.lstrip())
            self._called = False
        self._calls.open(before[len(text) :] + mark)
        self._buffer = self._buffer[position + len(mark) :]
        self._reader = reader(self._calls)
        next(self._reader)

    def _read(self, reader: Reader) -> bool:
        for position, char in enumerate(self._buffer):
            self._calls.raw.append(char)
            try:
                reader.send(char)
            except StopIteration as end:
                self._buffer = str(end.value) + self._buffer[position + 1 :]
                self._reader, self._called = None, True
                return True
            except MalformedCallError:
                self._buffer = self._buffer[position + 1 :]
                self._give_back()
                return True
        self._buffer = ""
        return False

    def _give_back(self) -> None:
        """What was read is no call: its opening is text, the rest may be anything."""
        opening, rest = self._calls.given_back()
        if opening:
            self._calls.text(opening)
            self._called = False
        self._buffer = rest + self._buffer
        self._read_again += len(rest)
        self._reader = None

    def _end_reader(self, reader: Reader) -> None:
        self._reader = None
        try:
            reader.send("")
        except StopIteration:
            self._called = True
            return
        except MalformedCallError:
            pass
        if self._calls.opening or any(char not in _LEFT_OVER for char in self._calls.raw):
            self._give_back()
        else:
            self._called = True


class _Sink:
    """What readers tell, as events.

    Attributes:
        opening: the mark that a call began with and the white space before it, until there is an event of it.
        raw: the characters read behind that which are not part of an event yet.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.schemas = schemas
        self.opening = ""
        self.raw: list[str] = []
        self._events: list[Event] = []
        self._arguments: list[str] = []  # of the call that began last, behind the events
        self._count = 0

    def open(self, opening: str) -> None:
        """What follows may be calls."""
        self.opening, self.raw = opening, []

    def begin(self, name: str) -> None:
        self._tell(CallStart(self._count, name))
        self._count += 1
        self.settle()

    def arguments(self, text: str) -> None:
        self.settle()
        self._arguments.append(text)

    def settle(self) -> None:
        self.opening = ""
        self.raw.clear()

    def text(self, text: str) -> None:
        if text:
            self._tell(TextPiece(text))

    def given_back(self) -> tuple[str, str]:
        """The opening and the rest of what was read in vain."""
        opening, rest = self.opening, "".join(self.raw)
        self.settle()
        return opening, rest

    def take(self) -> list[Event]:
        self._tell_arguments()
        events, self._events = self._events, []
        return events

    def _tell(self, event: Event) -> None:
        self._tell_arguments()
        self._events.append(event)

    def _tell_arguments(self) -> None:
        if self._arguments:
            self._events.append(CallArguments(self._count - 1, "".join(self._arguments)))
            self._arguments.clear()
