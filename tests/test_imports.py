"""Which part of the package may know which: imports as the source has them, and what they bring with them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aphrodite

ROOT = Path(aphrodite.__file__).parent

# From the ground up: a part imports those before it, and those it shares a line with.
LAYERS = (
    ("errors", "cores", "platforms", "progress", "logs"),
    ("matching",),
    ("kernels", "quantization"),  # kernels read the layouts, which are repacked by kernels
    ("layers",),
    ("attention",),
    ("loading", "models"),  # a checkpoint asks for its family, which reads the checkpoint
    ("sampling",),
    ("tokenizer",),
    ("chat",),
    ("outputs",),
    ("core",),
    ("runner",),
    ("config_values", "config", "config_file", "settings"),
    ("engine",),
    ("llm", "model_list"),
    ("server",),
    ("client",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# Plain data, which parts below may import, too.
PLAIN_DATA = {"aphrodite.core.plan", "aphrodite.models.spec", "aphrodite.runner.inputs"}

# What runs in processes that compute nothing, and what every command imports before it knows its work.
WITHOUT_TORCH = ("core", "tokenizer", "chat", "matching", "settings", "server", "cli")


def part_of(module: str) -> str:
    """The part that a module of the package belongs to; nothing for the package itself and for others' modules."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "aphrodite" else ""


def modules(*parts: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(("aphrodite", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        if not parts or part_of(name) in parts:
            yield name, path


def runtime_imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, at its top or in a function, but for those that only its annotations need."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_imports_point_downwards() -> None:
    upwards = []
    for name, path in modules():
        part = part_of(name)
        for imported in runtime_imports(path):
            if part and part_of(imported) and imported not in PLAIN_DATA and RANK[part_of(imported)] > RANK[part]:
                upwards.append(f"{name} imports {imported}")
    assert upwards == []


def test_plain_data_knows_plain_data_only() -> None:
    for name, path in modules():
        if name in PLAIN_DATA:
            imported = {module for module in runtime_imports(path) if module.startswith("aphrodite")}
            assert imported <= {"aphrodite.sampling.params"}, name


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_parts_that_do_without_torch(part: str) -> None:
    names = [name for name, _ in modules(part) if not name.endswith("__main__")]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert {"torch", "triton"}.isdisjoint(done.stdout.split()), part


def test_a_machine_without_triton_serves() -> None:
    code = "import sys; sys.modules['triton'] = None; import aphrodite.engine.builder, aphrodite.llm"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_are_empty() -> None:
    for path in sorted(ROOT.glob("**/*/__init__.py")):
        assert not path.read_text(encoding="utf-8").strip(), path
