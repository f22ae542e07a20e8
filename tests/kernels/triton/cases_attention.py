"""The attention kernels in the configurations that ship."""

from __future__ import annotations

import torch
import triton
from compiling import KernelCase

from aphrodite.kernels.triton.decode_attention import (
    RECORD,
    DecodeConfig,
    _decode_kernel,
    _plan_kernel,
    combined_at_once,
    decode_config,
    plan_cut,
)
from aphrodite.kernels.triton.paged import Card, KVFormat
from aphrodite.kernels.triton.ragged_attention import (
    MERGE_FIELDS,
    MERGED_ROWS,
    TILE_FIELDS,
    RaggedConfig,
    _merge_kernel,
    _ragged_kernel,
    ragged_config,
)
from aphrodite.kernels.triton.rotary import _rotary_kernel, rotary_config

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CARDS: dict[str, Card] = {"sm_80": "cuda", "sm_90": "hopper", "gfx942": "hip"}
TARGETS = tuple(CARDS)


def _rotary(
    name: str,
    head_dim: int,
    *,
    rotated: int = 0,
    dtype: str = "bf16",
    norm: bool = False,
    fp8: bool = False,
    pdl: bool = False,
    tokens: int = 1,
) -> KernelCase:
    config = rotary_config(tokens, 48, head_dim)
    half = (rotated or head_dim) // 2
    rest = head_dim - 2 * half
    cache = "*u8" if fp8 else f"*{dtype}"
    weight = f"*{dtype}" if norm else None
    return KernelCase(
        name=f"rotary {name}",
        kernel=_rotary_kernel,
        arguments={
            "qkv": f"*{dtype}",
            "keys": cache,
            "values": cache,
            "positions": "*i32",
            "slots": "*i64",
            "cos": "*fp32",
            "sin": "*fp32",
            "query_norm": weight,
            "key_norm": weight,
            "qkv_stride": "i32:16",
            "norm_eps": "fp32",
            "HEADS": 32,
            "KV_HEADS": 8,
            "HEAD_DIM": head_dim,
            "HALF": half,
            "HALF_PAD": triton.next_power_of_2(half),
            "REST_PAD": triton.next_power_of_2(rest) if rest else 0,
            "BLOCK_HEADS": config.block_heads,
            "TABLE_FIRST": config.table_first,
            "BLOCK_SIZE": 16,
            "NORM": norm,
            "KEEP_KEYS": True,
            "FP8": fp8,
            "PDL": pdl,
        },
        num_warps=config.num_warps,
        targets=("sm_90",) if pdl else TARGETS,
    )


