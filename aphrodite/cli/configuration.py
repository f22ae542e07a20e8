"""`config init` and `config check`: the YAML file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aphrodite.cli.console import stdout
from aphrodite.cli.help import Commands
from aphrodite.config_file import example_config
from aphrodite.errors import ConfigError
from aphrodite.settings import resolve

app = Commands(name="config", help="Write or check a file of settings.", no_args_is_help=True)


@app.command("init")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write; - prints it.", metavar="FILE")] = Path("aphrodite.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a file with every setting, its help and its default, commented out."""
    if str(path) == "-":
        print(example_config(), end="")
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(example_config())
    except FileExistsError:
        raise ConfigError(f"{path} is there already; --force replaces it.") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}.") from None
    stdout().print(f"Wrote {path}. Use it with: aphrodite run --config {path}", soft_wrap=True)


@app.command("check")
def check(path: Annotated[Path, typer.Argument(help="YAML file of settings.", metavar="FILE")]) -> None:
    """Check a file of settings and print what it sets."""
    from aphrodite.model_list import has_several, offered_models

    settings = resolve(config_file=path, environ={})
    console = stdout()
    for name in settings.origins:
        console.print(f"{name}: {settings.shown(name)}", soft_wrap=True)
    if has_several(settings):
        console.print(f"models offered: {', '.join(model.name for model in offered_models(settings))}", soft_wrap=True)
    count = len(settings.origins) + bool(settings.models)
    console.print(f"{path} is fine; it sets {count} {'name' if count == 1 else 'names'}.", soft_wrap=True)
