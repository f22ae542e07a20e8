"""Every kernel configuration that ships compiles for NVIDIA and AMD cards, without register spills."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from compiling import TARGETS, KernelCase, compile_case


def _cases() -> list[tuple[KernelCase, str]]:
    cases: list[KernelCase] = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        cases += importlib.import_module(path.stem).CASES
    return [(case, target) for case in cases for target in case.targets]


@pytest.mark.parametrize(("case", "target"), [pytest.param(c, t, id=f"{c.name}-{t}") for c, t in _cases()])
def test_compiles_without_spills(case: KernelCase, target: str) -> None:
    compiled = compile_case(case, target)
    assert compiled.spills <= case.spills, f"{compiled.spills} spilled, {compiled.registers} registers a thread"
    assert compiled.shared <= TARGETS[target][1], f"{compiled.shared} bytes of shared memory"
