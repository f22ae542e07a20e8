"""Kernels of packed weights for test_triton_compile.py: the layouts that people load, in the shapes of an 8B model."""

from __future__ import annotations

from typing import Any

import torch
from compiling import TARGETS, Constant, KernelCase
from packed_layouts import random_blocks, random_layouts

from aphrodite.kernels.triton.grid_gemv import grid_gemv_kernel
from aphrodite.kernels.triton.packed_gemm import _expand_kernel, _packed_skinny_kernel, packed_skinny_cut
from aphrodite.kernels.triton.packed_gemv import (
    PACKED_GEMV_MAX_ROWS,
    _packed_gemv_kernel,
    grid_gemv_cut,
    packed_gemv_cut,
)
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.planes import Planes, planes_of
from aphrodite.quantization.types import QuantType

_NOTATION = {
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.float16: "*fp16", torch.float32: "*fp32", torch.bfloat16: "*bf16",
}  # fmt: skip
_BLOCKS = (QuantType.Q4_K, QuantType.Q6_K, QuantType.Q3_K, QuantType.Q2_K, QuantType.Q5_1, QuantType.Q8_0)
_PLANES: dict[str, Planes] = {
    **{qtype.name: planes_of(random_blocks(qtype, 1, 256)) for qtype in (*_BLOCKS, *GRID_FORMS)},
    **{name: planes_of(random_layouts(1, 96)[name]) for name in ("int4", "nf4", "e4m3")},
}
_OF_PLANES = ("low", "high", "scales", "super_scales", "offsets", "super_offsets", "table")


def _weight(name: str, columns: int) -> dict[str, Any]:
    planes = _PLANES[name]
    form = planes.form
    pointers = {part: getattr(planes, part) for part in _OF_PLANES}
    return {
        **{part: _NOTATION[planes.low.dtype if tensor is None else tensor.dtype] for part, tensor in pointers.items()},
        "columns": columns,
        "LOW_BITS": form.low_bits,
        "HIGH_BITS": form.high_bits,
        "GROUP": 128 if name in ("int4", "e4m3") else form.group_size,
        "SUPER": form.super_size,
        "OFFSET": Constant(form.offset),
        "ZERO": form.zero,
        "KIND": Constant(form.kind),
    }


def _product(
    name: str,
    shape: tuple[int, int],
    rows: int,
    *,
    gated: bool = False,
    dtype: str = "bf16",
    pdl: bool = False,
    targets: tuple[str, ...] = tuple(TARGETS),
) -> KernelCase:
    epilogue = {
        "x": f"*{dtype}",
        "x_stride": "i32:16",
        **_weight(name, shape[1]),
        "bias": f"*{dtype}",
        "residual": f"*{dtype}",
        "out": f"*{dtype}",
        "out_stride": "i32:16",
        "out_features": "i32:16",
        "HAS_BIAS": False,
        "HAS_RESIDUAL": not gated,
        "ACTIVATION": Constant("silu") if gated else None,
        "PDL": pdl,
    }
    targets = ("sm_90",) if pdl else targets
    options = {"launch_pdl": True} if pdl else {}
    title = f"packed-{name}-{dtype}-{shape[0]}x{shape[1]}-{rows}{'-pdl' if pdl else ''}"
    if rows > PACKED_GEMV_MAX_ROWS:
        skinny = packed_skinny_cut(*shape, rows, targets == ("gfx942",))
        own = {
            "workspace": "*fp32",
            "counters": "*i32",
            "M": "i32",
            "one": "i32:16",
            "ROWS": skinny.rows,
            "CHUNK": skinny.chunk,
            "COLUMNS": max(16, rows),
            "SPLITS": skinny.splits,
            "STAGES": skinny.stages,
        }
        return KernelCase(
            title, _packed_skinny_kernel, {**epilogue, **own}, skinny.warps, targets=targets, options=options
        )
    form = _PLANES[name].form
    if QuantType.__members__.get(name) in GRID_FORMS:
        cut = grid_gemv_cut(shape[1], rows, gated)
        unused = ("offsets", "super_offsets", "LOW_BITS", "HIGH_BITS", "GROUP", "SUPER", "OFFSET", "ZERO")
        own = {part: value for part, value in epilogue.items() if part not in unused}
        own |= {"norm_weight": f"*{dtype}", "eps": "fp32", "HAS_NORM": gated, "M": rows, "PTX": targets != ("gfx942",)}
        own |= {"passes": "i32", "one": "i32:16", "ROWS": cut.rows, "CHUNK": cut.chunk}
        return KernelCase(title, grid_gemv_kernel, own, cut.warps, targets=targets, options=options)
    cut = packed_gemv_cut(shape[1], rows, form.low_bits + form.high_bits)
    own = {"norm_weight": f"*{dtype}", "eps": "fp32", "HAS_NORM": gated, "M": rows}
    own |= {"passes": "i32", "one": "i32:16", "ROWS": cut.rows, "CHUNK": cut.chunk}
    return KernelCase(title, _packed_gemv_kernel, {**epilogue, **own}, cut.warps, targets=targets, options=options)


