"""4-bit products and expansion for test_triton_compile.py. Gluon kernels are for sm_90 and the versions checked."""

from __future__ import annotations

from typing import Any

from compiling import Constant, KernelCase

from aphrodite.kernels.triton.half_rows import _half_rows_kernel
from aphrodite.kernels.triton.int4_expand import STRIPS, _expand_kernel
from aphrodite.kernels.triton.launch import gluon_version_reason
from aphrodite.kernels.triton.norm import norm_warps

HOPPER = ("sm_90",)


def _common(dtype: str, activation: str | None, *, residual: bool = False, bias: bool = False) -> dict[str, Any]:
    return {
        "words": "*i32",
        "scales": "*i32",
        "bias": f"*{dtype}",
        "residual": f"*{dtype}",
        "out": f"*{dtype}",
        "M": "i32",
        "out_features": "i32:16",
        "strips": "i32:16",
        "HAS_BIAS": bias,
        "HAS_RESIDUAL": residual,
        "ACTIVATION": None if activation is None else Constant(activation),
    }


def _options(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}


def _expand(group: int, *, paired: bool) -> KernelCase:
    return KernelCase(
        name=f"int4_expand-{group}",
        kernel=_expand_kernel,
        arguments={
            "words": "*i32",
            "scales": "*i32",
            "out": "*bf16",
            "out_features": "i32:16",
            "in_features": "i32:16",
            "strips": "i32:16",
            "chunks": "i32:16",
            "groups": "i32:16",
            "GROUP": group,
            "STRIPS": STRIPS,
            "PAIRED": paired,
            "PDL": False,
        },
    )


def _half_rows(in_features: int, block: int, *, norm: bool) -> KernelCase:
    return KernelCase(
        name=f"half_rows-{in_features}",
        kernel=_half_rows_kernel,
        arguments={
            "x": "*bf16",
            "x_stride": "i32:16",
            "norm_weight": "*bf16",
            "eps": "fp32",
            "values": "*fp16",
            "scales": "*fp32",
            "in_features": in_features,
            "BLOCK": block,
            "HAS_NORM": norm,
            "PDL": True,
        },
        num_warps=norm_warps(block),
        targets=HOPPER,
        options=_options(True),
    )


