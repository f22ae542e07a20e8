"""`templates`: the library in the terminal, and what templates make of conversations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aphrodite.chat.table import TEMPLATES
from aphrodite.cli.main import app, main

runner = CliRunner()
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments: str) -> tuple[str, str]:
    result = runner.invoke(app, ["templates", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["aphrodite", "templates", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_the_list_has_every_template() -> None:
    lines = run("ls")[0].splitlines()
    listed = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert set(TEMPLATES) <= set(listed)
    facts = {row["name"]: row for row in json.loads(run("ls", "--json")[0])}
    assert set(facts) == set(TEMPLATES)
    assert (facts["qwen-3"]["tool_format"], facts["qwen-3"]["reasoning"]["start"]) == ("hermes", "<think>")
    assert facts["plain"]["stop"] == ["\nUser:"]


def test_a_narrow_terminal_gets_fewer_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "<|return|>, <|call|>" in run("ls")[0]
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("ls")[0].splitlines()
    assert lines[0].split() == ["Name", "Tools", "Reasoning", "For"]
    assert max(map(len, lines)) <= 80
    facts = run("show", "llama_4")[1]
    assert "Also           llama4, llama-4-instruct" in facts


def test_a_template_is_printed_so_that_it_can_be_saved(tmp_path: Path) -> None:
    out, facts = run("show", "deepseek-r1")
    assert out == TEMPLATES["deepseek-r1"].source
    for part in ("deepseek-r1", "<think> … </think>, opened by the template", "end of sequence, <｜end▁of▁sentence｜>"):
        assert part in facts
    file = tmp_path / "mine.jinja"
    file.write_text(out, encoding="utf-8")
    assert run("show", str(file))[0] == out


def test_a_template_is_tried_on_a_sample_and_on_a_file(tmp_path: Path) -> None:
    text, facts = run("try", "vicuna")
    assert "lighthouse keeper" in text
    assert text.endswith("USER: Were its lights on? ASSISTANT:\n")
    assert "end of sequence, USER:" in facts
    for content in (CHAT, {"messages": CHAT}):
        file = tmp_path / "chat.json"
        file.write_text(json.dumps(content))
        assert run("try", "chatml", "--messages", str(file), "--continue")[0] == (
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHel\n"
        )
    assert run("try", "llama-3", "--continue")[0].endswith("One. Green, like\n")


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "get_moon", "parameters": {}}}]))
    text = run("try", "qwen-3", "--tools", str(tools), "--variables", '{"enable_thinking": false}')[0]
    assert "get_moon" in text
    assert text.endswith("<think>\n\n</think>\n\n\n")


def test_a_models_template_and_tokens(smollm2_path: Path) -> None:
    text, facts = run("try", "--model", str(smollm2_path))
    assert text.startswith("<|im_start|>system\nYou are a lighthouse keeper")
    assert "Tokens: 55" in facts
    assert "the checkpoint's template" in run("show", "--model", str(smollm2_path))[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("show", "chatmm"), "Did you mean chatml?"),
        (("try",), "name a template"),
        (("try", "chatml", "--messages", "/nowhere.json"), "cannot read /nowhere.json"),
        (("try", "chatml", "--variables", "[1]"), "a JSON object is expected"),
        (("try", "chatml", "--variables", "{"), "not valid JSON"),
        (("try", "chatml", "--variables", '{"messages": 1}'), "reserved"),
    ],
)
def test_faults_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    line = error(monkeypatch, capsys, *arguments)
    assert expected in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("content", ['"text"', '{"turns": []}', "[1]", "{"])
def test_a_file_without_messages_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content)
    assert str(file) in error(monkeypatch, capsys, "try", "chatml", "--messages", str(file))


@pytest.mark.parametrize("name", ["chatml", "deepseek-v3.1"])
@pytest.mark.parametrize("content", ["{}", "[1]", '[{"name": "f"}]', '[{"type": "function", "function": "f"}]'])
def test_a_file_without_tools_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, name: str
) -> None:
    file = tmp_path / "tools.json"
    file.write_text(content)
    assert str(file) in error(monkeypatch, capsys, "try", name, "--tools", str(file))


def test_the_page_has_every_template() -> None:
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text("utf-8")
    for row in TEMPLATES.values():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{row.name}` |"))
        for part in (*row.aliases, row.traits.tool_format or "", row.help):
            assert part in line.replace("\\|", "|")
        for stop in row.all_stops:
            assert stop.replace("\n", "\\n") in line.replace("\\|", "|")
