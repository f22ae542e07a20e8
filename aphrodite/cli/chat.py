"""`chat` and `complete`: writing with a model in the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any

import msgspec
import typer

from aphrodite.cli.chat_session import ChatSession, Reply
from aphrodite.cli.console import INTERRUPTED, print_error, stderr
from aphrodite.cli.options import SamplingFlags, with_options, with_preset
from aphrodite.cli.sources import EngineSource, Piece, TextSource, load_llm, printable, tokens_per_second
from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.sampling.params import SamplingParams
from aphrodite.settings import Settings

COMPLETE_TOKENS = 256  # without --max-tokens; a plain continuation seldom ends by itself

UrlOption = Annotated[
    str | None, typer.Option("--url", help="Use a running server instead of loading a model.", metavar="URL")
]
KeyOption = Annotated[str | None, typer.Option("--api-key", help="Key of the server at --url.", metavar="KEY")]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="Sampler preset (`aphrodite samplers presets`); flags win over it.", metavar="NAME"),
]
NOT_HERE = ("n", "logprobs", "prompt_logprobs", "logprobs_mode", "sampler_trace")


@with_options(EngineConfig, sampling=True, skip=NOT_HERE)
def chat(
    *,
    url: UrlOption = None,
    api_key: KeyOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", metavar="TEXT")] = None,
    preset: PresetOption = None,
    settings: Settings,
    sampling: SamplingFlags,
) -> None:
    """Chat with a model in the terminal. /help lists what you can do."""
    _check_preset(preset)
    source = _open_source(settings.engine, url, api_key)
    try:
        _ChatLoop(source, ChatSession(_sampling(source, preset, sampling), system=system)).run()
    finally:
        source.close()


@with_options(EngineConfig, sampling=True, model_argument=False, skip=NOT_HERE)
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.", metavar="PROMPT")],
    *,
    url: UrlOption = None,
    api_key: KeyOption = None,
    preset: PresetOption = None,
    settings: Settings,
    sampling: SamplingFlags,
) -> None:
    """Continue a text and print the continuation (256 tokens unless --max-tokens says otherwise)."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("PROMPT is empty; there is nothing to continue.")
    _check_preset(preset)
    source = _open_source(settings.engine, url, api_key)
    clean = printable if sys.stdout.isatty() else str
    try:
        params = _sampling(source, preset, sampling)
        if params.max_tokens is None:
            params = msgspec.structs.replace(params, max_tokens=COMPLETE_TOKENS)
        with _ctrl_c(source) as stopped, contextlib.closing(source.complete(text, params)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                sys.stdout.write(clean(piece.text))
                sys.stdout.flush()
                if stopped:
                    break
        sys.stdout.write("\n")
    finally:
        source.close()
    if stopped:  # what a script took from this is not all
        raise typer.Exit(INTERRUPTED)


def _check_preset(name: str | None) -> None:
    """Refuse a wrong name before a model is loaded."""
    if name is not None:
        with_preset(SamplingParams(), name)


def _sampling(source: TextSource, preset: str | None, flags: SamplingFlags) -> SamplingParams:
    """What flags say, over the preset, over what the model's authors recommend."""
    base = source.sampling_defaults
    return flags.over(base if preset is None else with_preset(base, preset))


def _open_source(config: EngineConfig, url: str | None, api_key: str | None) -> TextSource:
    if url is not None:
        from aphrodite.cli.server_source import ServerSource

        # The variable that `run` reads its keys from; so no key needs to be on a command line.
        key = api_key or os.environ.get("APHRODITE_API_KEY", "").partition(",")[0] or None
        return ServerSource(url, api_key=key, model=config.model)
    if api_key is not None:
        raise ConfigError("--api-key is the key of a server; it needs --url.")
    with stderr().status("Loading the model"):
        return EngineSource(load_llm(config))


@contextlib.contextmanager
def _ctrl_c(source: TextSource) -> Iterator[list[bool]]:
    """While an answer is written, Ctrl-C marks it as stopped; yields the mark, a list that is empty or not.

    An engine in this process must finish its step first, so it is never interrupted by an exception.
    """
    stopped: list[bool] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(True)
        if source.interruptible:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    except KeyboardInterrupt:
        if not stopped:
            raise
    finally:
        signal.signal(signal.SIGINT, previous)


class _ChatLoop:
    """Reads lines, has them handled, streams answers."""

    def __init__(self, source: TextSource, session: ChatSession) -> None:
        self._source = source
        self._session = session
        self._terminal = sys.stdin.isatty()
        self._readline = _import_readline() if self._terminal else None

    def run(self) -> None:
        if self._terminal:
            _faint("Type a message, /help for more, Ctrl-D to end.")
        while True:
            try:
                line = self._read("> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                print()
                continue
            if self._handle(line):
                break
        if self._terminal:
            print()

    def _handle(self, line: str) -> bool:
        """Returns whether the program ends."""
        try:
            reply = self._session.handle(line)
            if reply.edit is not None:
                reply = self._edit(reply.edit)
            if reply.note:
                print(reply.note)
            if reply.answer:
                self._answer(continues=reply.continues)
            return reply.quit
        except AphroditeError as error:
            print_error(str(error))
            return False

    def _edit(self, text: str) -> Reply:
        try:
            changed = self._read("edit> ", text)
        except (EOFError, KeyboardInterrupt):
            return Reply("Nothing changed.")
        return self._session.edit_last(changed) if changed.strip() else Reply("Nothing changed.")

    def _answer(self, *, continues: bool) -> None:
        """Stream an answer; what was written before it stopped or failed stays in the conversation."""
        texts: list[str] = []
        tokens, began, last = 0, None, Piece("", 0)
        writer = _AnswerWriter(self._terminal)
        try:
            with _ctrl_c(self._source) as stopped, contextlib.closing(self._pieces(continues)) as pieces:
                for last in pieces:
                    began = began or time.perf_counter()
                    tokens += last.num_tokens
                    if not last.thought:
                        texts.append(last.text)
                    writer.write(last)
                    if stopped:
                        break
        finally:
            writer.end()
            if any(texts):
                self._session.add_answer("".join(texts), continues=continues)
        speed = tokens_per_second(tokens - 1, time.perf_counter() - (began or 0.0))
        self._summary(tokens, speed, "stopped" if stopped else last.finish_reason)

    def _pieces(self, continues: bool) -> Any:
        return self._source.chat(self._session.messages, self._session.params, continues=continues)

    def _summary(self, tokens: int, speed: float, reason: str | None) -> None:
        if not self._terminal:
            return
        ends = {"length": ", cut off by the length limit", "stopped": ", stopped"}
        rate = f", {speed:.0f} tokens/s" if speed == speed else ""
        _faint(f"({tokens} tokens{rate}{ends.get(reason or '', '')})")

    def _read(self, prompt: str, text: str = "") -> str:
        """One message, which may have several lines; `text` is offered for editing."""
        line = self._read_line(prompt, text)
        if line.startswith('"""'):
            return self._read_block(line[3:])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(". "))
        return "\n".join(lines)

    def _read_block(self, line: str) -> str:
        lines = []
        while not line.endswith('"""'):
            lines.append(line)
            line = self._read_line(". ")
        return "\n".join([*lines, line[:-3]]).strip("\n")

    def _read_line(self, prompt: str, text: str = "") -> str:
        if not self._terminal:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        if self._readline is None:
            return input(prompt)
        if text:
            escaped = text.replace("\n", "\\n")
            self._readline.set_startup_hook(lambda: self._readline.insert_text(escaped))
        try:
            line = input(prompt)
        finally:
            self._readline.set_startup_hook(None)
        return line.replace("\\n", "\n") if text else line


class _AnswerWriter:
    """Writes an answer as it comes; before it, faint and in a terminal only, what the model thinks."""

    def __init__(self, shows_thoughts: bool) -> None:
        self._shows_thoughts = shows_thoughts
        self._coloured = sys.stdout.isatty()
        self._thinking = False

    def write(self, piece: Piece) -> None:
        if not piece.text or (piece.thought and not self._shows_thoughts):
            return
        if piece.thought and not self._thinking:
            self._turn("\x1b[2m")
        elif self._thinking and not piece.thought:
            self._turn("\x1b[0m", "\n\n")
        self._thinking = piece.thought
        sys.stdout.write(printable(piece.text))
        sys.stdout.flush()

    def end(self) -> None:
        if self._thinking:
            self._turn("\x1b[0m")
        print()

    def _turn(self, colour: str, between: str = "") -> None:
        sys.stdout.write((colour if self._coloured else "") + between)


def _faint(text: str) -> None:
    print(f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text)


def _import_readline() -> Any:
    """Line editing and history; missing on some systems, where plain input still works."""
    try:
        import readline
    except ImportError:
        return None
    return readline
