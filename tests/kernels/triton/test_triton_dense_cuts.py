"""The cuts of dense products: every one can be launched."""

from __future__ import annotations

import logging

import pytest
import torch

from aphrodite.kernels.triton import dense_cuts
from aphrodite.kernels.triton.dense_cuts import (
    MEASURED,
    NARROW,
    SHARED_BYTES,
    WIDE,
    DenseConfig,
    dense_cut,
    dense_supports,
)

CUTS = [(64, NARROW), (64, WIDE), *(row for cuts in MEASURED.values() for row in cuts)]


@pytest.mark.parametrize(("most", "cut"), CUTS, ids=str)
def test_every_cut_fits(most: int, cut: DenseConfig) -> None:
    tile_rows = cut.parts * cut.part
    assert most <= 2 * tile_rows
    assert cut.stages >= 2
    assert 2 * cut.stages * cut.chunk * (tile_rows + cut.columns) <= SHARED_BYTES
    assert tile_rows * cut.columns <= 192 * 32 * cut.warps, "sums do not fit the registers"
    assert cut.part == 64 or cut.warps == 8


def test_rows_choose_their_cut() -> None:
    assert dense_cut(28672, 4096, 32) is None
    assert dense_cut(28672, 4096, 33) == WIDE
    assert dense_cut(6144, 4096, 64) == NARROW
    assert dense_cut(1024, 2048, 64) is None
    assert dense_cut(151936, 1024, 64) is None
    assert dense_cut(28672, 4096, 65) == MEASURED[28672, 4096][0][1]
    assert dense_cut(28672, 4096, 257) is None


def test_another_card_is_told_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dense_cuts, "gluon_reason", lambda device: "it is another card")
    dense_cuts.dense_reason.cache_clear()
    x, weight = torch.zeros(40, 64, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="aphrodite.kernels"):
        assert not dense_supports(x, weight)
        assert not dense_supports(x, weight)
    dense_cuts.dense_reason.cache_clear()
    assert caplog.messages == ["dense products of more than 32 rows: not by Gluon's kernel, for it is another card"]