def _decode(
    name: str,
    head_dim: int,
    config: DecodeConfig,
    targets: tuple[str, ...],
    *,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    kv: KVFormat = KVFormat.PLAIN,
    softcap: float = 0.0,
    sinks: bool = False,
    pdl: bool = False,
) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    cache = element if kv is KVFormat.PLAIN else "*u8"
    group_pad = triton.next_power_of_2(group)
    dim = triton.next_power_of_2(head_dim)
    pointers = {"query": element, "keys": cache, "values": cache, "out": element}
    return KernelCase(
        name=f"decode attention {name}",
        kernel=_decode_kernel,
        arguments=pointers
        | {"records": "*i32", "counters": "*i32", "block_tables": "*i32", "partials": "*fp32", "statistics": "*fp32"}
        | {"query_stride": "i32:16", "out_stride": "i32:16", "table_stride": "i32:16", "scale": "fp32"}
        | {
            "KV_HEADS": 8,
            "GROUP": group,
            "GROUP_PAD": group_pad,
            "ROWS": max(16, group_pad),
            "HEAD_DIM": head_dim,
            "DIM": dim,
            "BLOCK_SIZE": 16,
            "TILE": config.tile,
            "COMBINE": combined_at_once(group_pad, dim, config.num_warps * 32),
            "SOFTCAP": softcap,
            "sinks": "*fp32",
            "HAS_SINKS": sinks,
            "FORMAT": int(kv),
            "RECORD": RECORD,
            "PDL": pdl,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
    )


def _ragged(
    name: str,
    head_dim: int,
    config: RaggedConfig,
    targets: tuple[str, ...],
    *,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    kv: KVFormat = KVFormat.PLAIN,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    pdl: bool = False,
) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    cache = element if kv is KVFormat.PLAIN else "*u8"
    pointers = {"query": element, "keys": cache, "values": cache, "out": element}
    return KernelCase(
        name=f"ragged attention {name}",
        kernel=_ragged_kernel,
        arguments=pointers
        | {"tiles": "*i32", "query_start": "*i32", "context_lens": "*i32", "rows": "*i32", "block_tables": "*i32"}
        | {"partials": "*fp32", "statistics": "*fp32"}
        | {"query_stride": "i32:16", "out_stride": "i32:16", "table_stride": "i32:16", "scale": "fp32"}
        | {
            "KV_HEADS": 8,
            "GROUP": group,
            "QUERY_ROWS": config.query_rows(group),
            "ROWS": config.rows,
            "HEAD_DIM": head_dim,
            "DIM": triton.next_power_of_2(head_dim),
            "BLOCK_SIZE": 16,
            "TILE": config.tile,
            "WINDOW": window,
            "SOFTCAP": softcap,
            "sinks": "*fp32",
            "HAS_SINKS": sinks,
            "FORMAT": int(kv),
            "FIELDS": TILE_FIELDS,
            "PDL": pdl,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
    )


def _merge(name: str, head_dim: int, *, dtype: str = "bf16", sinks: bool = False, pdl: bool = False) -> KernelCase:
    return KernelCase(
        name=f"ragged merge {name}",
        kernel=_merge_kernel,
        arguments={
            "out": f"*{dtype}",
            "merges": "*i32",
            "query_start": "*i32",
            "partials": "*fp32",
            "statistics": "*fp32",
            "out_stride": "i32:16",
            "KV_HEADS": 8,
            "GROUP": 4,
            "QUERY_ROWS": 32,
            "ROWS": 128,
            "HEAD_DIM": head_dim,
            "DIM": triton.next_power_of_2(head_dim),
            "PART": MERGED_ROWS,
            "sinks": "*fp32",
            "HAS_SINKS": sinks,
            "FIELDS": MERGE_FIELDS,
            "PDL": pdl,
        },
        num_warps=4,
        num_stages=3,
        targets=("sm_90",) if pdl else TARGETS,
    )


def _plan(name: str, sequences: int, window: int) -> KernelCase:
    cut = plan_cut(sequences)
    return KernelCase(
        name=f"decode plan {name}",
        kernel=_plan_kernel,
        arguments={
            "records": "*i32",
            "counters": "*i32",
            "query_start": "*i32",
            "context_lens": "*i32",
            "rows": "*i32",
            "num_sequences": "i32",
            "num_slots": "i32",
            "num_counters": "i32",
            "target": "i32",
            "SEQUENCES_PAD": cut.padded,
            "WINDOW": window,
            "TILE": 64,
            "BLOCK": 1024,
            "OTHERS": cut.others,
            "RECORD": RECORD,
        },
        num_warps=cut.num_warps,
    )


def _attention(target: str) -> list[KernelCase]:
    """Both attention kernels as they ship for `target`."""
    cases: list[KernelCase] = []
    fp8 = KVFormat.E4M3 if target == "sm_90" else KVFormat.E4M3_BITS
    half, single = torch.bfloat16, torch.float32
    padded = (80, 192) if target == "sm_90" else ()
    for head_dim in (64, 128, 256, *padded):
        for dtype in (half, single) if head_dim in (128, 256) else (half,):
            name = f"{head_dim} {NAMES[dtype]}"
            decoding = decode_config(head_dim, dtype, CARDS[target], 8)
            extending = ragged_config(head_dim, dtype, CARDS[target])
            cases.append(_decode(name, head_dim, decoding, (target,), dtype=dtype))
            cases.append(_ragged(name, head_dim, extending, (target,), dtype=dtype))
    for head_dim in (128, 256):
        decoding = decode_config(head_dim, half, CARDS[target], 8)
        extending = ragged_config(head_dim, half, CARDS[target], fp8_cache=True)
        name = f"{head_dim} fp8"
        cases.append(_decode(name, head_dim, decoding, (target,), kv=fp8))
        cases.append(_ragged(name, head_dim, extending, (target,), kv=fp8))
        extending = ragged_config(head_dim, half, CARDS[target])
        name = f"{head_dim} soft-cap and window"
        cases.append(_decode(name, head_dim, decoding, (target,), group=8, softcap=50.0))
        cases.append(_ragged(name, head_dim, extending, (target,), group=2, softcap=50.0, window=4096))
    extending = ragged_config(64, half, CARDS[target])
    cases.append(_decode("64 sinks", 64, decode_config(64, half, CARDS[target], 8), (target,), group=8, sinks=True))
    cases.append(_ragged("64 sinks and window", 64, extending, (target,), group=8, window=128, sinks=True))
    cases.append(_decode("group 1", 128, decode_config(128, half, CARDS[target], 8), (target,), group=1))
    for sequences in (1, 128):
        decoding = decode_config(128, half, CARDS[target], sequences)
        cases.append(_decode(f"batch {sequences}", 128, decoding, (target,)))
        cases.append(_decode(f"batch {sequences} fp8", 128, decoding, (target,), kv=fp8))
    cases.append(_ragged("group 7", 128, ragged_config(128, half, CARDS[target]), (target,), group=7))
    if target == "sm_90":
        cases.append(_decode("pdl", 128, decode_config(128, half, CARDS[target], 8), (target,), pdl=True))
        cases.append(_ragged("pdl", 128, ragged_config(128, half, CARDS[target]), (target,), pdl=True))
    return cases


CASES = [
    _rotary("128", 128),
    _rotary("128 pdl", 128, norm=True, pdl=True),
    _rotary("128 many", 128, tokens=2048),
    _rotary("128 many pdl", 128, norm=True, pdl=True, tokens=2048),
    _rotary("256 many norm fp8", 256, norm=True, fp8=True, tokens=2048),
    _rotary("80 partial fp32", 80, rotated=32, dtype="fp32", norm=True),
    _rotary("256 norm fp8", 256, norm=True, fp8=True),
    _plan("1", 1, 0),
    _plan("256 window", 256, 4096),
    _plan("1024", 1024, 0),
    _merge("128 pdl", 128, pdl=True),
    _merge("256 fp32", 256, dtype="fp32"),
    _merge("64 sinks", 64, sinks=True),
    *(case for target in TARGETS for case in _attention(target)),
]
