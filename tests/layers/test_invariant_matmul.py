"""Rows of the batch-invariant product: right, and the same bits alone as among others."""

from __future__ import annotations

import pytest
import torch

from aphrodite.layers import invariant
from aphrodite.layers.invariant import RowBlocks, invariant_matmul, row_blocks


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [(576, 1536), (48, 64), (100, 40)])
def test_every_row_is_the_same_alone_and_among_others(size: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(size)
        x = torch.randn(600, size[1])
        together = invariant_matmul(x, weight)
        torch.testing.assert_close(together.double(), x.double() @ weight.double().T, rtol=0, atol=1e-3)
        for first, last in ((0, 1), (3, 20), (17, 81), (40, 295), (599, 600)):
            assert torch.equal(invariant_matmul(x[first:last], weight), together[first:last])
    finally:
        torch.set_num_threads(before)


def test_small_blocks_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 32)
    product = torch.nn.functional.linear

    def splits_small_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.shape[0] >= 64:
            return product(x, weight)
        return product(x[:, :16], weight[:, :16]) + product(x[:, 16:], weight[:, 16:])

    monkeypatch.setattr(invariant, "_known", {})
    monkeypatch.setattr(invariant.F, "linear", splits_small_products)
    assert row_blocks(weight) == RowBlocks((256, 64), verified=True)
    x = torch.randn(70, 32)
    assert torch.equal(invariant_matmul(x[69:], weight), invariant_matmul(x, weight)[69:])


def test_a_product_that_depends_on_position_is_not_called_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.nn.functional.linear

    def favours_the_first_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = product(x, weight)
        out[0] = torch.nextafter(out[0], torch.tensor(9e9))
        return out

    monkeypatch.setattr(invariant, "_known", {})
    monkeypatch.setattr(invariant.F, "linear", favours_the_first_row)
    assert not row_blocks(torch.randn(24, 32)).verified
