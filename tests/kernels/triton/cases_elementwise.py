"""Normalisation and activation kernels, and those of a step's inputs, for test_triton_compile.py."""

from __future__ import annotations

from compiling import NVIDIA, Constant, KernelCase

from aphrodite.kernels.triton.activation import BLOCK, WARPS, _gated_pairs_kernel
from aphrodite.kernels.triton.norm import _rms_norm_kernel, norm_warps
from aphrodite.kernels.triton.step_inputs import _BLOCK, _gather_tokens_kernel, _scatter_kernel


def _norm(dtype: str, hidden: int, block: int, add: bool, pdl: bool = False) -> KernelCase:
    pointer = f"*{dtype}"
    return KernelCase(
        name=f"{'add_' if add else ''}rms_norm-{dtype}-{hidden}{'-pdl' if pdl else ''}",
        kernel=_rms_norm_kernel,
        arguments={
            "x": pointer,
            "x_stride": "i32:16",
            "residual": pointer,
            "residual_stride": "i32:16",
            "weight": pointer,
            "out": pointer,
            "eps": "fp32",
            "hidden": hidden,
            "BLOCK": block,
            "ADD": add,
            "PDL": pdl,
        },
        num_warps=norm_warps(block),
        targets=("sm_90",) if pdl else ("sm_80", "sm_90", "gfx942"),
        options={"launch_pdl": True} if pdl else {},
    )


def _gated(dtype: str, activation: str) -> KernelCase:
    return KernelCase(
        name=f"gated_pairs-{activation}-{dtype}",
        kernel=_gated_pairs_kernel,
        arguments={
            "pairs": f"*{dtype}",
            "out": f"*{dtype}",
            "values": "i32:16",
            "ACTIVATION": Constant(activation),
            "BLOCK": BLOCK,
            "PDL": False,
        },
        num_warps=WARPS,
        targets=(*NVIDIA, "gfx942"),
    )


_NUMBERS = {"rows_ptr": "*i32", "count": "i32", "stride": "i32:16", "BLOCK": _BLOCK, "table_ptr": "*i32"}
CASES = [
    KernelCase("gather tokens", _gather_tokens_kernel, {**_NUMBERS, "tokens_ptr": "*i32", "positions_ptr": "*i32"}),
    KernelCase("scatter", _scatter_kernel, {**_NUMBERS, "columns_ptr": "*i32", "values_ptr": "*i32"}),
    _norm("bf16", 4096, 4096, add=False, pdl=True),
    _norm("bf16", 4096, 4096, add=True),
    _norm("fp32", 576, 1024, add=True),
    _norm("bf16", 16384, 16384, add=True),
    _gated("bf16", "silu"),
    _gated("fp32", "gelu_tanh"),
]
