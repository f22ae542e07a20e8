"""Routing and experts' products to compile: Qwen3-30B-A3B dense, Mixtral in 4 bits, GPT-OSS in MXFP4."""

from __future__ import annotations

from typing import Any

from compiling import NVIDIA, Constant, KernelCase

from aphrodite.kernels.triton.grouped_gemm import (
    COMBINE_BLOCK,
    _combine_kernel,
    _gate_kernel,
    _grouped_kernel,
    _pair_down_kernel,
    _pair_gate_up_kernel,
    pair_config,
    tile_config,
)
from aphrodite.kernels.triton.routing import (
    BLOCK_PAIRS,
    _count_kernel,
    _group_kernel,
    _route_kernel,
    _router_kernel,
    _router_row_kernel,
)

HOPPER = ("sm_90",)
DENSE = ("bf16", 16, 0, 32, 0, "none", 0, "dense")
INT4 = ("i32", 4, 0, 128, 0, "zeros", 0, "integer")
MXFP4 = ("i32", 4, 0, 32, 0, "none", 0, "e2m1")
Q4_K = ("i32", 4, 0, 32, 256, "offsets", 0, "integer")
IQ2_XS = ("i64", 2, 0, 16, 256, "none", 0, "iq2_xs")
NAMES = ("LOW_BITS", "HIGH_BITS", "GROUP", "SUPER", "OFFSET", "ZERO", "KIND")


def _weights(kind: tuple[Any, ...], bias: bool = False) -> dict[str, Any]:
    dtype = kind[0]
    form = {
        name: Constant(value) if isinstance(value, str) else value for name, value in zip(NAMES, kind[1:], strict=True)
    }
    scales = "*u8" if kind in (Q4_K, IQ2_XS) else "*bf16" if kind is INT4 else "*fp32"
    return {
        "low": f"*{dtype}",
        "high": f"*{dtype}",
        "scales": scales,
        "super_scales": "*fp16",
        "offsets": "*u8",
        "super_offsets": "*fp16",
        "table": "*i64" if kind is IQ2_XS else "*fp32",
        "bias": "*fp32",
        "HAS_BIAS": bias,
        **form,
    }


def _name(kind: tuple[Any, ...], pdl: bool) -> str:
    names = {DENSE: "dense", INT4: "int4", MXFP4: "mxfp4", Q4_K: "q4_k", IQ2_XS: "iq2_xs"}
    return names[kind] + ("-pdl" if pdl else "")


def _pdl(pdl: bool) -> dict[str, Any]:
    return {"options": {"launch_pdl": True} if pdl else {}, **({"targets": HOPPER} if pdl else {})}


def _pairs(
    shape: tuple[int, int], top_k: int, kind: tuple[Any, ...], *, bias: bool = False, pdl: bool = False
) -> list[KernelCase]:
    hidden, inner = shape
    common = {"x": "*bf16", "chosen": "*i32", "out": "*bf16", "out_features": "i32:16", "TOP_K": top_k, "PDL": pdl}
    first, second = (
        pair_config(2 * inner, hidden, kind is not DENSE), pair_config(hidden, inner, kind is not DENSE)
    )  # fmt: skip
    return [
        KernelCase(
            name=f"pair_gate_up-{hidden}-{_name(kind, pdl)}",
            kernel=_pair_gate_up_kernel,
            arguments=common
            | _weights(kind, bias)
            | {"in_features": hidden, "ROWS": first.rows, "CHUNK": first.chunk, "STAGES": first.stages}
            | {"ACTIVATION": Constant("swiglu_oai" if bias else "silu")},
            num_warps=first.warps,
            **_pdl(pdl),
        ),
        KernelCase(
            name=f"pair_down-{hidden}-{_name(kind, pdl)}",
            kernel=_pair_down_kernel,
            arguments=common
            | _weights(kind, bias)
            | {"in_features": inner, "ROWS": second.rows, "CHUNK": second.chunk, "STAGES": second.stages}
            | {"weights": "*fp32", "residual": "*bf16", "HAS_RESIDUAL": True},
            num_warps=second.warps,
            **_pdl(pdl),
        ),
    ]


def _grouped(
    columns: int, size: int, kind: tuple[Any, ...], *, gated: bool, pdl: bool = False, hip: bool = False
) -> KernelCase:
    cut = tile_config(size, columns, 2, kind is not DENSE, hip)
    targets = ("gfx942",) if hip else HOPPER if pdl else NVIDIA
    return KernelCase(
        name=f"grouped-{columns}-{size}-{'gated-' if gated else ''}{_name(kind, pdl)}{'-hip' if hip else ''}",
        kernel=_grouped_kernel,
        arguments={
            "x": "*bf16",
            "order": "*i32",
            "tile_experts": "*i32",
            "tile_starts": "*i32",
            "tile_ends": "*i32",
            "out": "*bf16",
            "out_features": "i32:16",
            "in_features": columns,
            "SPREAD": 8 if gated else 1,
            "ROWS": cut.rows,
            "PAIRS": cut.pairs,
            "CHUNK": cut.chunk,
            "STAGES": cut.stages,
            "ACTIVATION": Constant("silu") if gated else None,
            "PDL": pdl,
        }
        | _weights(kind),
        num_warps=cut.warps,
        targets=targets,
        options={"launch_pdl": True} if pdl else {},
    )


