"""Paged attention and rotary kernels against the plain reference, interpreted on CPU tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_case import PagedStep, make_step

from aphrodite.kernels import reference
from aphrodite.kernels.triton.decode_attention import DecodeConfig, decode_attention, plan_decode
from aphrodite.kernels.triton.ragged_attention import RaggedConfig, TileTable, ragged_attention, tile_table
from aphrodite.kernels.triton.rotary import RotaryConfig, rotary_config, rotary_to_cache

FP8 = torch.float8_e4m3fn


def decode(
    step: PagedStep,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    target: int = 4,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    kv_heads = step.keys.shape[1]
    config = DecodeConfig(tile=16, num_warps=4, num_stages=1)
    plan = plan_decode(
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        num_kv_heads=kv_heads,
        window=window,
        config=config,
        target=target,
    )
    out = torch.full((step.qkv.shape[0], step.heads * step.keys.shape[-1]), 7.0, dtype=step.qkv.dtype)
    for _ in range(2):  # as two layers of a step do: the kernel leaves the plan as it found it
        decode_attention(
            step.qkv,
            step.keys,
            step.values,
            out,
            plan=plan,
            block_tables=step.block_tables,
            num_heads=step.heads,
            scale=step.scale,
            softcap=softcap,
            sinks=sinks,
        )
    return out


def ragged(
    step: PagedStep,
    *,
    window: int | None = None,
    softcap: float = 0.0,
    rows: int = 16,
    programs: int = 1,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    config = RaggedConfig(rows=rows, tile=16, num_warps=4, num_stages=1)
    kv_heads = step.keys.shape[1]
    table = tile_table(
        step.query_start.diff().numpy(),
        step.context_lens.numpy(),
        config,
        group=step.heads // kv_heads,
        kv_heads=kv_heads,
        programs=programs,
        window=window,
    )
    out = torch.full((step.qkv.shape[0], step.heads * step.keys.shape[-1]), 7.0, dtype=step.qkv.dtype)
    ragged_attention(
        step.qkv,
        step.keys,
        step.values,
        out,
        table=TileTable(*map(torch.from_numpy, table)),
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        block_tables=step.block_tables,
        num_heads=step.heads,
        scale=step.scale,
        config=config,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    return out


def assert_close(out: torch.Tensor, expected: torch.Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("target", [1, 5, 40])
@pytest.mark.parametrize("window", [None, 1, 20, 64])
def test_decode_of_mixed_lengths(window: int | None, target: int) -> None:
    """Long beside short, padding between, more chunks wanted than there are tiles."""
    step = make_step([(1, 77), (1, 1), (1, 0), (1, 16), (1, 33)], heads=4, kv_heads=2, head_dim=64)
    assert_close(decode(step, window=window, target=target), step.expected(window))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 17])
def test_decode_groups(group: int) -> None:
    step = make_step([(1, 50), (1, 3)], heads=2 * group, kv_heads=2, head_dim=64)
    assert_close(decode(step), step.expected())


@pytest.mark.parametrize("head_dim", [80, 96, 112, 120, 128, 192, 256])
def test_decode_head_sizes(head_dim: int) -> None:
    step = make_step([(1, 40), (1, 17)], heads=2, kv_heads=1, head_dim=head_dim)
    assert_close(decode(step), step.expected())


def test_decode_with_soft_cap_and_other_blocks() -> None:
    step = make_step([(1, 70), (1, 5)], heads=4, kv_heads=1, head_dim=64, block_size=8)
    assert_close(decode(step, softcap=0.5, window=40), step.expected(40, 0.5))


def test_decode_combines_more_chunks_than_are_loaded_at_once() -> None:
    step = make_step([(1, 16 * 41 + 3)], heads=1, kv_heads=1, head_dim=64)
    assert_close(decode(step, target=64), step.expected())


def test_decode_leaves_rows_of_longer_queries_alone() -> None:
    step = make_step([(3, 30), (1, 20), (2, 2), (1, 1)], heads=2, kv_heads=1, head_dim=64)
    out = decode(step)
    expected = step.expected()
    assert_close(out[[3, 6]], expected[[3, 6]])
    assert (out[[0, 1, 2, 4, 5]] == 7.0).all()


@pytest.mark.parametrize("target", [1, 3, 16])
def test_plan_covers_every_context_once(target: int) -> None:
    contexts = [100, 0, 1, 16, 999, 17]
    count = len(contexts)
    plan = plan_decode(
        query_start=torch.arange(count + 1, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        rows=torch.arange(count, dtype=torch.int32).flip(0).contiguous(),
        num_kv_heads=3,
        window=None,
        config=DecodeConfig(16, 4, 1),
        target=target,
    )
    assert not plan.counters.any()
    used = plan.records[plan.records[:, 6] > 0]
    assert (plan.records[: len(used), 6] > 0).all()  # idle ones come last
    firsts = used[used[:, 5].long()]  # the first chunk of each one's sequence, which is as long as any of it
    lengths = firsts[:, 3] - firsts[:, 2]
    assert (-(-lengths // 16)).clamp(min=1).diff().le(0).all()
    assert (used[:, 6] > 0).sum() <= count + target
    largest = 16 * -(-sum(-(-c // 16) for c in contexts) // target)
    for index, context in enumerate(contexts):
        mine = used[used[:, 0] == index]
        assert (mine[:, 6] == len(mine)).all()
        assert (mine[:, 1] == count - 1 - index).all()
        assert mine[0, 2] == 0
        assert mine[-1, 3] == context
        assert torch.equal(mine[1:, 2], mine[:-1, 3])
        assert (mine[:, 3] - mine[:, 2] <= largest).all()


def test_plan_of_more_sequences_than_are_compared_at_once() -> None:
    contexts = torch.arange(1100, dtype=torch.int32) * 7 % 50
    plan = plan_decode(
        query_start=torch.arange(1101, dtype=torch.int32),
        context_lens=contexts,
        rows=torch.arange(1100, dtype=torch.int32),
        num_kv_heads=1,
        window=None,
        config=DecodeConfig(16, 4, 1),
        target=4,
    )
    used = plan.records[plan.records[:, 6] > 0]
    tokens = used[:, 0].long()
    assert tokens.sort().values.equal(torch.arange(1100))
    assert torch.equal(used[:, 3], contexts[tokens])
    assert (-(-used[:, 3] // 16)).clamp(min=1).diff().le(0).all()


STEPS = {
    "prompts": [(37, 37), (1, 1), (2, 2), (16, 16)],
    "extensions": [(5, 40), (20, 52), (3, 16)],
    "mixed": [(1, 30), (33, 64), (1, 9), (7, 7)],
}


@pytest.mark.parametrize("window", [None, 1, 10, 48])
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
def test_ragged(lengths: list[tuple[int, int]], window: int | None) -> None:
    step = make_step(lengths, heads=4, kv_heads=2, head_dim=64)
    long = torch.repeat_interleave(step.query_start.diff() > 1, step.query_start.diff().long())
    out = ragged(step, window=window)
    assert_close(out[long], step.expected(window)[long])
    assert (out[~long] == 7.0).all()


@pytest.mark.parametrize("group", [1, 3, 7, 8, 20])
def test_ragged_groups(group: int) -> None:
    step = make_step([(9, 21), (4, 4)], heads=2 * group, kv_heads=2, head_dim=64)
    assert_close(ragged(step), step.expected())


@pytest.mark.parametrize("head_dim", [80, 96, 128, 192, 256])
def test_ragged_head_sizes(head_dim: int) -> None:
    step = make_step([(9, 21), (4, 4)], heads=2, kv_heads=1, head_dim=head_dim)
    assert_close(ragged(step, rows=32), step.expected())


def test_ragged_with_soft_cap() -> None:
    step = make_step([(20, 50)], heads=2, kv_heads=1, head_dim=64)
    assert_close(ragged(step, softcap=0.5, window=17), step.expected(17, 0.5))


@pytest.mark.parametrize("target", [1, 6])
def test_decode_with_sinks(target: int) -> None:
    """Whole and in chunks, beside padding."""
    sinks = torch.tensor([3.0, -2.0, 0.5, 9.0])
    step = make_step([(1, 77), (1, 0), (1, 5)], heads=4, kv_heads=2, head_dim=64)
    assert_close(decode(step, target=target, window=50, sinks=sinks), step.expected(50, sinks=sinks))


@pytest.mark.parametrize("programs", [1, 8])
def test_ragged_with_sinks(programs: int) -> None:
    """Whole and split along the keys."""
    sinks = torch.tensor([3.0, -2.0])
    step = make_step([(3, 300)], heads=2, kv_heads=1, head_dim=64)
    assert_close(ragged(step, programs=programs, sinks=sinks), step.expected(sinks=sinks))


def test_float16() -> None:
    """bfloat16 is for the GPU's tests: the interpreter multiplies its bit patterns."""
    step = make_step([(1, 45), (20, 30)], heads=4, kv_heads=2, head_dim=64, dtype=torch.float16)
    expected = step.expected()
    assert_close(decode(step)[:1], expected[:1], 2e-3)
    assert_close(ragged(step)[1:], expected[1:], 2e-3)


