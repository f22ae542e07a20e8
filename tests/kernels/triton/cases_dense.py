"""Dense products on wgmma for test_triton_compile.py: for sm_90 and the versions of Triton checked with Gluon."""

from __future__ import annotations

from typing import Any

from compiling import Constant, KernelCase

from aphrodite.kernels.triton.dense_cuts import MEASURED, NARROW, WIDE, DenseConfig
from aphrodite.kernels.triton.launch import gluon_version_reason


def _gluon_cases() -> list[KernelCase]:
    from triton.experimental.gluon import language as gl

    from aphrodite.kernels.triton.dense_wgmma import _dense_kernel

    def case(
        shape: tuple[int, int],
        cut: DenseConfig,
        *,
        dtype: str = "bf16",
        activation: str | None = None,
        residual: bool = False,
        bias: bool = False,
    ) -> KernelCase:
        kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

        def descriptor(block: list[int]) -> str:
            return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, kind)!r}>"

        arguments: dict[str, Any] = {
            "x": descriptor([cut.part, cut.chunk]),
            "weight": descriptor([cut.columns, cut.chunk]),
            "bias": f"*{dtype}",
            "residual": f"*{dtype}",
            "out": f"*{dtype}",
            "M": "i32",
            "out_features": "i32:16",
            "in_features": shape[1],
            "PARTS": cut.parts,
            "STAGES": cut.stages,
            "WARPS": cut.warps,
            "ROTATED": cut.rotated,
            "HAS_BIAS": bias,
            "HAS_RESIDUAL": residual,
            "ACTIVATION": None if activation is None else Constant(activation),
            "PDL": True,
        }
        return KernelCase(
            name=f"dense-{dtype}-{shape[0]}x{shape[1]}-{cut.parts * cut.part}",
            kernel=_dense_kernel,
            arguments=arguments,
            num_warps=cut.warps,
            targets=("sm_90",),
            options={"launch_pdl": True},
        )

    gate_up = [cut for _, cut in MEASURED[28672, 4096]]
    return [
        case((28672, 4096), WIDE, activation="silu"),
        *(case((28672, 4096), cut, activation="silu") for cut in gate_up),
        case((28672, 4096), gate_up[-1], activation="gelu_tanh", dtype="fp16", bias=True),
        case((6144, 4096), NARROW, bias=True),
        case((4096, 14336), NARROW, residual=True),
        case((4096, 4096), DenseConfig(2, 128, 64, 5, 64, 8, True), residual=True, bias=True),
        case((1024, 2048), DenseConfig(1, 64, 32, 8, 64, 4), residual=True),
        *(case(shape, cuts[0][1], residual=True) for shape, cuts in MEASURED.items() if shape != (28672, 4096)),
    ]


CASES = _gluon_cases() if gluon_version_reason() is None else []
