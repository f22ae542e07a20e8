"""Both torch attention back ends against the plain reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from aphrodite.attention.backend import AttentionBackend, AttentionShape, QueryKeyTransform
from aphrodite.attention.choice import choose_attention
from aphrodite.attention.torch_paged import SdpaAttention, TiledAttention
from aphrodite.kernels import reference
from aphrodite.runner.inputs import ForwardInputs

# (queries, context) of each sequence: fresh and continued prefills, decodes, tile and block borders.
STEPS = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 256), (1, 257), (1, 700), (1, 16)],
    "prefill": [(300, 300)],
    "continued prefill": [(140, 530)],
    "mixed": [(1, 300), (40, 40), (129, 400), (1, 2), (2, 257)],
}


def shape_of(
    heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype, window: int | None = None
) -> AttentionShape:
    return AttentionShape(
        windows=(None, window),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=dtype,
        device=torch.device("cpu"),
    )


def inputs_of(step: list[tuple[int, int]], block_size: int, num_blocks: int) -> ForwardInputs:
    free = torch.randperm(num_blocks).tolist()
    width = max(-(-context // block_size) for _, context in step) + 2
    tables = torch.randint(-9, 10_000, (len(step), width + 5), dtype=torch.int32)[:, :width]
    positions, slots, starts = [], [], [0]
    for row, (queries, context) in enumerate(step):
        blocks = [free.pop() for _ in range(-(-context // block_size))]
        tables[row, : len(blocks)] = torch.tensor(blocks)
        where = range(context - queries, context)
        positions += where
        slots += [blocks[p // block_size] * block_size + p % block_size for p in where]
        starts.append(starts[-1] + queries)
    return ForwardInputs(
        token_ids=torch.zeros(len(positions), dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in step], dtype=torch.int32),
        block_tables=tables,
        logits_index=torch.zeros(0, dtype=torch.int32),
    )


def transform_of(shape: AttentionShape, *, norms: bool = False) -> QueryKeyTransform:
    """Random angles for half of each head's dimensions; norms for the second layer, the one that is tested."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand(1000, shape.head_dim // 4, generator=generator) * 7
    weights = tuple(torch.rand(2, 2, shape.head_dim, generator=generator).to(shape.dtype)) if norms else ((), ())
    return QueryKeyTransform(angles.cos(), angles.sin(), tuple(weights[0]), tuple(weights[1]), 1e-5)


def assert_attends(
    make: Callable[[AttentionShape, QueryKeyTransform], AttentionBackend],
    shape: AttentionShape,
    step: list[tuple[int, int]],
    atol: float,
    *,
    norms: bool = False,
) -> None:
    torch.manual_seed(11)
    transform = transform_of(shape, norms=norms)
    backend = make(shape, transform)
    num_blocks = 2 * sum(-(-context // shape.block_size) for _, context in step)
    inputs = inputs_of(step, shape.block_size, num_blocks)
    cache = backend.allocate(num_blocks)
    for tensor in cache:
        tensor.normal_()
    tokens = len(inputs.positions)
    padded = inputs._replace(positions=F.pad(inputs.positions, (0, 3)))  # as the executor does
    qkv = torch.randn(tokens + 3, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim).to(shape.dtype)
    query, key, value = (
        qkv[:tokens]
        .double()
        .view(tokens, -1, shape.head_dim)
        .split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    )
    if norms:
        query = reference.rms_norm(query, transform.query_norms[1].double(), 1e-5)
        key = reference.rms_norm(key, transform.key_norms[1].double(), 1e-5)
    cos, sin = transform.cos.double(), transform.sin.double()
    query, key = (reference.apply_rotary(part, inputs.positions, cos, sin) for part in (query, key))
    untouched = cache.keys[0].clone()

    out = backend.begin_step(padded, cache)(1, qkv)

    # The reference's cache is [blocks, block_size, kv_heads, head_dim].
    keys, values = (tensor[1].permute(1, 2, 0, 3).double() for tensor in cache)
    torch.testing.assert_close(keys.flatten(0, 1)[inputs.slot_mapping], key, rtol=0, atol=atol)
    torch.testing.assert_close(values.flatten(0, 1)[inputs.slot_mapping], value, rtol=0, atol=0)
    assert torch.equal(cache.keys[0], untouched)
    expected = reference.paged_attention(
        query,
        keys,
        values,
        inputs.query_start,
        inputs.context_lens,
        inputs.block_tables,
        scale=shape.head_dim**-0.5,
        window=shape.windows[1],
    )
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:tokens].double(), expected.flatten(1), rtol=0, atol=atol)


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_tiled_attention_equals_the_reference(step: list[tuple[int, int]], window: int | None) -> None:
    shape = shape_of(6, 2, 8, 16, torch.float32, window)
    assert_attends(TiledAttention, shape, step, 1e-5)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_sdpa_attention_equals_the_reference(step: list[tuple[int, int]], window: int | None) -> None:
    shape = shape_of(6, 2, 8, 16, torch.float64, window)
    assert_attends(SdpaAttention, shape, step, 1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_sdpa_attention_in_working_dtypes(dtype: torch.dtype, atol: float) -> None:
    shape = shape_of(8, 2, 16, 16, dtype)
    assert_attends(SdpaAttention, shape, STEPS["mixed"], atol)


@pytest.mark.parametrize(("heads", "kv_heads", "block_size"), [(4, 4, 16), (8, 1, 32), (3, 1, 48), (2, 2, 512)])
def test_tiled_attention_for_other_heads_and_blocks(heads: int, kv_heads: int, block_size: int) -> None:
    shape = shape_of(heads, kv_heads, 8, block_size, torch.float32, 100)
    assert_attends(TiledAttention, shape, STEPS["mixed"], 1e-5)


@pytest.mark.parametrize("make", [TiledAttention, SdpaAttention])
def test_heads_are_normalised_before_they_are_rotated(
    make: Callable[[AttentionShape, QueryKeyTransform], AttentionBackend],
) -> None:
    shape = shape_of(6, 2, 8, 16, torch.float32)
    assert_attends(make, shape, STEPS["mixed"], 1e-5, norms=True)


def test_float32_on_the_cpu_gets_the_batch_invariant_backend() -> None:
    shape = shape_of(4, 2, 8, 16, torch.float32)
    backend, choice = choose_attention(shape, transform_of(shape))
    assert isinstance(backend, TiledAttention)
    assert choice.reasons == ()


def test_other_dtypes_get_sdpa_with_the_reason() -> None:
    shape = shape_of(4, 2, 8, 16, torch.bfloat16)
    backend, choice = choose_attention(shape, transform_of(shape))
    assert isinstance(backend, SdpaAttention)
    assert "bfloat16" in str(choice)


def test_bytes_per_block_is_what_a_block_adds() -> None:
    shape = shape_of(4, 2, 8, 16, torch.bfloat16)
    cache = SdpaAttention(shape, transform_of(shape)).allocate(10)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * shape.bytes_per_block
