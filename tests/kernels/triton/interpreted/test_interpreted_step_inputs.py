"""What a step reads from the rows' tables and writes to them, against torch's indexing, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from aphrodite.kernels.triton.step_inputs import gather_tokens, scatter


@pytest.mark.parametrize("count", [1, 300])  # 300: more than a program takes
def test_tokens_are_gathered_from_their_rows(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    table = torch.randint(0, 1 << 30, (5, 77), dtype=torch.int32, generator=generator)[:, :70]  # rows are strided
    rows = torch.randint(0, 5, (count,), dtype=torch.int32, generator=generator)
    positions = torch.randint(0, 70, (count,), dtype=torch.int32, generator=generator)
    out = torch.full((count,), -1, dtype=torch.int32)
    gather_tokens(out, table, rows, positions)
    assert torch.equal(out, table[rows.long(), positions.long()])


@pytest.mark.parametrize("count", [1, 300])
def test_values_are_scattered_and_nothing_else_changes(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    table = torch.zeros((9, 80), dtype=torch.int32)
    places = torch.randperm(9 * 80, generator=generator)[:count]
    rows, columns = (places // 80).int(), (places % 80).int()
    values = torch.randint(1, 1 << 30, (count,), dtype=torch.int32, generator=generator)
    expected = table.clone()
    expected[rows.long(), columns.long()] = values
    scatter(table, rows, columns, values)
    assert torch.equal(table, expected)
