"""Runs each file of interpreted/ in a process of its own, where Triton interprets kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_interpreted(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{path.name} under the interpreter:\n{done.stdout[-20_000:]}{done.stderr[-4_000:]}", pytrace=False)
