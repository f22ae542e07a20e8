"""The `aphrodite` command. Nothing here or in the command modules imports torch before a command needs it."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from aphrodite.cli import bench, chat, configuration, doctor, models, run, samplers, templates
from aphrodite.cli.console import INTERRUPTED, print_error
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
    """Entry point: a user's error is one line and exit code 1; wrong usage is exit code 2, Ctrl-C is 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Models write what the encoding of a file or terminal may lack (Windows has such), and that ends nothing.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except AphroditeError as error:
        print_error(str(error))
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if not _was_interrupted(error):
            raise
        sys.exit(INTERRUPTED)


def _was_interrupted(error: BaseException) -> bool:
    """Whether an error is what a library made of Ctrl-C, which came while it was imported."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None
