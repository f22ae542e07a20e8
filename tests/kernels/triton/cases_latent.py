"""The kernels of latent attention in the configurations that ship, in DeepSeek's sizes."""

from __future__ import annotations

import torch
import triton
from compiling import KernelCase

from aphrodite.kernels.triton.decode_attention import RECORD
from aphrodite.kernels.triton.heads_product import PROGRAM_VALUES, _heads_product_kernel
from aphrodite.kernels.triton.heads_product import ROWS as PRODUCT_ROWS
from aphrodite.kernels.triton.latent_cache import GATHER_FIELDS, GATHER_TILE, _cache_kernel, _gather_kernel
from aphrodite.kernels.triton.latent_decode import (
    MERGED_CHUNKS,
    _latent_decode_kernel,
    _latent_merge_kernel,
    latent_decode_config,
)
from aphrodite.kernels.triton.latent_prefill import (
    _absorbed_kernel,
    _expanded_kernel,
    absorbed_config,
    expanded_config,
)
from aphrodite.kernels.triton.paged import Card, KVFormat
from aphrodite.kernels.triton.ragged_attention import TILE_FIELDS

RANK, NOPE, TURNING, VALUE_DIM = 512, 128, 64, 128
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
CARDS: dict[str, Card] = {"sm_80": "cuda", "sm_90": "hopper", "gfx942": "hip"}
LATENT = {"RANK": RANK, "RANK_PAD": RANK, "TURNING": TURNING, "TURNING_PAD": TURNING, "BLOCK_SIZE": 16}


def _cache(target: str, *, fp8: bool = False, pdl: bool = False) -> KernelCase:
    return KernelCase(
        name=f"latent to cache{' fp8' * fp8}{' pdl' * pdl}",
        kernel=_cache_kernel,
        arguments={
            "qkv": "*bf16",
            "cache": "*u8" if fp8 else "*bf16",
            "positions": "*i32",
            "slots": "*i64",
            "cos": "*fp32",
            "sin": "*fp32",
            "norm": "*bf16",
            "qkv_stride": "i32:16",
            "norm_eps": "fp32",
            "HEADS": 16,
            "HEAD_DIM": NOPE + TURNING,
            "RANK": RANK,
            "RANK_PAD": RANK,
            "HALF": TURNING // 2,
            "HALF_PAD": TURNING // 2,
            "BLOCK_HEADS": 16,
            "FP8": fp8,
            "PDL": pdl,
        },
        num_warps=4,
        targets=(target,),
    )


def _gather(target: str, kv: KVFormat) -> KernelCase:
    width = RANK + TURNING
    return KernelCase(
        name=f"gather latents {kv.name}",
        kernel=_gather_kernel,
        arguments={"cache": "*bf16" if kv is KVFormat.PLAIN else "*u8", "out": "*bf16", "sequences": "*i32"}
        | {"context_lens": "*i32", "rows": "*i32", "block_tables": "*i32", "table_stride": "i32:16"}
        | {"WIDTH": width, "WIDTH_PAD": triton.next_power_of_2(width), "BLOCK_SIZE": 16, "TILE": GATHER_TILE}
        | {"FORMAT": int(kv), "FIELDS": GATHER_FIELDS, "PDL": False},
        num_warps=8,
        targets=(target,),
    )


def _decode(target: str, heads: int, dtype: torch.dtype, kv: KVFormat, *, pdl: bool = False) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    config = latent_decode_config(heads, dtype, CARDS[target], fp8_cache=kv is not KVFormat.PLAIN)
    decode = config.decode
    return KernelCase(
        name=f"latent decode {heads} heads {NAMES[dtype]} {kv.name}{' pdl' * pdl}",
        kernel=_latent_decode_kernel,
        arguments={"absorbed": element, "query": element, "cache": element if kv is KVFormat.PLAIN else "*u8"}
        | {"out": element, "records": "*i32", "block_tables": "*i32"}
        | {"partials": "*fp32", "statistics": "*fp32"}
        | {"query_stride": "i32:16", "table_stride": "i32:16", "scale": "fp32"}
        | {"HEADS": heads, "HEAD_DIM": NOPE + TURNING, "HEAD_BLOCKS": config.head_blocks(heads)}
        | {"GROUP": config.heads, "ROWS": max(16, triton.next_power_of_2(config.heads)), "TILE": decode.tile}
        | {"POSITIONS_FIRST": config.positions_first, "FORMAT": int(kv), "RECORD": RECORD, "PDL": pdl}
        | LATENT,
        num_warps=decode.num_warps,
        num_stages=decode.num_stages,
        targets=(target,),
    )


