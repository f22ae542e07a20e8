"""Kernels of adapters against their definition in float64, under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aphrodite.kernels import reference
from aphrodite.kernels.triton.lora import (
    AdapterStack,
    adapter_tiles,
    add_adapters,
    gated_groups,
    result_blocks,
    tile_count,
)

SLOTS = np.array([2, -1, 0, 2, 2, -1, 1, 2], dtype=np.int32)


def stack_of(rows: tuple[int, ...], columns: int, rank: int, dtype: torch.dtype, slots: int = 3) -> AdapterStack:
    parts = len(rows)
    return AdapterStack(
        (torch.randn(slots, parts * rank, columns) / columns**0.5).to(dtype),
        (torch.randn(slots, sum(rows), rank) / rank**0.5).to(dtype),
        torch.rand(slots, parts) + 0.5,
        torch.from_numpy(result_blocks(rows)),
        rank,
    )


def expected_of(x: torch.Tensor, out: torch.Tensor, stack: AdapterStack, rows: tuple[int, ...]) -> torch.Tensor:
    """With parts one behind the other."""
    expected = out.double().clone()
    for token, slot in enumerate(SLOTS):
        first = 0
        for part, count in enumerate(rows if slot >= 0 else ()):
            a = stack.a[slot, part * stack.rank : (part + 1) * stack.rank].double()
            b = stack.b[slot, first : first + count].double()
            expected[token, first : first + count] += float(stack.scales[slot, part]) * (b @ (a @ x[token].double()))
            first += count
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [((96,), 80, 16), ((64, 32, 32), 600, 16), ((40, 40), 96, 32)], ids=str
)
def test_rows_get_what_their_adapter_adds(dtype: torch.dtype, rows: tuple[int, ...], columns: int, rank: int) -> None:
    torch.manual_seed(0)
    stack = stack_of(rows, columns, rank, dtype)
    x, out = torch.randn(len(SLOTS), columns).to(dtype), torch.randn(len(SLOTS), sum(rows)).to(dtype)
    expected = expected_of(x, out, stack, rows)
    before = out.clone()
    add_adapters(x, out, torch.from_numpy(adapter_tiles(SLOTS, len(SLOTS), 3)), stack)
    assert float((out.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert torch.equal(out[SLOTS < 0], before[SLOTS < 0])


@pytest.mark.parametrize("group", [1, 8])
def test_parts_may_lie_in_groups_of_columns(group: int) -> None:
    torch.manual_seed(1)
    rows, inner = (72, 72), 72
    stack = stack_of(rows, 64, 16, torch.float32)
    x, out = torch.randn(len(SLOTS), 64), torch.randn(len(SLOTS), 2 * inner)
    by_part = out.view(len(SLOTS), inner // group, 2, group).transpose(1, 2).reshape(len(SLOTS), -1)
    expected = expected_of(x, by_part, stack, rows)
    add_adapters(x, out, torch.from_numpy(adapter_tiles(SLOTS, len(SLOTS), 3)), stack, group)
    found = out.view(len(SLOTS), inner // group, 2, group).transpose(1, 2).reshape(len(SLOTS), -1)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-6
    activated = gated_groups(out, "silu", group)
    assert torch.allclose(activated.double(), reference.silu_mul(expected), atol=1e-5)
    assert torch.allclose(
        gated_groups(found.contiguous(), "gelu_tanh", 0).double(), reference.gelu_tanh_mul(expected), atol=1e-5
    )


def test_tiles_hold_every_row_once() -> None:
    random = np.random.default_rng(0)
    for rows, padded in ((1, 4), (30, 32), (700, 768)):
        slots = random.integers(-1, 5, rows).astype(np.int32)
        tiles = adapter_tiles(slots, padded, 5)
        tile, count = tile_count(padded, 5)
        assert tiles.shape == (count, 1 + tile)
        held = {int(row): int(own[0]) for own in tiles for row in own[1:] if row >= 0}
        assert held == {row: int(slot) for row, slot in enumerate(slots) if slot >= 0}
        assert sum(int((own[1:] >= 0).sum()) for own in tiles) == len(held)