def test_fp8_cache_is_read_as_what_it_holds() -> None:
    step = make_step([(1, 45), (20, 30)], heads=4, kv_heads=2, head_dim=64, dtype=torch.float16, kv_dtype=FP8)
    expected = step.expected()
    assert_close(decode(step)[:1], expected[:1], 2e-3)
    assert_close(ragged(step)[1:], expected[1:], 2e-3)


SPLITS = {
    "extension": [(5, 700)],
    "late rows of a prompt": [(40, 900), (300, 300)],
    "beside others": [(1, 30), (9, 1000), (7, 7)],
}


@pytest.mark.parametrize("window", [None, 150, 400])
@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS.keys())
def test_ragged_split_along_the_keys(lengths: list[tuple[int, int]], window: int | None) -> None:
    step = make_step(lengths, heads=6, kv_heads=2, head_dim=64)
    long = torch.repeat_interleave(step.query_start.diff() > 1, step.query_start.diff().long())
    out = ragged(step, window=window, programs=64, rows=64)
    assert_close(out[long], step.expected(window)[long])
    assert (out[~long] == 7.0).all()


def test_split_with_soft_cap_and_other_blocks() -> None:
    step = make_step([(20, 600)], heads=4, kv_heads=1, head_dim=80, block_size=32)
    assert_close(ragged(step, softcap=0.5, programs=64), step.expected(None, 0.5))


