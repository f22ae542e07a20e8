"""`doctor`: what is installed, what this machine can do, which kernels would run and why."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

from aphrodite.cli.console import format_bytes, stderr, stdout
from aphrodite.cli.options import with_options
from aphrodite.config import EngineConfig
from aphrodite.errors import AphroditeError
from aphrodite.settings import Settings

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "msgspec", "pyzmq", "starlette", "uvicorn", "jinja2")

Report = dict[str, dict[str, Any]]


@with_options(EngineConfig)
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    no_load: Annotated[bool, typer.Option("--no-load", help="Do not load the model to see its kernels.")] = False,
    settings: Settings,
) -> None:
    """Report versions, devices, instruction sets, memory, and the kernels chosen and why."""
    report: Report = {
        "Software": _software(),
        "Machine": _machine(),
        "Devices": _devices(),
        "Native CPU library": _native_library(),
        "Settings": _settings(settings),
        "Model": _model(settings.engine, load=not no_load),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = stdout()
    for title, rows in report.items():
        console.print(title, style="bold")
        width = max(20, *map(len, rows))
        for name, value in rows.items():
            console.print(f"  {name:<{width}} {value}" if name else f"  {value}", soft_wrap=True)


def _settings(settings: Settings) -> dict[str, Any]:
    """What is no default, and where it was set."""
    rows = {name: f"{settings.shown(name)} ({origin})" for name, origin in settings.origins.items()}
    return rows or {"": "all have their defaults"}


def _software() -> dict[str, Any]:
    import importlib.metadata

    from aphrodite import __version__

    versions = {"aphrodite": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _machine() -> dict[str, Any]:
    import psutil

    from aphrodite.cli.machine import cpu_model, instruction_sets
    from aphrodite.cores import usable_cores

    memory = psutil.virtual_memory()
    return {
        "processor": cpu_model(),
        "architecture": platform.machine(),
        "instruction sets": " ".join(instruction_sets()) or "not known on this system",
        "cores": f"{usable_cores()} usable, {psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical",
        "memory": f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free",
    }


def _devices() -> dict[str, Any]:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return {"torch": "missing; install it with: pip install torch"}
    with stderr().status("Asking torch for devices"):
        import torch

        from aphrodite import platforms

        reason = platforms.unusable_reason()
    devices: dict[str, Any] = {"cpu": "yes"}
    if reason is not None:
        devices["gpu"] = f"not used: {reason}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            try:
                memory = platforms.memory(torch.device("cuda", index))
                free = f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
            except RuntimeError as error:  # asking takes memory of the card, too, and one that failed tells nothing
                free = "it does not tell its memory: " + str(error).partition("\n")[0]
            devices[f"cuda:{index}"] = f"{platforms.platform_of(torch.device('cuda', index)).describe()}, {free}"
    return devices


def _native_library() -> dict[str, Any]:
    from aphrodite.cli.machine import instruction_sets
    from aphrodite.kernels.cpu import library

    loaded = library.load()
    if loaded is None:
        return {"state": f"not used: {library.unavailable_reason()}"}
    rows = {"state": "loaded", "instruction set": loaded.isa}
    missing = loaded.left_out(instruction_sets())
    if missing:
        rows["left out"] = (
            f"{', '.join(missing)}, which this processor has: the compiler failed on it when the package was installed;"
            " reinstall with a newer one for faster kernels"
        )
    return rows


def _model(config: EngineConfig, *, load: bool) -> dict[str, Any]:
    from aphrodite.cli.sources import load_llm
    from aphrodite.loading.default_model import cache_directory, locate_default_model

    rows: dict[str, Any] = {"cache directory": str(cache_directory(config.cache_dir))}
    if config.model is None:
        found = locate_default_model(config.cache_dir)
        rows["default model"] = str(found) if found else "not here yet; `aphrodite run` fetches it"
        load = load and found is not None
    if not load:
        return rows
    try:
        with stderr().status("Loading the model"):
            llm = load_llm(config)
    except AphroditeError as error:
        return {**rows, "cannot be served": str(error)}
    try:
        kernels = {f"kernel: {name}": choice for name, choice in llm.describe().items()}
        memory = "; ".join(" ".join(line.split()) for line in llm.info.memory_plan)
        return {**rows, "model": llm.info.model, **kernels, "memory": memory}
    finally:
        llm.close()
