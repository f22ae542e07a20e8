"""Dense products on wgmma for test_triton_compile.py: for sm_90 and the versions of Triton checked with Gluon."""

from __future__ import annotations

from typing import Any

from compiling import Constant, KernelCase

from aphrodite.kernels.triton.dense_cuts import DenseConfig, dense_config
from aphrodite.kernels.triton.launch import gluon_version_reason


def _gluon_cases() -> list[KernelCase]:
    from triton.experimental.gluon import language as gl

    from aphrodite.kernels.triton.dense_wgmma import _dense_kernel

    def case(
        shape: tuple[int, int],
        rows: int,
        *,
        dtype: str = "bf16",
        activation: str | None = None,
        residual: bool = False,
        bias: bool = False,
        cut: DenseConfig | None = None,
    ) -> KernelCase:
        cut = cut or dense_config(*shape, rows)
        kind = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

        def descriptor(block: list[int]) -> str:
            return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, kind)!r}>"

        arguments: dict[str, Any] = {
            "x": descriptor([cut.part, cut.chunk]),
            "weight": descriptor([cut.columns, cut.chunk]),
            "bias": f"*{dtype}",
            "residual": f"*{dtype}",
            "out": f"*{dtype}",
            "workspace": "*fp32",
            "counters": "*i32",
            "M": "i32",
            "out_features": "i32:16",
            "in_features": shape[1],
            "PARTS": cut.parts,
            "SPLITS": cut.splits,
            "STAGES": cut.stages,
            "WARPS": cut.warps,
            "HAS_BIAS": bias,
            "HAS_RESIDUAL": residual,
            "ACTIVATION": None if activation is None else Constant(activation),
            "PDL": True,
        }
        return KernelCase(
            name=f"dense-{dtype}-{shape[0]}x{shape[1]}-{rows}",
            kernel=_dense_kernel,
            arguments=arguments,
            num_warps=cut.warps,
            targets=("sm_90",),
            options={"launch_pdl": True},
        )

    return [
        case((28672, 4096), 64, activation="silu"),
        case((28672, 4096), 144, activation="silu"),
        case((28672, 4096), 256, activation="gelu_tanh", dtype="fp16"),
        case((6144, 4096), 128, bias=True),
        case((4096, 14336), 144, residual=True),
        case((4096, 4096), 256, residual=True, bias=True),
        case((1024, 2048), 48, residual=True, cut=DenseConfig(1, 64, 32, 4, 8, 64, 4)),
        case((4096, 1024), 144, cut=DenseConfig(3, 64, 64, 2, 3, 64, 8)),
        case((128256, 4096), 144),
    ]


CASES = _gluon_cases() if gluon_version_reason() is None else []