def tiles_of(
    lengths: list[tuple[int, int]],
    *,
    programs: int,
    window: int | None = None,
    first_rows: np.ndarray | None = None,
) -> TileTable:
    query, context = np.array(lengths, dtype=np.int32).T
    config = RaggedConfig(rows=16, tile=16, num_warps=4, num_stages=1)
    return tile_table(
        query, context, config, group=4, kv_heads=2, programs=programs, window=window, first_rows=first_rows
    )


def test_tile_table_covers_rows_in_order_of_cost() -> None:
    table = tiles_of([(5, 5), (1, 9), (9, 99), (0, 0), (2, 2)], programs=1, first_rows=np.array([0, 0, 8, 0, 0]))
    assert table.tiles.dtype == table.merges.dtype == np.int32
    assert table.merges.shape == (0, 4)
    assert table.tiles.tolist() == [[2, 8, 0, 99, -1], [0, 4, 0, 5, -1], [0, 0, 0, 4, -1], [4, 0, 0, 2, -1]]
    assert [part.shape for part in tiles_of([(1, 1), (1, 1)], programs=1)] == [(0, 5), (0, 4)]


@pytest.mark.parametrize("window", [None, 100, 1000])
@pytest.mark.parametrize("programs", [1, 40, 1000])
def test_tile_table_covers_keys_once(programs: int, window: int | None) -> None:
    lengths = [(8, 3000), (3, 3), (600, 600), (1, 5000), (30, 130)]
    tiles, merges = tiles_of(lengths, programs=programs, window=window)
    slots = tiles[tiles[:, 4] >= 0]
    assert sorted(slots[:, 4]) == list(range(len(slots)))
    merged = {(sequence, row): (first, count) for sequence, row, first, count in merges.tolist()}
    for sequence, (queries, context) in enumerate(lengths):
        for row in range(0, queries if queries > 1 else 0, 4):
            mine = tiles[(tiles[:, 0] == sequence) & (tiles[:, 1] == row)]
            mine = mine[mine[:, 2].argsort()]
            at = context - queries + row
            assert mine[0, 2] == (0 if window is None else max(at - window + 1, 0) // 16 * 16)
            assert mine[-1, 3] == min(at + 4, context)
            assert (mine[1:, 2] == mine[:-1, 3]).all()
            assert (mine[:, 2] % 16 == 0).all()
            if len(mine) > 1:
                first, count = merged.pop((sequence, row))
                assert mine[:, 4].tolist() == list(range(first, first + count))
            else:
                assert mine[0, 4] == -1
    assert not merged


def test_few_tiles_with_much_to_see_are_split_and_many_are_not() -> None:
    assert len(tiles_of([(8, 8192)], programs=132).merges) == 2
    assert len(tiles_of([(2048, 2048)], programs=132).merges) == 0
    assert len(tiles_of([(8, 64)], programs=132).merges) == 0


def transformed(
    step: PagedStep, cos: torch.Tensor, sin: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values `[T, heads, head_dim]` float64 after norm and rotation."""
    kv_heads, head_dim = step.keys.shape[1], step.keys.shape[3]
    heads = step.qkv.double().view(step.qkv.shape[0], -1, head_dim)
    query, key, value = heads.split((step.heads, kv_heads, kv_heads), dim=1)
    if norms is not None:
        query = reference.rms_norm(query, norms[0].double(), 1e-6)
        key = reference.rms_norm(key, norms[1].double(), 1e-6)
    c, s = cos.double(), sin.double()
    rotate = reference.apply_rotary
    return rotate(query, step.positions, c, s), rotate(key, step.positions, c, s), value


@pytest.mark.parametrize("keep_keys", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (80, 80), (80, 20), (96, 64)])
@pytest.mark.parametrize("config", [None, rotary_config(2048, 7, 64)])
def test_rotary_to_cache(head_dim: int, rotated: int, norm: bool, keep_keys: bool, config: RotaryConfig | None) -> None:
    step = make_step([(3, 20), (1, 0), (1, 33)], heads=3, kv_heads=2, head_dim=head_dim)
    angles = torch.outer(torch.arange(40.0), torch.rand(rotated // 2))
    cos, sin = 1.1 * angles.cos(), 1.1 * angles.sin()
    norms = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5) if norm else None
    query, key, value = transformed(step, cos, sin, norms)
    before = step.cpu()
    qkv, keys, values = step.qkv.clone(), step.keys.clone(), step.values.clone()

    rotary_to_cache(
        qkv,
        keys,
        values,
        positions=step.positions,
        slot_mapping=step.slot_mapping,
        cos=cos,
        sin=sin,
        num_heads=3,
        query_norm=norms[0] if norms else None,
        key_norm=norms[1] if norms else None,
        norm_eps=1e-6,
        keep_keys=keep_keys,
        config=config,
    )

    heads = qkv.view(-1, 7, head_dim)
    assert_close(heads[:, :3], query)
    assert_close(heads[:, 3:5], key if keep_keys else before.qkv.view(-1, 7, head_dim)[:, 3:5].double())
    assert torch.equal(heads[:, 5:], before.qkv.view(-1, 7, head_dim)[:, 5:])
    written = step.slot_mapping[step.slot_mapping >= 0]
    live = step.slot_mapping >= 0
    for cache, old, new in ((keys, before.keys, key), (values, before.values, value)):
        flat, old_flat = (c.transpose(1, 2).flatten(0, 1) for c in (cache, old))
        assert_close(flat[written], new[live])
        untouched = torch.ones(len(flat), dtype=torch.bool)
        untouched[written] = False
        torch.testing.assert_close(flat[untouched], old_flat[untouched], rtol=0, atol=0, equal_nan=True)


def test_fp8_cache_gets_the_nearest_number_and_saturates() -> None:
    """All codes, the midpoints between them and just beside, overflow: as torch rounds, but never NaN."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat((codes, middle, middle * (1 + 2**-20), middle * (1 - 2**-20), torch.tensor([449.0, 1e6])))
    numbers = torch.cat((numbers, -numbers))
    numbers = torch.cat((numbers, torch.zeros(-len(numbers) % 64))).view(-1, 64)
    tokens = len(numbers)
    qkv = torch.cat((torch.zeros(tokens, 128), numbers), dim=1)
    keys, values = torch.zeros(2, -(-tokens // 16), 1, 16, 64).to(FP8).unbind(0)
    rotary_to_cache(
        qkv,
        keys,
        values,
        positions=torch.zeros(tokens, dtype=torch.int32),
        slot_mapping=torch.arange(tokens),
        cos=torch.ones(1, 32),
        sin=torch.zeros(1, 32),
        num_heads=1,
    )
    expected = numbers.clamp(-448, 448).to(FP8)
    written = values.flatten(0, 2)[:tokens]
    assert torch.equal(written.float(), expected.float())
