"""Sampling kernels for test_triton_compile.py: those of a vocabulary of 128,256."""

from __future__ import annotations

from typing import Any

from compiling import KernelCase

from aphrodite.kernels.triton.sampling import (
    EXACT,
    choose_kernel,
    draw_kernel,
    finish_kernel,
    report_kernel,
    widen_kernel,
)
from aphrodite.kernels.triton.sampling_history import mark_kernel, unmark_kernel
from aphrodite.kernels.triton.sampling_measure import measure_kernel

_FLOATS = {"tops_ptr", "pieces_ptr", "values_ptr", "floats_ptr", "work_ptr", "scores_ptr", "out_ptr"}


def _case(kernel: Any, dtype: str = "bf16", warps: int = 4, **constants: int) -> KernelCase:
    """Pointers are of int32 unless named above; integers are not specialised, strides are multiples of 16."""
    arguments: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = constants[name]
        elif name == "logits_ptr":
            arguments[name] = f"*{dtype}"
        elif name in {"out_ok_ptr", "out_exhausted_ptr"}:
            arguments[name] = "*i1"
        elif name.endswith("_ptr"):
            arguments[name] = "*fp32" if name in _FLOATS else "*i32"
        else:
            arguments[name] = "i32:16" if name == "logits_stride" else "i32"
    return KernelCase(
        name=f"{kernel.__name__}-{dtype}",
        kernel=kernel,
        arguments=arguments,
        num_warps=warps,
        options=EXACT,
    )


CASES = [
    _case(mark_kernel, warps=8),
    _case(unmark_kernel),
    _case(measure_kernel, warps=8),
    _case(measure_kernel, "fp32", warps=8),
    _case(choose_kernel, CHUNKS=1024, PIECES=32),
    _case(widen_kernel, warps=16),
    _case(draw_kernel),
    _case(report_kernel, "fp32"),
    _case(finish_kernel, DRAWS=128),
]
