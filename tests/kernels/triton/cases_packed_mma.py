"""Gluon kernels of packed weights for test_triton_compile.py: layouts, rows and shapes of an 8B model."""

from __future__ import annotations

from typing import Any

from cases_packed import _PLANES, _weight
from compiling import Constant, KernelCase

from aphrodite.kernels.triton.launch import gluon_version_reason


def _product(
    name: str,
    shape: tuple[int, int],
    rows: int,
    *,
    gated: bool = False,
    dtype: str = "bf16",
    target: str = "sm_90",
) -> KernelCase:
    from aphrodite.kernels.triton.packed_mma import WARPS, _packed_mma_kernel, packed_mma_cut

    weight: dict[str, Any] = _weight(name, shape[1])
    cut = packed_mma_cut(*shape, rows, _PLANES[name].form.run, weight["GROUP"])
    pdl = target == "sm_90"
    arguments = {
        "x": f"*{dtype}",
        "x_stride": "i32:16",
        **weight,
        "bias": f"*{dtype}",
        "residual": f"*{dtype}",
        "out": f"*{dtype}",
        "out_stride": "i32:16",
        "workspace": "*fp32",
        "counters": "*i32",
        "M": "i32",
        "out_features": "i32:16",
        "one": "i32:16",
        "STRIPS": cut.strips,
        "RUNS": cut.runs,
        "COLUMNS": max(8, rows),
        "SPLITS": cut.splits,
        "STAGES": cut.stages,
        "DEPTH": cut.depth,
        "HAS_BIAS": gated,
        "HAS_RESIDUAL": not gated,
        "ACTIVATION": Constant("silu") if gated else None,
        "PDL": pdl,
    }
    return KernelCase(
        name=f"packed_mma-{name}-{dtype}-{shape[0]}x{shape[1]}-{rows}",
        kernel=_packed_mma_kernel,
        arguments=arguments,
        num_warps=WARPS,
        targets=(target,),
        options={"launch_pdl": True} if pdl else {},
    )


def _cases() -> list[KernelCase]:
    return [
        _product("Q4_K", (28672, 4096), 8, gated=True),
        _product("Q4_K", (4096, 14336), 64),
        _product("Q4_K", (4096, 14336), 16, dtype="fp16", target="sm_80"),
        _product("Q6_K", (128256, 4096), 64),
        _product("Q6_K", (4096, 14336), 8, target="sm_80"),
        _product("Q3_K", (28672, 4096), 32, gated=True),
        _product("Q2_K", (4096, 4096), 8),
        _product("Q5_1", (4096, 4256), 16),
        _product("Q8_0", (28672, 4096), 64, gated=True, dtype="fp16"),
        _product("int4", (4096, 4096), 8, target="sm_80"),
        _product("nf4", (4096, 4096), 16),
        _product("e4m3", (4096, 4096), 32),
    ]


CASES = _cases() if gluon_version_reason() is None else []
