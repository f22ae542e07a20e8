"""Attention and rotary kernels on the GPU: real shapes against float64, the back end's ways of serving a step alike."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aphrodite.kernels import reference

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton"))

from paged_case import PagedStep, make_step

from aphrodite.attention.backend import AttentionShape, KVCache, QueryKeyTransform
from aphrodite.attention.triton_paged import DENSE_AFTER, TritonAttention
from aphrodite.runner.inputs import DeviceInputs, HostLengths

FP8 = torch.float8_e4m3fn
ATOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def dense_reference(step: PagedStep, window: int | None, softcap: float = 0.0) -> torch.Tensor:
    """`[T, heads * head_dim]` float64 on the GPU; `reference.paged_attention` is too slow at these lengths."""
    group = step.heads // step.keys.shape[1]
    out = torch.zeros(step.queries.shape, dtype=torch.float64, device=step.qkv.device)
    flat = [cache.float().transpose(1, 2).flatten(0, 1) for cache in (step.keys, step.values)]
    block_size = step.keys.shape[2]
    starts = step.query_start.tolist()
    for index, context in enumerate(step.context_lens.tolist()):
        table = step.block_tables[step.rows[index]].long()
        where = torch.arange(context, device=table.device)
        slots = table[where // block_size] * block_size + where % block_size
        for head in range(step.heads):
            keys, values = (cache[slots, head // group].double() for cache in flat)
            for first in range(starts[index], starts[index + 1], 1024):
                last = min(first + 1024, starts[index + 1])
                at = context - starts[index + 1] + torch.arange(first, last, device=table.device)[:, None]
                scores = step.queries[first:last, head].double() @ keys.T * step.scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                hidden = (where > at) if window is None else (where > at) | (where <= at - window)
                if context:
                    out[first:last, head] = torch.softmax(scores.masked_fill_(hidden, float("-inf")), -1) @ values
    return out.flatten(1)


def attend(
    step: PagedStep,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    decode_only: bool = False,
    staged: int = 1,
) -> torch.Tensor:
    """The back end's answer, its queries and keys turned by nothing and the cache written with what it holds.

    `staged` is how many times the step comes; torch's attention serves shapes that keep coming.
    """
    heads, kv_heads, dim = step.heads, step.keys.shape[1], step.keys.shape[3]
    device = step.qkv.device
    shape = AttentionShape(
        windows=(window,),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=step.keys.shape[2],
        dtype=step.qkv.dtype,
        cache_dtype=step.keys.dtype,
        device=device,
        softcap=softcap,
    )
    longest = int(step.context_lens.max())
    ones, zeros = torch.ones(longest, dim // 2, device=device), torch.zeros(longest, dim // 2, device=device)
    assert TritonAttention.decline(shape) is None
    backend = TritonAttention(shape, QueryKeyTransform(ones, zeros))
    lengths = HostLengths(step.query_start.diff().cpu().numpy(), step.context_lens.cpu().numpy())
    table = np.zeros(0, dtype=np.int32)
    for _ in range(0 if decode_only else staged):
        table = backend.stage_step(lengths)
    inputs = DeviceInputs(
        token_ids=step.positions,
        positions=step.positions,
        slot_mapping=step.slot_mapping,
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        block_tables=step.block_tables,
        logits_index=step.rows,
        lengths=None if decode_only else lengths,
        attention_table=torch.from_numpy(table).to(device),
    )
    cache = KVCache(step.keys[None], step.values[None])
    return backend.begin_step(inputs, cache)(0, filled(step))


def filled(step: PagedStep) -> torch.Tensor:
    """qkv whose keys and values are those that the cache holds for these tokens."""
    qkv = step.qkv.clone()
    dim, kv_heads = step.keys.shape[3], step.keys.shape[1]
    live = step.slot_mapping >= 0
    first = step.heads * dim
    for cache in (step.keys, step.values):
        flat = cache.float().transpose(1, 2).flatten(0, 1)
        qkv[live, first : first + kv_heads * dim] = flat[step.slot_mapping[live]].flatten(1).to(qkv.dtype)
        first += kv_heads * dim
    return qkv


def assert_close(out: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), expected, rtol=atol, atol=atol)


DECODES = {
    "one": [(1, 1000)],
    "32k": [(1, 32_768)],
    "long among short": [(1, 32_000), *[(1, 100 + i) for i in range(30)], (1, 0), (1, 0)],
    "batch": [(1, 257 + 13 * i) for i in range(128)],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", DECODES.values(), ids=DECODES.keys())
def test_decode(lengths: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    step = make_step(lengths, heads=32, kv_heads=8, head_dim=128, dtype=dtype, device=device)
    assert_close(attend(step, decode_only=True), dense_reference(step, None), ATOL[dtype])


SHAPES = [
    *((32, 8, head_dim) for head_dim in (64, 80, 96, 112, 120, 192, 256)),
    *((heads, kv_heads, 128) for heads, kv_heads in ((8, 8), (14, 2), (16, 8), (48, 2))),
]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_heads(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
    lengths = [(1, 700), (1, 33), (40, 40), (1, 1), (130, 600), (2, 900)]
    step = make_step(lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16, device=device)
    assert_close(attend(step), dense_reference(step, None), ATOL[torch.bfloat16])


@pytest.mark.parametrize(
    ("window", "softcap", "head_dim", "dtype"),
    [
        (1, 0.0, 128, torch.bfloat16),
        (512, 0.0, 128, torch.bfloat16),
        (100, 30.0, 128, torch.bfloat16),
        (None, 30.0, 256, torch.bfloat16),
        (512, 30.0, 128, torch.float32),
    ],
)
def test_windows_and_soft_cap(
    window: int | None, softcap: float, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [(1, 3000), (1, 40), (700, 700), (300, 2048), (1, 513), (17, 530)]
    step = make_step(lengths, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, device=device)
    out = attend(step, window=window, softcap=softcap)
    assert_close(out, dense_reference(step, window, softcap), ATOL[dtype])


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)])
def test_fp8_cache_is_read_exactly(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = [(1, 3000), (1, 40), (100, 100), (300, 2048)]
    step = make_step(lengths, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, kv_dtype=FP8, device=device)
    assert_close(attend(step), dense_reference(step, None), ATOL[dtype])


@pytest.mark.parametrize("staged", [1, DENSE_AFTER])
@pytest.mark.parametrize("length", [4095, 4096, 4097])
def test_long_prompts(length: int, staged: int, device: torch.device) -> None:
    """By our kernel at first, then by torch's attention in front and by ours for the odd rest."""
    step = make_step([(length, length)], heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=device)
    assert_close(attend(step, staged=staged), dense_reference(step, None), ATOL[torch.bfloat16])


