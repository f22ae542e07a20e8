"""How the command ends where something comes between: Ctrl-C at any moment, texts that a terminal cannot show."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aphrodite.cli import main as main_module
from aphrodite.cli.console import print_error
from aphrodite.cli.main import main


def set_command(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> None:
    monkeypatch.setattr(main_module, "app", command)


@pytest.mark.skipif(sys.platform == "win32", reason="no signal to send")
def test_ctrl_c_while_modules_are_imported_shows_no_trace(tmp_path: Path) -> None:
    # Stands for any module that takes its time, and is stopped.
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", "utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(main_module.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "aphrodite.cli", "run"],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("wrapped", [False, True])
def test_ctrl_c_is_no_defect_even_where_a_library_wraps_it(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            if not wrapped:
                raise
            raise RuntimeError("error calling __set_name__") from error

    set_command(monkeypatch, interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_defect_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    set_command(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main()


def test_what_the_output_cannot_hold_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    set_command(monkeypatch, lambda: print("the sea 海"))
    main()
    assert written.getvalue() == b"the sea ?\n"


@pytest.mark.parametrize(
    ("no_color", "printed"), [("", "error: \x1b[31mit broke\x1b[0m\n"), ("1", "error: it broke\n")]
)
def test_errors_have_a_colour_unless_nobody_wants_one(
    monkeypatch: pytest.MonkeyPatch, no_color: str, printed: str
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    print_error("it\nbroke")
    assert terminal.getvalue() == printed
