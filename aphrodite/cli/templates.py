"""`templates`: the library of chat templates, one of them in full, and what one makes of a conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aphrodite.cli.console import stderr, stdout
from aphrodite.cli.help import Commands
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig
from aphrodite.errors import ConfigError
from aphrodite.settings import Settings

if TYPE_CHECKING:
    from rich.text import Text

    from aphrodite.chat.table import LibraryTemplate
    from aphrodite.chat.template import ChatTemplate
    from aphrodite.chat.traits import TemplateTraits
    from aphrodite.tokenizer.tokenizer import Tokenizer

app = Commands(
    name="templates", help="Chat templates: list them, look at one, try one on a conversation.", no_args_is_help=True
)

SAMPLE = [
    {"role": "system", "content": "You are a lighthouse keeper who speaks in short sentences."},
    {"role": "user", "content": "What did you see last night?"},
    {"role": "assistant", "content": "A ship. No crew."},
    {"role": "user", "content": "Were its lights on?"},
]
BEGUN = {"role": "assistant", "content": "One. Green, like"}

# Of the engine's settings only these say whose tokenizer and template are meant.
_OTHERS = tuple(
    entry.name
    for entry in dataclasses.fields(EngineConfig)
    if entry.name not in ("model", "load_format", "tokenizer", "cache_dir")
)
_BOS, _EOS = "<s>", "</s>"  # stand for a tokenizer's own where no model is given

# Columns of the list, and how wide a terminal has to be for all of them.
WIDE = ("Name", "Also", "Tools", "Reasoning", "Ends with", "For")
NARROW = ("Name", "Tools", "Reasoning", "For")
WIDE_FROM = 150

TemplateArgument = Annotated[
    str | None,
    typer.Argument(help="A name of the library, or a Jinja file; without it, the template of --model.", metavar="NAME"),
]


@app.callback()
def _group() -> None:
    """Chat templates: list them, look at one, try one on a conversation."""


@app.command("ls")
def ls(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the library: names, tools, reasoning, and whose formats they are; on wide terminals all of it."""
    from rich.table import Table

    from aphrodite.chat.table import TEMPLATES

    if as_json:
        print(json.dumps([_row_facts(row) for row in TEMPLATES.values()], ensure_ascii=False, indent=2))
        return
    console = stdout()
    titles = WIDE if console.width >= WIDE_FROM else NARROW
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title == "Name")
    for row in sorted(TEMPLATES.values(), key=lambda row: row.name):
        cells = _cells(row)
        table.add_row(*(cells[title] for title in titles))
    console.print(table)
    console.print("Use one with --chat-template NAME. `aphrodite templates show NAME` tells all about it,")
    console.print("`aphrodite templates try NAME` shows what it makes of a chat.")


def _cells(row: LibraryTemplate) -> dict[str, str]:
    """A row of the list, by the titles of its columns."""
    reasoning = row.traits.reasoning
    return {
        "Name": row.name,
        "Also": ", ".join(row.aliases),
        "Tools": row.traits.tool_format or "",
        "Reasoning": reasoning.start.removesuffix("<|message|>") if reasoning is not None else "",
        "Ends with": ", ".join(map(_shown, row.all_stops)),
        "For": row.help,
    }


@app.command("show")
@with_options(EngineConfig, skip=_OTHERS, model_argument=False)
def show(name: TemplateArgument = None, *, settings: Settings) -> None:
    """Print a template, and on standard error what it can do."""
    from aphrodite.chat.library import library_row

    template, _ = _template(name, settings.engine)
    console = stderr()
    row = library_row(name) if name is not None else None
    for label, value in _facts(template.name, template.traits, row).items():
        console.print(f"{label:<14} {value}", soft_wrap=True)
    stdout().print(template.source, soft_wrap=True, end="")


@app.command("try")
@with_options(EngineConfig, skip=_OTHERS, model_argument=False)
def try_template(
    name: TemplateArgument = None,
    *,
    messages: Annotated[
        Path | None,
        typer.Option("--messages", help='JSON file: a list of messages, or {"messages": [...]}.', metavar="FILE"),
    ] = None,
    tools: Annotated[Path | None, typer.Option("--tools", help="JSON file: a list of tools.", metavar="FILE")] = None,
    begun: Annotated[
        bool, typer.Option("--continue", help="Go on with the last message (a begun answer) instead of answering it.")
    ] = False,
    variables: Annotated[
        str | None, typer.Option("--variables", help="More variables for the template.", metavar="JSON")
    ] = None,
    settings: Settings,
) -> None:
    """Render a conversation (a sample, or yours) with special tokens marked; with --model, count its tokens."""
    from aphrodite.logs import configure_logging

    configure_logging("info")  # what had to be changed in the conversation
    template, tokenizer = _template(name, settings.engine)
    conversation = _read_messages(messages) if messages is not None else [*SAMPLE, *([BEGUN] if begun else [])]
    text = template.render(
        conversation,
        continue_final_message=begun,
        tools=_read_tools(tools) if tools is not None else None,
        extra=_parse_variables(variables),
    )
    stdout().print(_marked(text), soft_wrap=True)
    console = stderr()
    console.print(f"Ends with: {_stops(template.traits.stop)}", soft_wrap=True)
    if tokenizer is not None:
        console.print(f"Tokens: {len(tokenizer.encode(text, add_special_tokens=False)):,}")
    else:
        console.print(f"{_BOS} and {_EOS} stand for a tokenizer's own tokens; --model counts tokens.", soft_wrap=True)


