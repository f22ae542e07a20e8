"""Latent attention's kernels and back end against expanded keys and values in float64, interpreted on CPU tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from latent_case import FP8, LatentCase, lengths_of, make_latent_case

from aphrodite.attention import latent_triton
from aphrodite.attention.latent_triton import TritonLatentAttention, expands
from aphrodite.kernels.triton.heads_product import heads_product
from aphrodite.kernels.triton.latent_decode import LatentDecodeConfig, latent_decode_config
from aphrodite.models.spec import MlaSpec

SMALL = MlaSpec(q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
MIXED = [(1, 40), (33, 33), (1, 3), (5, 30), (18, 60)]


def serve(case: LatentCase, pairs: list[tuple[int, int]], *, decode_only: bool = False) -> TritonLatentAttention:
    """One layer's step, compared with the reference; padding rows behind its tokens stay finite."""
    backend = TritonLatentAttention(case.shape, case.transform)
    lengths = None if decode_only else lengths_of(pairs)
    table = np.zeros(0, dtype=np.int32) if lengths is None else backend.stage_step(lengths)
    cache = case.cache
    untouched = cache.keys[0].clone()
    step = backend.begin_step(case.inputs(lengths, table), cache)
    out = step(1, torch.cat((case.qkv, torch.full((2, case.qkv.shape[1]), 3.0, dtype=case.qkv.dtype))))
    expected, written = case.expected()
    exact = case.shape.dtype == torch.float32
    atol = 3e-6 if exact else 4e-3
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[: len(expected)].double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(
        cache.keys[1].float().double(), written, rtol=0 if exact else 0.13, atol=2e-6 if exact else 4e-3, equal_nan=True
    )
    bits = torch.uint8 if untouched.dtype == FP8 else torch.int32 if exact else torch.int16
    assert torch.equal(cache.keys[0].view(bits), untouched.view(bits))
    return backend


@pytest.mark.parametrize(("heads", "positions_first"), [(3, False), (20, False), (20, True)])
def test_decode_step_with_padding(heads: int, positions_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper positions are the rows of the products."""
    pairs = [(1, 40), (1, 0), (1, 9), (1, 130)]

    def config(*args: Any, **options: Any) -> LatentDecodeConfig:
        return latent_decode_config(*args, **options)._replace(positions_first=positions_first)

    monkeypatch.setattr(latent_triton, "latent_decode_config", config)
    serve(make_latent_case(pairs, SMALL, heads=heads), pairs, decode_only=True)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_product_of_each_head_with_its_own_matrix(rows: int) -> None:
    queries, weights = torch.randn(rows, 3, 30), torch.randn(3, 40, 20)
    out = torch.full((rows, 3, 50), 7.0)
    heads_product(queries[..., 5:25], weights, out[..., :40])
    expected = torch.einsum("thi,hoi->tho", queries[..., 5:25].double(), weights.double())
    torch.testing.assert_close(out[..., :40].double(), expected, rtol=0, atol=1e-5)
    assert (out[..., 40:] == 7.0).all()


def test_mixed_step_absorbed() -> None:
    serve(make_latent_case(MIXED, SMALL, heads=6), MIXED)


def test_mixed_step_with_expanded_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of expanded sequences, head by head, between absorbed ones."""
    monkeypatch.setattr(latent_triton, "expands", lambda query, context, mla: query > 10)
    monkeypatch.setattr(latent_triton, "GROUP_POSITIONS", 40)
    monkeypatch.setattr(latent_triton, "EXPANDED_BYTES", 12_000)
    serve(make_latent_case(MIXED, SMALL, heads=3), MIXED)


def test_float8_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_triton, "expands", lambda query, context, mla: query > 20)
    pairs = [(1, 40), (22, 40), (5, 30)]
    serve(make_latent_case(pairs, SMALL, heads=2, dtype=torch.float16, cache_dtype=FP8), pairs)


def test_long_prompts_are_expanded_and_short_ones_after_much_are_not() -> None:
    deepseek = MlaSpec(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    query, context = np.array([1, 2, 2048, 64, 64, 2048, 512]), np.array([1, 2, 2048, 64, 8192, 8192, 512])
    assert expands(query, context, deepseek).tolist() == [False, True, True, True, False, True, True]


def test_a_step_must_be_staged() -> None:
    pairs = [(4, 4)]
    case = make_latent_case(pairs, SMALL, heads=2)
    backend = TritonLatentAttention(case.shape, case.transform)
    with pytest.raises(RuntimeError, match="stage_step"):
        backend.begin_step(case.inputs(lengths_of(pairs), np.zeros(0, np.int32)), case.cache)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "only for CUDA"),
        ({"device": torch.device("cuda"), "mla": dataclasses.replace(SMALL, kv_lora_rank=640)}, "512 \\+ 64"),
        ({"device": torch.device("cuda"), "mla": dataclasses.replace(SMALL, v_head_dim=320)}, "heads of up to 256"),
        ({"device": torch.device("cuda"), "dtype": torch.float64}, "only for bfloat16"),
        ({"device": torch.device("cuda"), "cache_dtype": torch.float16}, "a cache of"),
        ({"device": torch.device("cuda"), "cache_dtype": FP8}, "no float8 cache"),
    ],
)
def test_declines(changed: dict[str, object], reason: str) -> None:
    case = make_latent_case([(1, 1)], SMALL, heads=2)
    declined = TritonLatentAttention.decline(dataclasses.replace(case.shape, **changed))  # type: ignore[arg-type]
    assert declined is not None
    assert declined.reason.startswith(reason.replace("\\", "")) or reason.replace("\\", "") in declined.reason
