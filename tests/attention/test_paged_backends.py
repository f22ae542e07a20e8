"""Both torch attention back ends against the plain reference in float64."""

from __future__ import annotations

import pytest
import torch

from aphrodite.attention.backend import AttentionBackend, AttentionShape
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


def shape_of(heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype) -> AttentionShape:
    return AttentionShape(
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        dtype=dtype,
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


def assert_attends(
    backend: AttentionBackend, shape: AttentionShape, step: list[tuple[int, int]], window: int | None, atol: float
) -> None:
    torch.manual_seed(11)
    num_blocks = 2 * sum(-(-context // shape.block_size) for _, context in step)
    inputs = inputs_of(step, shape.block_size, num_blocks)
    cache = backend.allocate(num_blocks)
    for tensor in cache:
        tensor.normal_()
    rows = len(inputs.positions) + 3  # padding rows, as the executor adds
    query = torch.randn(rows, shape.num_heads, shape.head_dim).to(shape.dtype)
    key, value = torch.randn(2, rows, shape.num_kv_heads, shape.head_dim).to(shape.dtype)
    untouched = cache.keys[0].clone()

    out = backend.begin_step(inputs, cache)(1, query, key, value, window)

    # The reference's cache is [blocks, block_size, kv_heads, head_dim].
    keys, values = (tensor[1].permute(1, 2, 0, 3).double() for tensor in cache)
    tokens = rows - 3
    torch.testing.assert_close(keys.flatten(0, 1)[inputs.slot_mapping], key[:tokens].double())
    torch.testing.assert_close(values.flatten(0, 1)[inputs.slot_mapping], value[:tokens].double())
    assert torch.equal(cache.keys[0], untouched)
    expected = reference.paged_attention(
        query[:tokens].double(),
        keys,
        values,
        inputs.query_start,
        inputs.context_lens,
        inputs.block_tables,
        scale=shape.head_dim**-0.5,
        window=window,
    )
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:tokens].double(), expected.flatten(1), rtol=0, atol=atol)


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_tiled_attention_equals_the_reference(step: list[tuple[int, int]], window: int | None) -> None:
    shape = shape_of(6, 2, 8, 16, torch.float32)
    assert_attends(TiledAttention(shape), shape, step, window, 1e-5)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_sdpa_attention_equals_the_reference(step: list[tuple[int, int]], window: int | None) -> None:
    shape = shape_of(6, 2, 8, 16, torch.float64)
    assert_attends(SdpaAttention(shape), shape, step, window, 1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
def test_sdpa_attention_in_working_dtypes(dtype: torch.dtype, atol: float) -> None:
    shape = shape_of(8, 2, 16, 16, dtype)
    assert_attends(SdpaAttention(shape), shape, STEPS["mixed"], None, atol)


@pytest.mark.parametrize(("heads", "kv_heads", "block_size"), [(4, 4, 16), (8, 1, 32), (3, 1, 48), (2, 2, 512)])
def test_tiled_attention_for_other_heads_and_blocks(heads: int, kv_heads: int, block_size: int) -> None:
    shape = shape_of(heads, kv_heads, 8, block_size, torch.float32)
    assert_attends(TiledAttention(shape), shape, STEPS["mixed"], 100, 1e-5)


def test_float32_on_the_cpu_gets_the_batch_invariant_backend() -> None:
    backend, choice = choose_attention(shape_of(4, 2, 8, 16, torch.float32))
    assert isinstance(backend, TiledAttention)
    assert choice.reasons == ()


def test_other_dtypes_get_sdpa_with_the_reason() -> None:
    backend, choice = choose_attention(shape_of(4, 2, 8, 16, torch.bfloat16))
    assert isinstance(backend, SdpaAttention)
    assert "bfloat16" in str(choice)


def test_bytes_per_block_is_what_a_block_adds() -> None:
    shape = shape_of(4, 2, 8, 16, torch.bfloat16)
    cache = SdpaAttention(shape).allocate(10)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * shape.bytes_per_block
