"""Every kernel configuration that ships compiles for NVIDIA and AMD cards, without register spills.

Kernels are cut for Triton 3.6, with which they were measured. With 3.7 two of them need two registers more on sm_80; so
much is let pass with other versions, and no more.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import triton
from compiling import TARGETS, KernelCase, compile_case

MEASURED_VERSION = "3.6."
LATER_SPILLS = 8  # bytes


def _cases() -> list[tuple[KernelCase, str]]:
    cases: list[KernelCase] = []
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        cases += importlib.import_module(path.stem).CASES
    return [(case, target) for case in cases for target in case.targets]


@pytest.mark.parametrize(("case", "target"), [pytest.param(c, t, id=f"{c.name}-{t}") for c, t in _cases()])
def test_compiles_without_spills(case: KernelCase, target: str) -> None:
    compiled = compile_case(case, target)
    accepted = case.spills if triton.__version__.startswith(MEASURED_VERSION) else max(case.spills, LATER_SPILLS)
    assert compiled.spills <= accepted, f"{compiled.spills} spilled, {compiled.registers} registers a thread"
    assert compiled.shared <= TARGETS[target][1], f"{compiled.shared} bytes of shared memory"
