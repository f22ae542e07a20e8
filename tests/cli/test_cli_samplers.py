"""`samplers`: the table in the terminal, one parameter in full, and the drawing of traces."""

from __future__ import annotations

import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from aphrodite.cli.main import app, main
from aphrodite.cli.trace_view import TraceView, bar
from aphrodite.core.plan import StageTrace, TokenTrace
from aphrodite.sampling.fields import parameter_table

runner = CliRunner()


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def words(*arguments: str) -> str:
    result = runner.invoke(app, ["samplers", *arguments])
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


def test_the_list_has_every_parameter() -> None:
    text = words()
    for row in parameter_table():
        assert f" {row.name} " in f" {text} "
    assert f"{len(parameter_table())} parameters" in text


@pytest.mark.parametrize("name", ["min_p", "min-p", "--min-p", "MIN_P"])
def test_one_parameter_by_any_spelling(name: str) -> None:
    arguments = ["show", "--", name] if name.startswith("--") else [name]
    text = words(*arguments)
    assert text.startswith("min_p Keep tokens at least min_p times as likely")
    for part in ("default 0", "range 0 … 1", "source arXiv 2407.01082", "Stage min_p (rank 800", "ln(min_p)"):
        assert part in text


def test_the_list_has_a_name_like_those_of_other_commands() -> None:
    assert words("ls") == words()


def test_an_alias_shows_its_parameter() -> None:
    assert words("rep_pen").startswith("repetition_penalty ")


def test_an_unknown_name_is_an_error_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aphrodite", "samplers", "topp"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "Did you mean top_p?" in capsys.readouterr().err


def test_explain_draws_each_token(smollm2_path: object) -> None:
    flags = ["--temperature", "1.2", "--min-p", "0.05", "--seed", "3", "--tokens", "3"]
    result = runner.invoke(app, ["samplers", "explain", "-p", "Once upon a time", *flags])
    assert result.exit_code == 0, result.output
    panels = re.findall(r"╭─ +(\d+) “(.+?)”", result.stdout)
    assert [number for number, _ in panels] == ["1", "2", "3"]
    assert result.stdout.count("▶") == 3
    for stage in ("model", "temperature", "min_p"):
        assert len(re.findall(rf"│ {stage} ", result.stdout)) == 3
    text = "".join(token for _, token in panels).replace("\\n", "\n")
    assert result.stdout.rstrip().endswith(f"Once upon a time{text}".rstrip())


@pytest.mark.parametrize("arguments", [[], ["-p", "x", "--tokens", "0"], ["-p", "x", "--min-p", "2"]])
def test_wrong_usage_of_explain(arguments: list[str]) -> None:
    assert runner.invoke(app, ["samplers", "explain", *arguments]).exit_code == 2


TOKENS = {0: " time", 1: "\n", 2: "\x1b[31mred", 3: "東京", **{number: f"word{number}" for number in range(4, 12)}}


def trace(token_id: int, top: int) -> TokenTrace:
    ids = list(range(2, 2 + top))
    shares = [0.5 / (number + 1) for number in range(top)]
    return TokenTrace(
        token_id,
        True,
        [
            StageTrace("model", 151_936, 12_345, 1e-7, ids, shares),
            StageTrace("ranged_penalties", 151_936, 0, 0.0, ids, shares),
            StageTrace("min_p", 18, 12, 0.01, ids, shares),
        ],
    )


@pytest.mark.parametrize("width", [64, 80, 100, 132, 160])
@pytest.mark.parametrize("token_id", [0, 1, 2, 3])
def test_a_panel_fits_and_marks_the_chosen_token(width: int, token_id: int) -> None:
    console = Console(width=width, markup=False, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(TraceView(TOKENS.__getitem__, width).panel(7, trace(token_id, 10)))
    text = console.export_text()
    lines = text.splitlines()
    assert all(cell_len(line) == width for line in lines)
    assert "\x1b" not in text
    (marked,) = [line for line in lines if "▶" in line]
    shown = {0: "“ time”", 1: "“\\n”", 2: "“[31mred”", 3: "“東京”"}[token_id]
    assert shown in marked
    assert ("12 " in marked) == (token_id < 2)  # not among the ten: it has a line of its own, with its rank
    for part in ("ranged_penalties", "candidates", "151,936", "#12,345", "out", "18", "<0.0001 %"):
        assert part in text
    assert ("in model" in text) == (width >= 76)


def test_bars() -> None:
    assert [bar(share, 4) for share in (0.0, 1e-9, 0.5, 1.0)] == ["    ", "▏   ", "██  ", "████"]
    assert bar(0.51, 10) == "█████▏    "
