"""The cuts of dense products: every one can be launched."""

from __future__ import annotations

import pytest

from aphrodite.kernels.triton.dense_cuts import MEASURED, SHARED_BYTES, DenseConfig, dense_config
from aphrodite.kernels.triton.linear import WORKSPACE_TILES, WORKSPACE_VALUES

SHAPES = [(n, k) for n in (576, 1024, 4096, 6144, 28672, 128256) for k in (576, 1024, 4096, 14336)]


def check(cut: DenseConfig, shape: tuple[int, int], rows: int) -> None:
    tile_rows, chunks = cut.parts * cut.part, -(-shape[1] // cut.chunk)
    tiles = -(-rows // tile_rows) * -(-shape[0] // cut.columns)
    assert cut.stages >= 2
    assert 2 * cut.stages * cut.chunk * (tile_rows + cut.columns) <= SHARED_BYTES
    assert tile_rows * cut.columns <= 192 * 32 * cut.warps, "sums do not fit the registers"
    assert (cut.splits - 1) * -(-chunks // cut.splits) < chunks, "a split has no inputs"
    if cut.splits > 1:
        assert cut.splits % 2 == 0
        assert tiles <= WORKSPACE_TILES
        assert tiles * cut.splits * tile_rows * cut.columns <= WORKSPACE_VALUES


@pytest.mark.parametrize("rows", [17, 64, 65, 128, 144, 192, 193, 256])
def test_cuts_by_rule(rows: int) -> None:
    for shape in SHAPES:
        check(dense_config(*shape, rows), shape, rows)


def test_measured_cuts() -> None:
    for shape, cuts in MEASURED.items():
        for most, cut in cuts:
            if cut is not None:
                check(cut, shape, most)