def test_equal_prompts_after_each_other(device: torch.device) -> None:
    lengths = [(1, 90), (1030, 1030), (1030, 1030), (2048, 2048), (40, 2000), (1030, 1030)]
    step = make_step(lengths, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=device)
    for window in (None, 1029, 300):
        for staged in (1, DENSE_AFTER, DENSE_AFTER + 2):  # a shape more is planned at each step
            out = attend(step, window=window, staged=staged)
            assert_close(out, dense_reference(step, window), ATOL[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 5000])
def test_few_rows_with_much_to_see(window: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """Split along the keys."""
    lengths = [(2, 9000), (64, 8192), (1, 3000), (100, 700)]
    step = make_step(lengths, heads=8, kv_heads=2, head_dim=128, dtype=dtype, device=device)
    assert_close(attend(step, window=window), dense_reference(step, window), ATOL[dtype])


def test_extension_of_a_32k_prefix(device: torch.device) -> None:
    step = make_step(
        [(200, 32_768), (1, 32_000)], heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=device
    )
    assert_close(attend(step), dense_reference(step, None), ATOL[torch.bfloat16])


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("head_dim", "rotated"), [(128, 128), (80, 32), (256, 256)])
def test_rotary_norm_and_cache(head_dim: int, rotated: int, cache_dtype: torch.dtype, device: torch.device) -> None:
    from aphrodite.kernels.triton.rotary import rotary_to_cache

    lengths = [(500, 700), (1, 0), (1, 3000)]
    step = make_step(
        lengths, heads=6, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, kv_dtype=cache_dtype, device=device
    )
    angles = torch.outer(torch.arange(3000.0), torch.rand(rotated // 2)).to(device)
    cos, sin = angles.cos(), angles.sin()
    norms = (torch.rand(2, head_dim) + 0.5).to(torch.bfloat16).to(device).unbind(0)
    heads = step.qkv.double().view(-1, 10, head_dim)
    turned = [
        reference.apply_rotary(reference.rms_norm(x, w.double(), 1e-6), step.positions, cos.double(), sin.double())
        for x, w in zip((heads[:, :6], heads[:, 6:8]), norms, strict=True)
    ]
    qkv = step.qkv.clone()
    rotary_to_cache(
        qkv,
        step.keys,
        step.values,
        positions=step.positions,
        slot_mapping=step.slot_mapping,
        cos=cos,
        sin=sin,
        num_heads=6,
        query_norm=norms[0],
        key_norm=norms[1],
        norm_eps=1e-6,
    )
    torch.testing.assert_close(qkv.view(-1, 10, head_dim)[:, :6].double(), turned[0], rtol=2**-8, atol=1e-4)
    live = step.slot_mapping >= 0
    for cache, new in ((step.keys, turned[1]), (step.values, heads[:, 8:])):
        written = cache.float().transpose(1, 2).flatten(0, 1)[step.slot_mapping[live]]
        rtol, atol = (2**-8, 1e-4) if cache_dtype == torch.bfloat16 else (2**-4, 2**-9)
        torch.testing.assert_close(written.double(), new[live], rtol=rtol, atol=atol)


def test_decode_step_replays_as_a_graph(device: torch.device) -> None:
    """Two layers captured once serve other lengths: the plan is made on the device and counters come back to zero."""
    first = make_step([(1, 2000)] * 8, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device=device)
    shape = AttentionShape(
        windows=(None, None),
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        block_size=16,
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        device=device,
    )
    ones, zeros = torch.ones(2048, 64, device=device), torch.zeros(2048, 64, device=device)
    backend = TritonAttention(shape, QueryKeyTransform(ones, zeros))
    inputs = DeviceInputs(
        token_ids=first.positions,
        positions=first.positions,
        slot_mapping=first.slot_mapping,
        query_start=first.query_start,
        context_lens=first.context_lens,
        rows=first.rows,
        block_tables=first.block_tables,
        logits_index=first.rows,
        lengths=None,
        attention_table=torch.zeros(0, dtype=torch.int32, device=device),
    )
    cache = KVCache(*(torch.stack((c, c)) for c in (first.keys, first.values)))
    qkv = filled(first)

    def layers() -> list[torch.Tensor]:
        step = backend.begin_step(inputs, cache)
        return [step(layer, qkv) for layer in range(2)]

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layers()
    for contexts in ([2000] * 8, [2000, 1, 16, 700, 0, 0, 1999, 5]):
        first.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        first.slot_mapping.fill_(-1)  # what the cache holds stays
        graph.replay()
        expected = dense_reference(first, None)
        for out in outs:
            assert_close(out, expected, ATOL[torch.bfloat16])
