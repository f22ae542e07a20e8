"""How Triton kernels are tested without a GPU, and how to add one.

Triton decides when a kernel is *decorated* whether it is compiled or interpreted, so one process cannot do both.

Interpreted, on CPU tensors
    Put tests into `interpreted/test_interpreted_<topic>.py` and import kernels there as usual.
    `test_triton_interpreted.py` runs every such file in a subprocess with TRITON_INTERPRET=1; by hand:

        TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted/test_interpreted_linear.py

    Without the variable the folder is not collected. Keep shapes tiny: the interpreter runs one program after another,
    each operation through numpy. Compare with `aphrodite/kernels/reference.py` in float64, by a tolerance: the
    interpreter cuts float32 off when it stores bfloat16, where hardware rounds, and its `tl.dot` misreads bfloat16
    operands (use float16 or float32 for kernels with a dot). Launchers must not ask for a CUDA
    device: take it from the tensors (`pdl_supported(x.device)` is False for CPU tensors: `launch_options` is empty).

Compiled, without a driver
    Add `cases_<topic>.py` beside this file with `CASES = [KernelCase(...), ...]` (see compiling.py for the notation).
    `test_triton_compile.py` finds it, compiles each case for every target (sm_80, sm_90, gfx942) and fails if it does
    not compile, spills registers or wants more shared memory than a block can have. A case costs 0.1-0.6 s a target the
    first time, so add the configurations that ship and not all that exist; `targets=` narrows a case to the hardware
    that gets it. `compile_case(case, target).asm["ptx"]` is there for tests of their own.

Emulated, what the interpreter does not know: Gluon, inline assembly
    `test_triton_emulated.py` runs the PTX of compiled kernels on numpy (`ptx_emulator.py`), in tenths of a second for a
    few blocks. Races are not found: threads go in lock step, and barriers do nothing.

On a GPU
    tests/gpu/test_gpu_<topic>.py (skipped without one, see tests/gpu/conftest.py).

Where triton is not installed all of this is skipped.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# Not importorskip: this folder's own name would satisfy it where its parent is on the path.
HAS_TRITON = find_spec("triton") is not None and find_spec("triton.language") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob: list[str] = []
if not HAS_TRITON or not INTERPRETED:
    collect_ignore_glob.append("interpreted/*")
if INTERPRETED or not HAS_TRITON:
    collect_ignore_glob.append("test_triton_compile.py")
if not HAS_TRITON:
    collect_ignore_glob.append("test_triton_interpreted.py")


def pytest_report_header() -> str:
    return "triton: " + ("not installed, its tests are left out" if not HAS_TRITON else "installed")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """The interpreter's small tensors only lose by more threads."""
    import torch

    torch.set_num_threads(1)
