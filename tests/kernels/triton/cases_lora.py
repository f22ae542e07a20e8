"""Kernels of adapters for test_triton_compile.py."""

from __future__ import annotations

from compiling import NVIDIA, Constant, KernelCase

from aphrodite.kernels.triton.lora import _expand_kernel, _gated_groups_kernel, _shrink_kernel

EVERYWHERE = (*NVIDIA, "gfx942")


def _shrink(dtype: str, rank: int, parts: int, tile: int, pdl: bool = False) -> KernelCase:
    return KernelCase(
        name=f"shrink-{dtype}-{rank}x{parts}-{tile}{'-pdl' if pdl else ''}",
        kernel=_shrink_kernel,
        arguments={
            "x": f"*{dtype}",
            "x_stride": "i32:16",
            "tiles": "*i32",
            "a": f"*{dtype}",
            "low": "*fp32",
            "num_tiles": "i32",
            "IN": 4096,
            "LOW": rank * parts,
            "BLOCK_LOW": min(64, rank),
            "SPLIT": 512 if tile == 16 else 4096,
            "CHUNK": 64,
            "TILE": tile,
            "PDL": pdl,
        },
        num_warps=4,
        targets=("sm_90",) if pdl else EVERYWHERE,
        options={"launch_pdl": True} if pdl else {},
    )


def _expand(dtype: str, rank: int, parts: int, tile: int, group: int) -> KernelCase:
    return KernelCase(
        name=f"expand-{dtype}-{rank}x{parts}-{tile}-{group}",
        kernel=_expand_kernel,
        arguments={
            "low": "*fp32",
            "tiles": "*i32",
            "b": f"*{dtype}",
            "scales": "*fp32",
            "blocks": "*i32",
            "out": f"*{dtype}",
            "out_stride": "i32:16",
            "num_tiles": "i32",
            "b_rows": "i32:16",
            "GROUP": group,
            "PARTS": parts,
            "RANK": rank,
            "SPLITS": 8 if tile == 16 else 1,
            "COLUMNS": 64,
            "TILE": tile,
            "PDL": False,
        },
        num_warps=4,
        targets=EVERYWHERE,
    )


CASES = [
    _shrink("bf16", 16, 3, 16),
    _shrink("bf16", 16, 3, 16, pdl=True),
    _shrink("bf16", 128, 3, 64),
    _shrink("fp32", 64, 1, 16),
    _expand("bf16", 16, 3, 16, 0),
    _expand("bf16", 128, 2, 64, 1),
    _expand("bf16", 64, 2, 16, 8),
    _expand("fp32", 16, 1, 16, 0),
    KernelCase(
        name="gated_groups-silu-bf16",
        kernel=_gated_groups_kernel,
        arguments={
            "product": "*bf16",
            "out": "*bf16",
            "inner": "i32:16",
            "GROUP": 8,
            "ACTIVATION": Constant("silu"),
            "BLOCK": 1024,
            "PDL": False,
        },
        num_warps=4,
        targets=EVERYWHERE,
    ),
]