def _heads_product(target: str, into: int, out: int, dtype: torch.dtype, *, pdl: bool = False) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    return KernelCase(
        name=f"heads product {into} to {out} {NAMES[dtype]}{' pdl' * pdl}",
        kernel=_heads_product_kernel,
        arguments={"x": element, "weights": element, "out": element, "rows": "i32"}
        | {"x_stride": "i32:16", "x_head_stride": "i32:16", "out_stride": "i32:16", "out_head_stride": "i32:16"}
        | {"IN": into, "DEPTH": triton.next_power_of_2(into), "OUT": out}
        | {"COLUMNS": max(16, PROGRAM_VALUES // triton.next_power_of_2(into)), "ROWS": PRODUCT_ROWS, "PDL": pdl},
        num_warps=4,
        targets=(target,),
    )


def _merge(target: str, *, pdl: bool = False) -> KernelCase:
    return KernelCase(
        name=f"latent merge{' pdl' * pdl}",
        kernel=_latent_merge_kernel,
        arguments={"out": "*bf16", "records": "*i32", "partials": "*fp32", "statistics": "*fp32"}
        | {"HEADS": 16, "HEAD_BLOCKS": 1, "GROUP": 16, "RANK": RANK, "RANK_PAD": RANK, "CHUNKS": MERGED_CHUNKS}
        | {"RECORD": RECORD, "PDL": pdl},
        num_warps=8,
        targets=(target,),
    )


def _absorbed(target: str, dtype: torch.dtype, kv: KVFormat, *, pdl: bool = False) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    config = absorbed_config(dtype, CARDS[target], fp8_cache=kv is not KVFormat.PLAIN)
    return KernelCase(
        name=f"latent prefill, absorbed {NAMES[dtype]} {kv.name}{' pdl' * pdl}",
        kernel=_absorbed_kernel,
        arguments={"absorbed": element, "query": element, "cache": element if kv is KVFormat.PLAIN else "*u8"}
        | {"out": element, "tiles": "*i32", "query_start": "*i32", "context_lens": "*i32", "rows": "*i32"}
        | {"block_tables": "*i32", "partials": "*fp32", "statistics": "*fp32"}
        | {"query_stride": "i32:16", "table_stride": "i32:16", "scale": "fp32"}
        | {"HEADS": 16, "HEAD_DIM": NOPE + TURNING, "GROUP": 16, "QUERY_ROWS": config.query_rows(16)}
        | {"ROWS": config.rows, "TILE": config.tile, "FORMAT": int(kv), "FIELDS": TILE_FIELDS, "PDL": pdl}
        | LATENT,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        spills=5 if target == "gfx942" and kv is not KVFormat.PLAIN else 0,  # of some 400 registers
    )


def _expanded(
    target: str, dtype: torch.dtype, *, nope: int = NOPE, value_dim: int = VALUE_DIM, pdl: bool = False
) -> KernelCase:
    element = f"*{NAMES[dtype]}"
    config = expanded_config(dtype, CARDS[target], max(nope, value_dim))
    return KernelCase(
        name=f"latent prefill, expanded to {nope} {NAMES[dtype]}{' pdl' * pdl}",
        kernel=_expanded_kernel,
        arguments={"query": element, "keys": element, "shared": element, "values": element, "out": element}
        | {"tiles": "*i32", "key_start": "*i32", "query_start": "*i32", "context_lens": "*i32"}
        | {"query_stride": "i32:16", "positions": "i32", "first_head": "i32"}
        | {
            "scale": "fp32",
            "HEADS": 16,
            "NOPE": nope,
            "NOPE_PAD": triton.next_power_of_2(nope),
            "TURNING": TURNING,
            "TURNING_PAD": TURNING,
        }
        | {"SHARED_STRIDE": RANK + TURNING, "VALUE_DIM": value_dim, "VALUE_PAD": value_dim}
        | {"ROWS": config.rows, "TILE": config.tile, "FIELDS": TILE_FIELDS, "PDL": pdl},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
    )


def _on_hopper() -> list[KernelCase]:
    """All kernels, with dependent launch, in every type."""
    target, half, single, plain, fp8 = "sm_90", torch.bfloat16, torch.float32, KVFormat.PLAIN, KVFormat.E4M3
    return [
        _heads_product(target, 128, 512, half, pdl=True),
        _heads_product(target, 512, 128, single, pdl=True),
        _merge(target, pdl=True),
        _cache(target, pdl=True),
        _cache(target, fp8=True),
        _gather(target, fp8),
        *(_decode(target, 16, dtype, plain, pdl=True) for dtype in (half, single)),
        _decode(target, 16, half, fp8),
        *(_absorbed(target, dtype, plain, pdl=True) for dtype in (half, single)),
        _absorbed(target, half, fp8),
        *(_expanded(target, dtype, pdl=True) for dtype in (half, single)),
        _expanded(target, half, nope=192, value_dim=256),  # GLM 4.7 Flash
    ]


def _elsewhere(target: str) -> list[KernelCase]:
    """What has launch parameters of its own, or another way of reading float8."""
    half, plain, fp8 = torch.bfloat16, KVFormat.PLAIN, KVFormat.E4M3_BITS
    return [
        _heads_product(target, 512, 128, half),
        _decode(target, 20, half, plain),
        _decode(target, 16, half, fp8),
        _absorbed(target, half, plain),
        _absorbed(target, half, fp8),
        _expanded(target, half),
        _expanded(target, half, nope=192, value_dim=256),
    ]


CASES = [*_on_hopper(), *_elsewhere("sm_80"), *_elsewhere("gfx942")]
