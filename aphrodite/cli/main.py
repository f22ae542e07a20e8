"""The `aphrodite` command. Nothing here or in the command modules imports torch before a command needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aphrodite.cli import bench, chat, configuration, doctor, models, run, samplers, templates
from aphrodite.cli.console import print_error
from aphrodite.cli.help import Commands
from aphrodite.errors import AphroditeError

app = Commands(
    name="aphrodite",
    help="Serve language models for creative writing, role-play and chat.",
    epilog="Start with: aphrodite run",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVE, TOOLS = "Serve and write", "Look and measure"

app.command("run", rich_help_panel=SERVE)(run.run)
app.command("serve", rich_help_panel=SERVE, help="The same as run.")(run.run)
app.command("chat", rich_help_panel=SERVE)(chat.chat)
app.command("complete", rich_help_panel=SERVE)(chat.complete)
app.add_typer(bench.app, rich_help_panel=TOOLS)
app.command("doctor", rich_help_panel=TOOLS)(doctor.doctor)
app.add_typer(models.app, rich_help_panel=TOOLS)
app.add_typer(samplers.app, rich_help_panel=TOOLS)
app.add_typer(templates.app, rich_help_panel=TOOLS)
app.add_typer(configuration.app, rich_help_panel=TOOLS)


def _print_version(wanted: bool) -> None:
    if wanted:
        from aphrodite import __version__

        print(f"aphrodite {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve language models for creative writing, role-play and chat."""


def main() -> None:
    """Entry point: a user's error is one line and exit code 1; wrong usage is exit code 2."""
    try:
        app()
    except AphroditeError as error:
        print_error(str(error))
        sys.exit(1)
