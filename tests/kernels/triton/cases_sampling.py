"""Sampling kernels for test_triton_compile.py: those of a vocabulary of 128,256."""

from __future__ import annotations

from typing import Any

from compiling import TARGETS, KernelCase

from aphrodite.kernels.triton.logprobs import take_kernel, weigh_kernel
from aphrodite.kernels.triton.sampling import EXACT, LISTING_REGISTERS, MEASURE_REGISTERS
from aphrodite.kernels.triton.sampling_choose import choose_kernel
from aphrodite.kernels.triton.sampling_history import mark_kernel
from aphrodite.kernels.triton.sampling_listed import listed_kernel
from aphrodite.kernels.triton.sampling_measure import measure_kernel
from aphrodite.kernels.triton.sampling_report import report_kernel, settle_kernel
from aphrodite.kernels.triton.sampling_wide import draw_kernel, widen_kernel

_FLOATS = {
    "tops_ptr",
    "pieces_ptr",
    "values_ptr",
    "floats_ptr",
    "work_ptr",
    "scores_ptr",
    "out_ptr",
    "logprobs_ptr",
    "top_logprobs_ptr",
}


def _case(
    kernel: Any, dtype: str = "bf16", warps: int = 4, registers: int = 0, spills: int = 0, **constants: Any
) -> KernelCase:
    """Pointers are of int32 unless named above; integers are not specialised, strides are multiples of 16."""
    jitted = getattr(kernel, "jitted", kernel)  # under `direct_launch` or not
    arguments: dict[str, Any] = {}
    for name in jitted.arg_names:
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
        name=f"{jitted.__name__}-{dtype}-{warps}" + ("-pdl" if constants.get("PDL") else ""),
        kernel=kernel,
        arguments=arguments,
        num_warps=warps,
        options=EXACT
        | ({"launch_pdl": True} if constants.get("PDL") else {})
        | ({"maxnreg": registers} if registers else {}),
        spills=spills,
        targets=("sm_90",) if constants.get("PDL") else tuple(TARGETS),
    )


_LISTED = {"CHUNKS": 1024, "PIECES": 32, "LISTS": True}
CASES = [
    _case(report_kernel, "fp32"),
    _case(settle_kernel),
    _case(weigh_kernel, "fp32"),
    _case(take_kernel, "fp32", CHUNKS=1024, PIECES=16),
]
for _pdl in (False, True):
    CASES += [
        _case(mark_kernel, warps=16, PDL=_pdl),
        _case(measure_kernel, warps=8, registers=MEASURE_REGISTERS, PDL=_pdl),
        _case(measure_kernel, "fp32", warps=8, registers=MEASURE_REGISTERS, PDL=_pdl),
        _case(choose_kernel, warps=8, registers=LISTING_REGISTERS, **_LISTED, SETTLES=True, PDL=_pdl),
        _case(choose_kernel, warps=4, **_LISTED | {"LISTS": False}, SETTLES=True, PDL=_pdl),
        _case(listed_kernel, warps=8, registers=LISTING_REGISTERS, SETTLES=True, PDL=_pdl),
        # Four registers, outside of the passes; half the threads compile without (not timed).
        _case(widen_kernel, warps=16, spills=16, SETTLES=True, PDL=_pdl),
        _case(draw_kernel, warps=8, SETTLES=True, PDL=_pdl),
    ]
