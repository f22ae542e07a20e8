"""Latent attention in torch operations against expanded keys and values in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton"))

from latent_case import LatentCase, make_latent_case

from aphrodite.attention.choice import choose_attention
from aphrodite.attention.latent_torch import TorchLatentAttention
from aphrodite.models.spec import MlaSpec
from aphrodite.runner.inputs import ForwardInputs

SMALL = MlaSpec(q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
STEPS = {
    "decodes": [(1, 5), (1, 256), (1, 257), (1, 400)],
    "prefill": [(300, 300)],
    "mixed": [(1, 300), (40, 40), (129, 400), (1, 2)],
}


def inputs_of(case: LatentCase) -> ForwardInputs:
    """As the executor gives them, with padding behind the positions."""
    step = case.step
    return ForwardInputs(
        token_ids=step.positions,
        positions=F.pad(step.positions, (0, 3)),
        slot_mapping=step.slot_mapping,
        query_start=step.query_start,
        context_lens=step.context_lens,
        block_tables=step.block_tables[step.rows.long()].contiguous(),
        logits_index=torch.zeros(0, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("dtype", "name", "atol"),
    [
        (torch.float32, "torch tiled, latent", 2e-5),
        (torch.float64, "torch sdpa, latent", 1e-6),
        (torch.bfloat16, "torch sdpa, latent", 4e-2),
    ],
)
@pytest.mark.parametrize("pairs", STEPS.values(), ids=STEPS.keys())
def test_equals_expanded_attention(pairs: list[tuple[int, int]], dtype: torch.dtype, name: str, atol: float) -> None:
    case = make_latent_case(pairs, SMALL, heads=3, dtype=dtype)
    backend, choice = choose_attention(case.shape, case.transform)
    assert isinstance(backend, TorchLatentAttention)
    assert str(choice) == name
    cache = case.cache
    untouched = cache.keys[0].clone()
    expected, written = case.expected()
    out = backend.begin_step(inputs_of(case), cache)(1, F.pad(case.qkv, (0, 0, 0, 3)))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[: len(expected)].double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(cache.keys[1].double(), written, rtol=0, atol=atol, equal_nan=True)
    torch.testing.assert_close(cache.keys[0], untouched, rtol=0, atol=0, equal_nan=True)


def test_bytes_per_block_is_what_a_block_adds() -> None:
    case = make_latent_case([(1, 1)], SMALL, heads=2, dtype=torch.bfloat16)
    cache = TorchLatentAttention(case.shape, case.transform).allocate(10)
    assert cache.keys.nbytes == 10 * case.shape.bytes_per_block
    assert cache.values.data_ptr() == cache.keys.data_ptr()  # the same vectors


def test_shape_and_transform_go_together() -> None:
    case = make_latent_case([(1, 1)], SMALL, heads=2)
    with pytest.raises(TypeError, match="different kinds"):
        choose_attention(case.shape, None)  # type: ignore[arg-type]
