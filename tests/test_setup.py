"""Building the native library with compilers that know less, or are not there, as an installation does."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Compiles nothing, and knows no AVX-512.
COMPILER = """\
#!/bin/sh
case " $* " in *" -mavx512f "*) echo "unknown option -mavx512f" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""


def build(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ["--build-lib", str(directory / "lib"), "--build-temp", str(directory / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--force", *folders],
        check=False,
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if name != "CXX"}, **environment},
        capture_output=True,
        text=True,
    )


def libraries(directory: Path) -> list[Path]:
    return list(directory.glob("lib/**/_native.so"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have no such files")
def test_an_instruction_set_that_the_compiler_fails_on_is_told_of_once(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    built = build(tmp_path, CXX=str(compiler))
    assert built.returncode == 0, built.stderr
    assert built.stderr.count("was built without AVX512, which the compiler failed on") == 1
    assert "AVX2," not in built.stderr
    assert len(libraries(tmp_path)) == 1


def test_without_a_compiler_the_package_installs(tmp_path: Path) -> None:
    built = build(tmp_path, CXX=str(tmp_path / "none"))
    assert built.returncode == 0, built.stderr
    assert "the native CPU library was not built" in built.stderr
    assert not libraries(tmp_path)


def test_another_compiler_serves_where_pythons_own_is_not_here(tmp_path: Path) -> None:
    """As where Python was built with g++ and there is clang only."""
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "clang++"
    compiler.write_text(COMPILER.replace("#!/bin/sh", f"#!/bin/sh\n: > '{tmp_path}/asked'"))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    built = build(tmp_path, PATH=str(tmp_path / "bin"))
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "asked").exists()
    assert len(libraries(tmp_path)) == 1