def _gluon_cases() -> list[KernelCase]:
    from triton.experimental.gluon import language as gl

    from aphrodite.kernels.triton import int4_half as half
    from aphrodite.kernels.triton import int4_mma as mma
    from aphrodite.kernels.triton import int4_wgmma as wgmma

    def row(shape: tuple[int, int], group: int, *, dtype: str = "bf16", **parts: Any) -> KernelCase:
        cut = mma.mma_config(*shape, 1, group)
        arguments = {
            "x": f"*{dtype}",
            "norm_weight": f"*{dtype}",
            "eps": "fp32",
            "in_features": shape[1],
            "GROUP": group,
            "N_WARPS": cut.strips,
            "K_WARPS": cut.splits,
            "DEPTH": cut.depth,
            **mma.staging(shape[1], cut),
            "HAS_NORM": parts.pop("norm", False),
            "PDL": True,
        }
        return KernelCase(
            name=f"int4_row-{dtype}-{shape[0]}x{shape[1]}-{group}",
            kernel=mma._int4_row_kernel,
            arguments=arguments | _common(dtype, parts.pop("activation", None), **parts),
            num_warps=cut.strips * cut.splits,
            targets=HOPPER,
            options=_options(True),
        )

    def rows(shape: tuple[int, int], group: int, *, dtype: str = "bf16", **parts: Any) -> KernelCase:
        cut = mma.mma_config(*shape, 8, group)
        arguments = {
            "x": f"*{dtype}",
            "x_stride": "i32:16",
            "in_features": shape[1],
            "GROUP": group,
            "N_WARPS": cut.strips,
            "K_WARPS": cut.splits,
            "DEPTH": cut.depth,
            "STAGES": cut.stages,
            "PDL": True,
        }
        return KernelCase(
            name=f"int4_rows-{dtype}-{shape[0]}x{shape[1]}-{group}",
            kernel=mma._int4_rows_kernel,
            arguments=arguments | _common(dtype, parts.pop("activation", None), **parts),
            num_warps=cut.strips * cut.splits,
            targets=HOPPER,
            options=_options(True),
        )

    def many(
        shape: tuple[int, int], count: int, group: int, *, dtype: str = "bf16", spills: int = 0, **parts: Any
    ) -> KernelCase:
        cut = wgmma.wgmma_config(*shape, count, group)
        kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
        block = [cut.columns, 128 // wgmma.groups_of_chunk(group)]
        layout = gl.NVMMASharedLayout.get_default_for(block, kind)
        arguments = {
            "x": f"tensordesc<{dtype}{block},{layout!r}>",
            "workspace": "*fp32",
            "counters": "*i32",
            "in_features": shape[1],
            "GROUP": group,
            "WARPS": cut.warps,
            "COLUMNS": cut.columns,
            "SPLITS": cut.splits,
            "STAGES": cut.stages,
            "PDL": True,
        }
        return KernelCase(
            name=f"int4_wgmma-{dtype}-{shape[0]}x{shape[1]}-{count}-{group}",
            kernel=wgmma._int4_wgmma_kernel,
            arguments=arguments | _common(dtype, parts.pop("activation", None), **parts),
            num_warps=cut.warps,
            targets=HOPPER,
            spills=spills,
            options=_options(True),
        )

    def most(
        shape: tuple[int, int], count: int, group: int, *, dtype: str = "bf16", spills: int = 0, **parts: Any
    ) -> KernelCase:
        cut = half.half_config(*shape, count)
        block = [cut.columns, 128]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
        arguments = {
            "x": f"tensordesc<fp16{block},{layout!r}>",
            "x_scales": "*fp32",
            "workspace": "*fp32",
            "counters": "*i32",
            "in_features": shape[1],
            "GROUP": group,
            "WARPS": cut.warps,
            "COLUMNS": cut.columns,
            "SPLITS": cut.splits,
            "STAGES": cut.stages,
            "HANDED_ON": 16.0 if "activation" in parts else 0.0,
            "PDL": True,
        }
        return KernelCase(
            name=f"int4_half-{dtype}-{shape[0]}x{shape[1]}-{count}-{group}",
            kernel=half._int4_half_kernel,
            arguments=arguments | _common(dtype, parts.pop("activation", None), **parts),
            num_warps=cut.warps,
            targets=HOPPER,
            spills=spills,
            options=_options(True),
        )

    return [
        row((6144, 4096), 128, norm=True),
        row((28672, 4096), 128, norm=True, activation="silu"),
        row((4096, 2048), 32, norm=True, residual=True, bias=True, dtype="fp16"),
        row((5760, 1024), 64, bias=True, activation="swiglu_oai"),
        rows((4096, 4096), 128, residual=True),
        rows((4096, 8192), 64, residual=True, bias=True),
        rows((28672, 1024), 32, activation="gelu_tanh", dtype="fp16"),
        many((6144, 4096), 16, 128),
        many((28672, 4096), 64, 128, activation="silu"),
        many((4096, 14336), 64, 32, residual=True, bias=True),
        many((4096, 4096), 16, 32, residual=True),
        many((4096, 4096), 16, 64),
        many((28672, 4096), 128, 64, activation="silu", dtype="fp16"),
        most((28672, 4096), 256, 128, activation="silu"),
        most((28672, 4096), 128, 32, activation="gelu_tanh", dtype="fp16"),
        most((6144, 4096), 512, 64, bias=True),
        most((4096, 14336), 256, 128, residual=True),
        most((4096, 14336), 1024, 128, residual=True),
        most((4096, 4096), 100, 4096, residual=True),
        many((4096, 4096), 512, 4096, residual=True, dtype="fp16", spills=8),  # once, where the result is stored
    ]


CASES = [
    _expand(128, paired=True),
    _expand(32, paired=False),
    _half_rows(4096, 4096, norm=True),
    _half_rows(14336, 16384, norm=False),
    *(_gluon_cases() if gluon_version_reason() is None else []),
]
