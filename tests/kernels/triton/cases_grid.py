"""Gluon kernels of points of a grid for test_triton_compile.py: kinds and shapes of models of 8B and 70B."""

from __future__ import annotations

from typing import Any

from cases_packed import _PLANES, _weight
from compiling import TARGETS, Constant, KernelCase

from aphrodite.kernels.triton.launch import ceil_div, gluon_version_reason, next_power_of_2

_POINTERS = ("low", "high", "scales", "super_scales")
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}


def _shared_arguments(name: str, shape: tuple[int, int], gated: bool, dtype: str) -> dict[str, Any]:
    weight, width = _weight(name, shape[1]), shape[0] // 2 if gated else shape[0]
    return {
        **{part: weight[part] for part in _POINTERS},
        "x_stride": "i32:16",
        "table": "*i32",
        "bias": f"*{dtype}",
        "residual": f"*{dtype}",
        "out": f"*{dtype}",
        "out_stride": "i32" if width % 16 else "i32:16",
        "out_features": "i32" if shape[0] % 16 else "i32:16",
        "columns": shape[1],
        "KIND": weight["KIND"],
        "HAS_BIAS": False,
        "HAS_RESIDUAL": not gated,
        "ACTIVATION": Constant("silu") if gated else None,
    }


def row_case(
    name: str,
    shape: tuple[int, int],
    rows: int,
    *,
    gated: bool = False,
    normed: bool | None = None,
    dtype: str = "bf16",
    target: str = "sm_90",
    cut: Any = None,
    multiprocessors: int | None = None,
) -> KernelCase:
    """`grid_row` of 1 or 2 rows; with a norm where there is an activation, unless `normed` says otherwise."""
    from aphrodite.kernels.triton.grid_gluon import Card
    from aphrodite.kernels.triton.grid_row import grid_row_cut, grid_row_kernel, staging

    normed = gated if normed is None else normed
    card = Card(multiprocessors or _MULTIPROCESSORS[target], TARGETS[target][1])
    cut = cut or grid_row_cut(*shape, rows, normed, _PLANES[name].form.kind, card)
    programs = cut.programs(shape[0], card.multiprocessors)
    arguments = {
        **_shared_arguments(name, shape, gated, dtype),
        "x": f"*{dtype}",
        "norm_weight": f"*{dtype}",
        "eps": "fp32",
        "tiles": "i32",
        "COPIES": cut.copies,
        "M": rows,
        "K_WARPS": cut.splits,
        "N_WARPS": cut.across,
        "STRIPS": cut.strips,
        "RUNS": cut.runs,
        "DEPTH": cut.depth,
        "TILES": next_power_of_2(ceil_div(ceil_div(shape[0], cut.tile), programs)),
        **staging(shape[1], cut),
        "HAS_NORM": normed,
        "PDL": target == "sm_90",
    }
    warps = cut.splits * cut.across
    options = {"maxnreg": cut.registers} | ({"launch_pdl": True} if target == "sm_90" else {})
    title = f"grid_row-{name}-{dtype}-{shape[0]}x{shape[1]}-{rows}"
    return KernelCase(title, grid_row_kernel, arguments, warps, targets=(target,), options=options)


def mma_case(
    name: str,
    shape: tuple[int, int],
    rows: int,
    *,
    gated: bool = False,
    scaled: bool = True,
    dtype: str = "bf16",
    target: str = "sm_90",
    cut: Any = None,
) -> KernelCase:
    """`grid_mma` of 3 to 64 rows."""
    from aphrodite.kernels.triton.grid_gluon import Card
    from aphrodite.kernels.triton.grid_mma import grid_mma_cut, grid_mma_kernel

    card = Card(_MULTIPROCESSORS[target], TARGETS[target][1])
    cut = cut or grid_mma_cut(*shape, rows, _PLANES[name].form.kind, card)
    arguments = {
        **_shared_arguments(name, shape, gated, dtype),
        "x": "*fp16",
        "x_scales": "*fp32",
        "workspace": "*fp32",
        "counters": "*i32",
        "M": "i32",
        "COPIES": cut.copies,
        "STRIPS": cut.strips,
        "RUNS": cut.runs,
        "COLUMNS": max(8, next_power_of_2(rows)),
        "SPLITS": cut.splits,
        "STAGES": cut.stages,
        "DEPTH": cut.depth,
        "HAS_SCALES": scaled,
        "PDL": target == "sm_90",
    }
    options = {"launch_pdl": True} if target == "sm_90" else {}
    title = f"grid_mma-{name}-{dtype}-{shape[0]}x{shape[1]}-{rows}"
    return KernelCase(title, grid_mma_kernel, arguments, cut.warps, targets=(target,), options=options)


def _cases() -> list[KernelCase]:
    return [
        row_case("IQ2_XS", (57344, 8192), 1, gated=True),
        row_case("IQ2_XXS", (28672, 4096), 2, gated=True),
        row_case("IQ2_S", (8192, 28672), 1),
        row_case("IQ3_XXS", (4096, 14336), 2, target="sm_80"),
        row_case("IQ3_S", (4096, 14336), 1, dtype="fp16"),
        row_case("IQ1_S", (8192, 28672), 1, target="sm_80"),
        row_case("IQ1_M", (28672, 4096), 2, gated=True, dtype="fp16"),
        row_case("TQ1_0", (4096, 4096), 2),
        mma_case("IQ2_XS", (57344, 8192), 64, gated=True),
        mma_case("IQ2_XXS", (28672, 4096), 8, gated=True, target="sm_80"),
        mma_case("IQ2_S", (4096, 14336), 16),
        mma_case("IQ3_S", (4096, 14336), 32, dtype="fp16"),
        mma_case("IQ1_M", (4096, 4096), 8),
        mma_case("TQ1_0", (28672, 4096), 8, gated=True),
    ]


CASES = _cases() if gluon_version_reason() is None else []
