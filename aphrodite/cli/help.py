"""What `--help` prints: every option by its whole name, however narrow the terminal is.

Typer's own panels cut names to fit their columns, and options that begin alike then read the same. Here names may be as
long as they are; what they mean begins beside short ones and below long ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    # Typer brings its own copy of click, or asks for click: the names below are the same in both.
    from typer import _click

_NARROWEST, _WIDEST = 36, 110  # columns: beyond the latter lines are hard to read
_NAMES = 28  # columns for names, where they are a third of all at most
_FIRST = ("Arguments", "Options")  # sections of what has no group, before all others


class Command(TyperCommand):
    """A command whose options are listed by group."""

    def format_help(self, ctx: _click.Context, formatter: _click.HelpFormatter) -> None:
        _begin(self, ctx, formatter)
        self.format_epilog(ctx, formatter)


class Group(TyperGroup):
    """A command of commands, which are listed by group."""

    def format_help(self, ctx: _click.Context, formatter: _click.HelpFormatter) -> None:
        _begin(self, ctx, formatter)
        commands = [command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        shown = [command for command in commands if not command.hidden]
        lines = (
            (_panel(command, "Commands"), (command.name or "", command.get_short_help_str(limit=500)))
            for command in shown
        )
        _write_sections(formatter, lines)
        self.format_epilog(ctx, formatter)


class Commands(typer.Typer):
    """A typer application with the help of this module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"cls": Group, **settings})

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **settings)


def _begin(command: _click.Command, ctx: _click.Context, formatter: _click.HelpFormatter) -> None:
    """Usage, what the command does, and its arguments and options."""
    formatter.width = max(min(shutil.get_terminal_size().columns, _WIDEST) - 2, _NARROWEST)
    command.format_usage(ctx, formatter)
    command.format_help_text(ctx, formatter)
    lines = []
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:  # a hidden one
            continue
        names, help = record
        if parameter.param_type_name == "argument":
            names = parameter.metavar or (parameter.name or "").upper()
        kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
        lines.append((_panel(parameter, kind), (names, help)))
    _write_sections(formatter, sorted(lines, key=lambda line: _FIRST.index(line[0]) if line[0] in _FIRST else 2))


def _panel(entry: object, default: str) -> str:
    return getattr(entry, "rich_help_panel", None) or default


def _write_sections(formatter: _click.HelpFormatter, lines: Iterable[tuple[str, tuple[str, str]]]) -> None:
    sections: dict[str, list[tuple[str, str]]] = {}
    for title, line in lines:
        sections.setdefault(title, []).append(line)
    for title, entries in sections.items():
        with formatter.section(typer.style(title, bold=True)):
            formatter.write_dl(entries, col_max=min(_NAMES, formatter.width // 3))