def _expansion(name: str, target: str) -> KernelCase:
    arguments = {
        **_weight(name, 4096), "numbers": "*i32", "out": "*bf16", "first_row": "i32", "end_row": "i32", "ROWS": 4,
        "CHUNK": 1024, "HAS_NUMBERS": name == "Q4_K", "PDL": False,
    }  # fmt: skip
    return KernelCase(f"packed-{name}-expansion", _expand_kernel, arguments, targets=(target,))


# Each layout once, on one target, for compiling is what takes the time; what people load most on all.
CASES = [
    _product("Q4_K", (28672, 4096), 1, gated=True, pdl=True),
    _product("Q4_K", (4096, 14336), 1),
    _product("Q6_K", (4096, 14336), 1, targets=("sm_90", "gfx942")),
    _product("Q3_K", (28672, 4096), 1, gated=True, targets=("sm_90",)),
    _product("Q2_K", (4096, 4096), 1, targets=("sm_80",)),
    _product("Q5_1", (4096, 4096), 2, targets=("sm_90",)),
    _product("Q8_0", (28672, 4096), 1, gated=True, targets=("sm_80",)),
    _product("int4", (28672, 4096), 2, gated=True, targets=("gfx942",)),
    _product("nf4", (4096, 4096), 1, targets=("sm_90",)),
    _product("e4m3", (4096, 4096), 1, targets=("gfx942",)),
    _product("IQ2_XS", (57344, 8192), 1, gated=True, pdl=True),
    _product("IQ2_XXS", (28672, 4096), 2, gated=True, targets=("sm_90",)),
    _product("IQ2_S", (8192, 28672), 1, targets=("sm_80",)),
    _product("IQ3_XXS", (4096, 14336), 2, targets=("gfx942",)),
    _product("IQ3_S", (4096, 14336), 1, targets=("sm_90",)),
    _product("IQ1_S", (8192, 28672), 1, targets=("gfx942",)),
    _product("IQ1_M", (28672, 4096), 2, gated=True, dtype="fp16", targets=("sm_80",)),
    _product("TQ1_0", (4096, 4096), 2, targets=("sm_90",)),
    _product("IQ2_XS", (57344, 8192), 64, gated=True, targets=("sm_90",)),
    _product("IQ3_S", (4096, 14336), 8, targets=("gfx942",)),
    _expansion("IQ2_XXS", "gfx942"),
    _expansion("IQ1_M", "sm_80"),
    _product("Q4_K", (4096, 14336), 8, pdl=True),
    _product("Q6_K", (128256, 4096), 64, dtype="fp16", targets=("sm_80",)),
    _product("e4m3", (28672, 4096), 64, gated=True, targets=("sm_90",)),
    _product("Q4_K", (28672, 4096), 64, gated=True, targets=("gfx942",)),
    _expansion("Q4_K", "sm_90"),
    _expansion("Q6_K", "gfx942"),
]