def _template(name: str | None, config: EngineConfig) -> tuple[ChatTemplate, Tokenizer | None]:
    """The named template, or the model's; with the model's tokenizer if there is a model."""
    from aphrodite.chat.library import load_chat_template, named_template, recognised_chat_template

    if config.model is None:
        if name is None:
            raise ConfigError("name a template of `aphrodite templates ls`, a Jinja file, or a model with --model.")
        return named_template(name, bos_token=_BOS, eos_token=_EOS), None
    from aphrodite.engine.preparation import resolve_model, tokenizer_path
    from aphrodite.loading.checkpoint import open_checkpoint
    from aphrodite.tokenizer.loader import load_tokenizer

    config, path = resolve_model(config)
    tokenizer = load_tokenizer(tokenizer_path(config))
    template = load_chat_template(name, tokenizer)
    if template is None:
        checkpoint = open_checkpoint(path, load_format=config.load_format)
        known = f"{checkpoint.name} {path.name}"
        template = recognised_chat_template(tokenizer, name=known, family=checkpoint.spec.family)
    return template, tokenizer


def _row_facts(row: LibraryTemplate) -> dict[str, Any]:
    return {
        "name": row.name,
        "aliases": row.aliases,
        "for": row.help,
        **dataclasses.asdict(row.traits),
        "stop": row.all_stops,
    }


def _facts(name: str, traits: TemplateTraits, row: LibraryTemplate | None) -> dict[str, str]:
    reasoning = "none"
    if traits.reasoning is not None:
        opened = ", opened by the template" if traits.reasoning.opened else ""
        switch = f", switched by {traits.reasoning.switch}" if traits.reasoning.switch is not None else ""
        reasoning = f"{traits.reasoning.start} … {traits.reasoning.end}{opened}{switch}"
    return {
        "Name": name.removeprefix("the template "),
        **({} if row is None else {"For": row.help, "Also": ", ".join(row.aliases) or "no other name"}),
        "System role": "yes" if traits.system_role else "none; its text goes into the first question",
        "Names": "shown" if traits.names else "put before the texts",
        "Tools": traits.tool_format or "none",
        "Documents": "yes" if traits.documents else "none",
        "Reasoning": reasoning,
        "Ends with": _stops(traits.stop),
    }


def _stops(stops: Sequence[str]) -> str:
    return ", ".join(["end of sequence", *map(_shown, stops)])


def _shown(stop: str) -> str:
    """A stop with its line ends as \\n."""
    return json.dumps(stop, ensure_ascii=False)[1:-1]


def _marked(text: str) -> Text:
    """The prompt with its special tokens in colour, without control characters."""
    from rich.text import Text

    from aphrodite.chat.traits import CONTROL_TOKEN
    from aphrodite.cli.sources import printable

    marked = Text(printable(text))
    marked.highlight_regex(CONTROL_TOKEN, "bold cyan")
    marked.highlight_regex(r"<s>", "bold cyan")
    return marked


def _read_messages(file: Path) -> list[dict[str, Any]]:
    value = _read_json(file, (list, dict))
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ConfigError(f'{file}: a list of messages is expected, such as [{{"role": "user", "content": "Hi"}}].')
    return value


def _read_tools(file: Path) -> list[dict[str, Any]]:
    value = _read_json(file, list)
    if not all(isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in value):
        raise ConfigError(
            f"{file}: a list of tools as OpenAI's API has them is expected, such as "
            '[{"type": "function", "function": {"name": "f", "parameters": {}}}].'
        )
    return list(value)


def _read_json(file: Path, kind: type | tuple[type, ...]) -> Any:
    try:
        value = json.loads(file.expanduser().read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}).") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{file}: a JSON list is expected here.")
    return value


def _parse_variables(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--variables: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ConfigError('--variables: a JSON object is expected, such as {"enable_thinking": false}.')
    return value
