"""Latent attention on the GPU in DeepSeek's sizes, against expanded keys and values in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton"))

from latent_case import FP8, lengths_of, make_latent_case

from aphrodite.attention import latent_triton
from aphrodite.attention.latent_triton import TritonLatentAttention
from aphrodite.models.spec import MlaSpec

DEEPSEEK = MlaSpec(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
STEPS = {
    "one decode": [(1, 5000)],
    "decodes": [(1, 700), (1, 0), (1, 33), (1, 4100), (1, 1), (1, 0)],
    "prompts": [(300, 300), (1000, 1000)],
    "mixed": [(1, 900), (40, 2000), (700, 1500), (1, 17), (3, 3)],
}
ATOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}


@pytest.mark.parametrize("heads", [16, 20, 128])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.bfloat16, FP8)],
    ids=["bf16", "fp16", "fp32", "fp8 cache"],
)
def test_steps(
    name: str, heads: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, device: torch.device
) -> None:
    if heads != 16 and dtype != torch.bfloat16:
        pytest.skip("one type is enough for other numbers of heads")
    check(STEPS[name], heads, dtype, cache_dtype, device)


@pytest.mark.parametrize("expanded", [False, True])
def test_both_ways_of_serving_prompts(expanded: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_triton, "expands", lambda query, context, mla: (query > 1) & expanded)
    monkeypatch.setattr(latent_triton, "GROUP_POSITIONS", 2500)
    monkeypatch.setattr(latent_triton, "EXPANDED_BYTES", 5 << 20)
    check([*STEPS["mixed"], *STEPS["prompts"]], 16, torch.bfloat16, None, device)


def check(
    pairs: list[tuple[int, int]],
    heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    case = make_latent_case(pairs, DEEPSEEK, heads=heads, dtype=dtype, cache_dtype=cache_dtype, device=device)
    assert TritonLatentAttention.decline(case.shape) is None
    backend = TritonLatentAttention(case.shape, case.transform)
    decode_only = all(query == 1 for query, _ in pairs)
    lengths = None if decode_only else lengths_of(pairs)
    table = np.zeros(0, dtype=np.int32) if lengths is None else backend.stage_step(lengths)
    expected, _ = case.expected()
    cache = case.cache
    for _ in range(2):  # as two layers of a step do: the plan is left as it was found
        out = backend.begin_step(case.inputs(lengths, table), cache)(1, case.qkv.clone())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=ATOL[dtype])
