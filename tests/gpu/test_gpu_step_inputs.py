"""Reading and writing the rows' tables on the GPU, against torch's indexing, at the size of a long context."""

from __future__ import annotations

import pytest
import torch

from aphrodite.kernels.triton.step_inputs import gather_tokens, scatter

ROWS, COLUMNS = 257, 131_073


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    return torch.randint(0, 1 << 30, (ROWS, COLUMNS), dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("count", [1, 256, 8192])
def test_gathering_and_scattering_are_torchs(table: torch.Tensor, count: int) -> None:
    places = torch.randperm(ROWS * COLUMNS, device="cuda")[:count]
    rows, columns = (places // COLUMNS).int(), (places % COLUMNS).int()
    out = torch.empty(count, dtype=torch.int32, device="cuda")
    gather_tokens(out, table, rows, columns)
    assert torch.equal(out, table[rows.long(), columns.long()])
    values, expected = -out - 1, table.clone()
    expected[rows.long(), columns.long()] = values
    scatter(table, rows, columns, values)
    assert torch.equal(table, expected)
