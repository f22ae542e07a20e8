"""GEMV and skinny GEMM configurations for test_triton_compile.py: the shapes of an 8B and a 0.6B model."""

from __future__ import annotations

from typing import Any

from compiling import NVIDIA, TARGETS, Constant, KernelCase

from aphrodite.kernels.triton.gated_gemm import DEFAULT, _gated_gemm_kernel
from aphrodite.kernels.triton.linear import _gemv_kernel, _skinny_kernel, gemv_config, padded_rows, skinny_config

HOPPER = ("sm_90",)


def _epilogue(dtype: str, activation: str | None, residual: bool, bias: bool, pdl: bool) -> dict[str, Any]:
    return {
        "bias": f"*{dtype}",
        "residual": f"*{dtype}",
        "out": f"*{dtype}",
        "out_features": "i32:16",
        "HAS_BIAS": bias,
        "HAS_RESIDUAL": residual,
        "ACTIVATION": None if activation is None else Constant(activation),
        "PDL": pdl,
    }


def _gemv(
    shape: tuple[int, int],
    rows: int,
    *,
    dtype: str = "bf16",
    norm: bool = False,
    activation: str | None = None,
    residual: bool = False,
    bias: bool = False,
    pdl: bool = False,
    weight: str | None = None,
) -> KernelCase:
    config = gemv_config(*shape, rows, 1 if weight else 4 if dtype == "fp32" else 2)
    return KernelCase(
        name=f"gemv-{weight or dtype}-{shape[0]}x{shape[1]}-{rows}{'-pdl' if pdl else ''}",
        kernel=_gemv_kernel,
        arguments={
            "x": f"*{dtype}",
            "x_stride": "i32:16",
            "norm_weight": f"*{dtype}",
            "eps": "fp32",
            "weight": f"*{weight or dtype}",
            "weight_scale": "*fp32",
            "in_features": shape[1],
            "M": rows,
            "ROWS": config.rows,
            "CHUNK": config.chunk,
            "DEPTH": config.depth,
            "HAS_NORM": norm,
            "HAS_SCALE": weight is not None,
        }
        | _epilogue(dtype, activation, residual, bias, pdl),
        num_warps=config.warps,
        targets=HOPPER if pdl else ("gfx942",) if weight else tuple(TARGETS),
        options={"launch_pdl": True} if pdl else {},
    )


def _skinny(
    shape: tuple[int, int],
    rows: int,
    *,
    dtype: str = "bf16",
    activation: str | None = None,
    residual: bool = False,
    bias: bool = False,
    pdl: bool = False,
    hip: bool = False,
) -> KernelCase:
    config = skinny_config(*shape, rows, hip)
    return KernelCase(
        name=f"skinny-{dtype}-{shape[0]}x{shape[1]}-{rows}{'-pdl' if pdl else ''}",
        kernel=_skinny_kernel,
        arguments={
            "x": f"*{dtype}",
            "x_stride": "i32:16",
            "weight": f"*{dtype}",
            "workspace": "*fp32",
            "counters": "*i32",
            "M": "i32",
            "in_features": shape[1],
            "ROWS": config.rows,
            "CHUNK": config.chunk,
            "COLUMNS": padded_rows(rows),
            "SPLITS": config.splits,
            "STAGES": config.stages,
            "AHEAD": config.ahead,
        }
        | _epilogue(dtype, activation, residual, bias, pdl),
        num_warps=config.warps,
        targets=HOPPER if pdl else ("gfx942",) if hip else NVIDIA,
        options={"launch_pdl": True} if pdl else {},
    )


def _gated_gemm(in_features: int, activation: str) -> KernelCase:
    return KernelCase(
        name=f"gated_gemm-{in_features}-{activation}",
        kernel=_gated_gemm_kernel,
        arguments={
            "x": f"tensordesc<bf16[{DEFAULT.rows}, {DEFAULT.chunk}]>",
            "weight": f"tensordesc<bf16[{DEFAULT.columns}, {DEFAULT.chunk}]>",
            "out": f"tensordesc<bf16[{DEFAULT.rows}, {DEFAULT.columns // 2}]>",
            "rows": "i32",
            "out_features": "i32:16",
            "in_features": in_features,
            "ROWS": DEFAULT.rows,
            "COLUMNS": DEFAULT.columns,
            "CHUNK": DEFAULT.chunk,
            "GROUP": DEFAULT.group,
            "STAGES": DEFAULT.stages,
            "ACTIVATION": Constant(activation),
        },
        num_warps=DEFAULT.warps,
        targets=HOPPER,
    )


CASES = [
    _gated_gemm(4096, "silu"),
    _gated_gemm(1024, "gelu_tanh"),
    _gemv((6144, 4096), 1, norm=True, pdl=True),
    _gemv((4096, 4096), 1, residual=True, pdl=True),
    _gemv((28672, 4096), 1, norm=True, activation="silu", pdl=True),
    _gemv((4096, 14336), 1, residual=True),
    _gemv((28672, 4096), 2, norm=True, activation="silu"),
    _gemv((28672, 4096), 4, norm=True, activation="silu"),
    _gemv((4096, 14336), 4, residual=True, pdl=True),
    _gemv((4096, 1024), 1, norm=True),
    _gemv((1024, 3072), 4, residual=True),
    _gemv((28672, 4096), 1, norm=True, activation="silu", weight="fp8e4nv", pdl=True),
    _gemv((28672, 4096), 4, norm=True, activation="silu", weight="fp8e4nv", pdl=True),
    _gemv((4096, 14336), 4, residual=True, weight="fp8e4nv", pdl=True),
    _gemv((1024, 3072), 1, residual=True, weight="fp8e4nv", pdl=True),
    _gemv((6144, 4096), 1, norm=True, weight="fp8e4b8"),
    _gemv((960, 576), 4, dtype="fp32", norm=True, bias=True),
    _gemv((3072, 576), 4, dtype="fp32", norm=True, activation="gelu_tanh"),
    _skinny((6144, 4096), 8, pdl=True),
    _skinny((28672, 4096), 8, activation="silu"),
    _skinny((28672, 4096), 64, activation="silu", pdl=True),
    _skinny((4096, 14336), 8, residual=True),
    _skinny((4096, 14336), 64, residual=True),
    _skinny((1024, 3072), 32, residual=True, dtype="fp16", bias=True),
    _skinny((896, 4864), 32, residual=True),
    _skinny((28672, 4096), 64, activation="silu", hip=True),
    _skinny((4096, 14336), 8, residual=True, hip=True),
    _skinny((4096, 14336), 64, residual=True, hip=True),
]
