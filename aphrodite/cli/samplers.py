"""`samplers`: the table of sampling parameters, one of them in full, and what they do to a text."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from aphrodite.cli.console import stderr, stdout
from aphrodite.cli.help import Commands, Group
from aphrodite.cli.options import SamplingFlags, with_options
from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError, ConfigError, did_you_mean
from aphrodite.sampling.docs import KIND_WORDS, default_text, range_text, samplers_page, stages_reading, value_text
from aphrodite.sampling.fields import canonical_names, parameter_table
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import GROUPS, load_presets
from aphrodite.sampling.table import ParamRow
from aphrodite.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from aphrodite.llm import LLM


class _NameOrCommand(Group):
    """`samplers top_k` is `samplers show top_k`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


app = Commands(
    name="samplers",
    cls=_NameOrCommand,
    help="Every sampling parameter: list them, look at one, see what they do.",
    epilog="Show one: aphrodite samplers NAME",
    subcommand_metavar="[NAME | COMMAND] [ARGS]...",
)


@app.callback(invoke_without_command=True)
def samplers(context: typer.Context) -> None:
    """List all sampling parameters, or look at one of them: aphrodite samplers NAME."""
    if context.invoked_subcommand is None:
        _list(stdout())


@app.command("ls")
def ls() -> None:
    """List all sampling parameters, as without a command."""
    _list(stdout())


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A parameter, by any of its names.", metavar="NAME")]) -> None:
    """Show one parameter with its definition and source."""
    _show(stdout(), _find(name))


@app.command("presets")
def presets(
    file: Annotated[Path | None, typer.Argument(help="A file of your own presets.", metavar="[FILE]")] = None,
) -> None:
    """List the sampler presets that ship, and those of a file."""
    from rich.text import Text

    console = stdout()
    for preset in load_presets(file).presets.values():
        console.print(Text.assemble((preset.name, "bold cyan"), "  ", preset.about))
        for group in GROUPS:
            values = ", ".join(f"{name} {value}" for name, value in getattr(preset, group).items())
            if values:
                console.print(Text(f"  {group}: {values}", style="dim"))


@app.command("docs")
def docs() -> None:
    """Print the reference page (docs/samplers.md)."""
    sys.stdout.write(samplers_page())


@app.command("explain")
@with_options(
    EngineConfig,
    sampling=True,
    model_argument=False,
    skip=("n", "max_tokens", "logprobs", "prompt_logprobs", "logprobs_mode", "sampler_trace"),
)
def explain(
    *,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.", metavar="TEXT")],
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to draw.", metavar="N", min=1, max=256)] = 8,
    settings: Settings,
    sampling: SamplingFlags,
) -> None:
    """Draw, token by token, what each active sampler does to the model's choice."""
    from aphrodite.cli.sources import load_llm

    if not prompt:
        raise ConfigError("--prompt is empty; there is nothing to continue.")
    with stderr().status("Loading the model"):
        llm = load_llm(settings.engine)
    with llm:
        wanted = sampling.over(llm.sampling_defaults)
        params = msgspec.structs.replace(wanted, max_tokens=tokens, sampler_trace=True)
        _explain(stdout(), llm, prompt, params)


def _explain(console: Console, llm: LLM, prompt: str, params: SamplingParams) -> None:
    from rich.text import Text

    from aphrodite.cli.sources import printable
    from aphrodite.cli.trace_view import TraceView

    view = TraceView(lambda token_id: llm.tokenizer.token_bytes(token_id).decode(errors="replace"), console.width)
    text, number = "", 0
    with closing(llm.stream(prompt, params)) as pieces:  # type: ignore[type-var]
        for piece in pieces:
            for answer in piece.outputs:
                if answer.error:
                    raise AphroditeError(answer.error)
                text += answer.text
                for trace in answer.sampler_trace or ():
                    number += 1
                    console.print(view.panel(number, trace))
    console.print(Text.assemble((printable(prompt), "dim"), (printable(text), "bold green")), soft_wrap=True)


def _list(console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for header in ("parameter", "default", "range", "meaning"):
        table.add_column(header, overflow="fold")
    table.columns[0].min_width = max(len(row.name) for row in parameter_table())
    for row in parameter_table():
        table.add_row(Text(row.name, style="bold cyan"), default_text(row), range_text(row), row.param.doc)
    console.print(table)
    count = len(parameter_table())
    console.print(
        f"\n{count} parameters, every one of them on every endpoint. One in full: aphrodite samplers NAME."
        " What they do to a text: aphrodite samplers explain --prompt TEXT --min-p 0.05",
        style="dim",
    )


def _find(name: str) -> ParamRow:
    """A row by any of its names, in any spelling that is a flag's."""
    key = name.removeprefix("--").replace("-", "_").lower()
    names = canonical_names()
    if key not in names:
        hint = did_you_mean(key, names) or " aphrodite samplers lists them."
        raise ConfigError(f"there is no sampling parameter {name!r}.{hint}")
    return next(row for row in parameter_table() if row.name == names[key])


def _show(console: Console, row: ParamRow) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console.print(Text(row.name, style="bold cyan"))
    console.print(Padding(Text(row.param.doc), (0, 0, 1, 0)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    facts = {
        "aliases": ", ".join(row.param.aliases),
        "type": " | ".join(row.choices) or KIND_WORDS[row.kind],
        "default": default_text(row),
        "range": range_text(row),
        "neutral": "" if row.param.neutral is None else value_text(row.param.neutral),
        "source": row.param.source,
    }
    for label, value in facts.items():
        if value:
            table.add_row(Text(label, style="dim"), value)
    console.print(table)
    for stage in stages_reading(row.name):
        console.print(Text.assemble("\nStage ", (stage.name, "bold"), f" ({stage.place})"))
        console.print(Padding(Text(stage.definition), (0, 0, 0, 2)))
