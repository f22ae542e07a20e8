"""fp8 quantization of activations for test_triton_compile.py; cards before 8.9 have no fp8 and do not get it."""

from __future__ import annotations

from compiling import KernelCase

from aphrodite.kernels.triton.norm import norm_warps
from aphrodite.kernels.triton.quantize import _quantize_rows_kernel


def _quantize(values: str, largest: float, target: str, in_features: int, block: int, norm: bool) -> KernelCase:
    pdl = target == "sm_90"
    return KernelCase(
        name=f"quantize_rows-{in_features}{'-norm' if norm else ''}-{values}",
        kernel=_quantize_rows_kernel,
        arguments={
            "x": "*bf16",
            "x_stride": "i32:16",
            "norm_weight": "*bf16",
            "eps": "fp32",
            "values": f"*{values}",
            "scales": "*fp32",
            "in_features": in_features,
            "BLOCK": block,
            "LARGEST": largest,
            "HAS_NORM": norm,
            "PDL": pdl,
        },
        num_warps=norm_warps(block),
        targets=(target,),
        options={"launch_pdl": True} if pdl else {},
    )


CASES = [
    _quantize("fp8e4nv", 448.0, "sm_90", 4096, 4096, norm=True),
    _quantize("fp8e4nv", 448.0, "sm_90", 14336, 16384, norm=False),
    _quantize("fp8e4b8", 240.0, "gfx942", 4096, 4096, norm=True),
]
