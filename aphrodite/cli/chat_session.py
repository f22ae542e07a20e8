"""A terminal conversation and its slash commands, without any terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import msgspec

from aphrodite.cli.options import sampling_from_texts, with_preset
from aphrodite.cli.sources import Message
from aphrodite.errors import ConfigError, did_you_mean
from aphrodite.sampling.fields import to_mapping
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import shipped_presets


class Reply(NamedTuple):
    """What the terminal does after a line: show a note, have an answer written, ask for an edit, or end."""

    note: str = ""
    answer: bool = False
    continues: bool = False  # the answer goes on with the last one
    edit: str | None = None  # the text to offer for editing; the result goes to `edit_last`
    quit: bool = False


class ChatSession:
    """Messages, system prompt and sampling parameters, changed by the lines that a person types."""

    def __init__(self, params: SamplingParams, *, system: str | None = None) -> None:
        self.params = params
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What the model sees."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def handle(self, line: str) -> Reply:
        """Take what a person typed: a slash command, or a message.

        Raises:
            ConfigError: an unknown command or a wrong argument; nothing has changed.
        """
        if line.startswith("//"):  # a message that begins with a slash
            line = line[1:]
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            if name not in COMMANDS:
                close = did_you_mean(f"/{name}", [f"/{known}" for known in COMMANDS])
                raise ConfigError(f"/{name} is not a command.{close} /help lists them.")
            return COMMANDS[name].run(self, argument.strip())
        if not line.strip():
            return Reply()
        self.turns.append({"role": "user", "content": line})
        return Reply(answer=True)

    def add_answer(self, text: str, *, continues: bool = False) -> None:
        """Keep what was written: as an answer, or as more of the last one."""
        if continues:
            self.turns[-1] = {"role": "assistant", "content": self.turns[-1]["content"] + text}
        else:
            self.turns.append({"role": "assistant", "content": text})

    def edit_last(self, text: str) -> Reply:
        """Replace the last message of the person and ask for a new answer."""
        del self.turns[self._last_message() :]
        self.turns.append({"role": "user", "content": text})
        return Reply(answer=True)

    def _last_message(self) -> int:
        """Index of the person's latest message."""
        for index in reversed(range(len(self.turns))):
            if self.turns[index]["role"] == "user":
                return index
        raise ConfigError("there is no message yet.")

    def _help(self, argument: str) -> Reply:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{command.usage:<{width}}  {command.help}" for command in dict.fromkeys(COMMANDS.values())]
        lines.append('A line that ends with \\ goes on in the next one; """ begins and ends a longer text.')
        lines.append("Ctrl-C stops the answer, Ctrl-D ends the program; // begins a message with a slash.")
        return Reply("\n".join(lines))

    def _regenerate(self, argument: str) -> Reply:
        del self.turns[self._last_message() + 1 :]
        if self.params.seed is None or self.params.seed == -1:
            return Reply(answer=True)
        # With the same seed it would be the same answer.
        self.params = msgspec.structs.replace(self.params, seed=self.params.seed + 1)
        return Reply(f"seed is {self.params.seed} now.", answer=True)

    def _continue(self, argument: str) -> Reply:
        if not self.turns or self.turns[-1]["role"] != "assistant":
            raise ConfigError("there is no answer to go on with.")
        return Reply(answer=True, continues=True)

    def _edit(self, argument: str) -> Reply:
        if argument:
            return self.edit_last(argument)
        return Reply(edit=self.turns[self._last_message()]["content"])

    def _undo(self, argument: str) -> Reply:
        index = self._last_message()
        removed = self.turns[index]["content"]
        del self.turns[index:]
        return Reply(f"Removed: {removed.splitlines()[0][:60]}")

    def _system(self, argument: str) -> Reply:
        if not argument:
            return Reply(f"System prompt: {self.system}" if self.system else "No system prompt.")
        self.system = None if argument == "none" else argument
        return Reply("System prompt removed." if self.system is None else "System prompt set.")

    def _set(self, argument: str) -> Reply:
        if not argument:
            values = to_mapping(self.params)
            shown = [f"{name} {value}" for name, value in values.items()] or ["Everything has its default."]
            return Reply("\n".join(shown))
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        if not text.strip():
            raise ConfigError(f"/set {name} needs a value.")
        self.params = sampling_from_texts({name: text.strip()}, base=self.params)
        return Reply(f"{name} is {text.strip()}.")

    def _preset(self, argument: str) -> Reply:
        if not argument:
            return Reply("\n".join(f"{preset.name}: {preset.about}" for preset in shipped_presets().presets.values()))
        self.params = with_preset(self.params, argument)
        return Reply(f"The values of {argument} hold; /set shows them.")

    def _save(self, argument: str) -> Reply:
        if not argument:
            raise ConfigError("/save needs the name of a file.")
        content = {
            "system": self.system,
            "messages": self.turns,
            "sampling": to_mapping(self.params),
        }
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(os.path.expanduser(argument)).write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {argument}: {error.strerror}.") from None
        return Reply(f"Saved to {argument}.")

    def _load(self, argument: str) -> Reply:
        if not argument:
            raise ConfigError("/load needs the name of a file.")
        try:
            saved = msgspec.json.decode(Path(os.path.expanduser(argument)).read_bytes(), type=_Saved)
        except OSError as error:
            raise ConfigError(f"cannot read {argument}: {error.strerror}.") from None
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ConfigError(f"{argument} is not a saved conversation: {error}.") from None
        self.params = sampling_from_texts(saved.sampling)
        self.system, self.turns = saved.system, [dict(turn) for turn in saved.messages]  # type: ignore[arg-type]
        return Reply(f"Loaded {len(self.turns)} messages from {argument}.")

    def _clear(self, argument: str) -> Reply:
        self.turns.clear()
        return Reply("The conversation starts anew.")

    def _quit(self, argument: str) -> Reply:
        return Reply(quit=True)


class _Turn(TypedDict):
    role: Literal["user", "assistant"]
    content: str


class _Saved(msgspec.Struct):
    """What /save writes."""

    messages: list[_Turn]
    system: str | None = None
    sampling: dict[str, Any] = {}


class Command(NamedTuple):
    usage: str
    help: str
    run: Callable[[ChatSession, str], Reply]


COMMANDS: dict[str, Command] = {
    "help": Command("/help", "show this", ChatSession._help),
    "regenerate": Command("/regenerate", "write the last answer anew", ChatSession._regenerate),
    "continue": Command("/continue", "go on with the last answer", ChatSession._continue),
    "edit": Command("/edit [TEXT]", "change your last message and have it answered anew", ChatSession._edit),
    "undo": Command("/undo", "remove your last message and its answer", ChatSession._undo),
    "system": Command("/system [TEXT|none]", "show, set or remove the system prompt", ChatSession._system),
    "set": Command("/set [NAME VALUE]", "show or set sampling parameters (/set temperature 0.7)", ChatSession._set),
    "preset": Command("/preset [NAME]", "list sampler presets, or take the values of one", ChatSession._preset),
    "save": Command("/save FILE", "write the conversation to a file", ChatSession._save),
    "load": Command("/load FILE", "go on with a saved conversation", ChatSession._load),
    "clear": Command("/clear", "forget all messages", ChatSession._clear),
    "quit": Command("/quit", "end the program", ChatSession._quit),
}