def _router(rows: int, rest: bool, pdl: bool) -> KernelCase:
    return KernelCase(
        name=f"router-{rows}{'-rest' if rest else ''}{'-pdl' if pdl else ''}",
        kernel=_router_kernel,
        arguments={
            "x": "*bf16",
            "weight": "*bf16",
            "rest": "*bf16",
            "bias": "*fp32",
            "logits": "*fp32",
            "tokens": "i32",
            "experts": 128,
            "hidden": 2048,
            "TOKENS": rows,
            "EXPERTS": rows,
            "CHUNK": 256 if rows == 16 else 64,
            "HAS_REST": rest,
            "HAS_BIAS": rest,
            "PDL": pdl,
        },
        **_pdl(pdl),
    )


def _route(experts: int, top_k: int, scoring: str, groups: int = 1, top_groups: int = 1) -> KernelCase:
    return KernelCase(
        name=f"route-{experts}-{top_k}-{scoring}-{groups}",
        kernel=_route_kernel,
        arguments={
            "logits": "*fp32",
            "correction": "*fp32",
            "experts_out": "*i32",
            "weights_out": "*fp32",
            "weight_scale": "fp32",
            "experts": experts,
            "TOP_K": top_k,
            "SLOTS": 1 << (top_k - 1).bit_length(),
            "groups": groups,
            "TOP_GROUPS": top_groups,
            "GROUPS": groups,
            "SIZE": 1 << (experts // groups - 1).bit_length(),
            "BY_TWO": groups > 1,
            "SCORING": Constant(scoring),
            "NORMALIZE": True,
            "HAS_CORRECTION": groups > 1,
            "PDL": False,
        },
        num_warps=1,
    )


def _router_row(hidden: int, rest: bool, pdl: bool) -> KernelCase:
    return KernelCase(
        name=f"router-row-{hidden}{'-rest' if rest else ''}{'-pdl' if pdl else ''}",
        kernel=_router_row_kernel,
        arguments={
            "x": "*bf16",
            "weight": "*bf16",
            "rest": "*bf16",
            "bias": "*fp32",
            "logits": "*fp32",
            "experts": 128,
            "hidden": hidden,
            "HIDDEN": 1 << (hidden - 1).bit_length(),
            "EXPERTS": 4 if hidden <= 2048 else 2,
            "HAS_REST": rest,
            "HAS_BIAS": rest,
            "PDL": pdl,
        },
        num_warps=4 if hidden <= 4096 else 8,
        **_pdl(pdl),
    )


CASES = [
    _router_row(2048, rest=False, pdl=True),
    _router_row(2880, rest=True, pdl=False),
    _router_row(7168, rest=True, pdl=True),
    _router(16, rest=True, pdl=True),
    _router(64, rest=False, pdl=False),
    _route(128, 8, "softmax"),
    _route(32, 4, "softmax_of_chosen"),
    _route(256, 8, "sigmoid", 8, 4),
    KernelCase(
        name="count_pairs",
        kernel=_count_kernel,
        arguments={"chosen": "*i32", "counts": "*i32", "pairs": "i32", "BLOCK": BLOCK_PAIRS, "PDL": False},
        num_warps=8,
    ),
    *(
        KernelCase(
            name=f"group_pairs-{block}",
            kernel=_group_kernel,
            arguments={
                **dict.fromkeys(("chosen", "counts", "order", "tile_experts", "tile_starts", "tile_ends"), "*i32"),
                "pairs": "i32",
                "tiles": "i32",
                "experts": 128,
                "EXPERTS": 128,
                "TILE": 16,
                "BLOCK": block,
                "COUNTED": counted,
                "PDL": False,
            },
            num_warps=8 if counted else 4,
        )
        for block, counted in ((256, False), (1024, False), (BLOCK_PAIRS, True))
    ),
    *_pairs((2048, 768), 8, DENSE, pdl=True),
    *_pairs((2048, 768), 8, DENSE),
    *_pairs((4096, 14336), 2, INT4, pdl=True),
    *_pairs((4096, 14336), 2, INT4),
    *_pairs((2880, 2880), 4, MXFP4, bias=True, pdl=True),
    _grouped(2048, 16, DENSE, gated=True, pdl=True),
    _grouped(768, 16, DENSE, gated=False),
    _grouped(2048, 32, DENSE, gated=True),
    _grouped(2048, 64, DENSE, gated=True),
    _grouped(2048, 128, DENSE, gated=True),
    _grouped(2048, 16, DENSE, gated=True, hip=True),
    _grouped(2048, 128, DENSE, gated=True, hip=True),
    _grouped(4096, 16, INT4, gated=True, pdl=True),
    _grouped(14336, 64, INT4, gated=False),
    _grouped(4096, 128, INT4, gated=True),
    _grouped(4096, 128, INT4, gated=True, hip=True),
    _grouped(2880, 16, MXFP4, gated=True),
    _grouped(2048, 16, Q4_K, gated=True),
    *_pairs((4096, 14336), 2, IQ2_XS),
    _grouped(4096, 64, IQ2_XS, gated=True),
    _grouped(14336, 16, IQ2_XS, gated=False, hip=True),
    KernelCase(
        name="combine_experts",
        kernel=_combine_kernel,
        arguments={
            "results": "*bf16",
            "weights": "*fp32",
            "residual": "*bf16",
            "out": "*bf16",
            "hidden": 2048,
            "TOP_K": 8,
            "BLOCK": COMBINE_BLOCK,
            "HAS_RESIDUAL": True,
            "PDL": False,
        },
    ),
    KernelCase(
        name="gate_of_shared_experts",
        kernel=_gate_kernel,
        arguments={
            "x": "*bf16",
            "weight": "*fp32",
            "inner": "*bf16",
            "width": "i32:16",
            "hidden": 2048,
            "HIDDEN": 2048,
            "BLOCK": COMBINE_BLOCK,
            "PDL": False,
        },
    ),
]
