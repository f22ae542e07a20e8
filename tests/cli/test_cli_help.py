"""What --help prints: whole names in narrow terminals, by group, and nothing of Python's types."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from aphrodite.cli.main import app
from aphrodite.config import settings_table
from aphrodite.sampling.fields import parameter_table

COMMANDS = [
    ["run"], ["chat"], ["complete"], ["doctor"], ["bench", "latency"], ["bench", "throughput"], ["bench", "serve"],
    ["models", "ls"], ["models", "pull"], ["models", "rm"], ["models", "inspect"], ["config", "init"],
    ["config", "check"], ["samplers"], ["samplers", "explain"], ["templates"], ["templates", "try"], [],
]  # fmt: skip
NO_FLAGS_OF_COMPLETE = {"n", "logprobs", "prompt_logprobs", "logprobs_mode", "sampler_trace"}


def help_of(command: list[str], columns: int) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_every_flag_is_there_by_its_whole_name(columns: int) -> None:
    text = help_of(["run"], columns)
    for setting in settings_table().values():
        name = "MODEL" if setting.name == "model" else setting.flag
        assert re.search(rf"^  {name}\b(?!-)", text, re.MULTILINE), name
    sampling = help_of(["complete"], columns)
    for name in {row.name for row in parameter_table()} - NO_FLAGS_OF_COMPLETE:
        assert re.search(rf"^  --{name.replace('_', '-')}(?![\w-])", sampling, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_shows_types_of_python(command: list[str]) -> None:
    text = help_of(command, 80)
    assert not re.search(r"<(str|bool|int|float|path|list)\b", text)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("Usage: ")


def test_groups_and_their_order() -> None:
    text = help_of(["run"], 80)
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    groups = list(dict.fromkeys(setting.group for setting in settings_table().values()))
    assert titles == ["Arguments", "Options", *groups]
    assert re.findall(r"^(\S.*):$", help_of([], 80), re.MULTILINE) == ["Options", "Serve and write", "Look and measure"]
