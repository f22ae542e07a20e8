"""Which kernels products with weights in points of a grid are made of; launches are recorded instead of made."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from packed_layouts import random_blocks
from pretended_device import PretendedDriver
from triton.runtime import driver

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.compile_ahead import Jobs
from aphrodite.kernels.triton.launch import gluon_version_reason, recording
from aphrodite.layers import packed_linear
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.packed_linear import PackedLinear
from aphrodite.quantization.types import QuantType

pytestmark = pytest.mark.skipif(gluon_version_reason() is not None, reason="Gluon's kernels do not run")


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    from aphrodite.kernels.triton import grid_gluon, grid_mma, grid_row

    card = grid_gluon.Card(132, 232_448)
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    monkeypatch.setattr(packed_linear, "mma_reason", lambda device: None)
    for module in (grid_gluon, grid_mma, grid_row):
        monkeypatch.setattr(module, "card_of", lambda device: card)


def launched(dtype: torch.dtype, rows: int) -> dict[str, bool | None]:
    """Names of the kernels of a product with a norm, and whether they have it in them."""
    layer = PackedLinear([random_blocks(QuantType.IQ2_XS, 64, 512)], None, Choice("packed", ()), dtype=dtype)
    jobs = Jobs()
    with recording(jobs):
        layer(torch.ones(rows, 512, dtype=dtype), norm=RmsNorm(torch.ones(512, dtype=dtype), 1e-5))
    made = [json.loads(job) for job in jobs.kernels]
    return {name: options.get("HAS_NORM") for _, name, _, options in made}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_has_its_norm_in_the_product_where_16_bits_hold_it(rows: int) -> None:
    """Before it is divided by its root mean square, a row times the norm's weight may be more than float16 holds."""
    assert launched(torch.bfloat16, rows) == {"grid_row_kernel": True}
    assert launched(torch.float16, rows) == {"_rms_norm_kernel": None, "grid_row_kernel": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_rows_are_normed_as_they_become_halves(dtype: torch.dtype) -> None:
    assert launched(dtype, 5) == {"_half_rows_kernel": True, "grid_mma_kernel": None}


def test_a_row_too_long_for_the_kernel_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    from aphrodite.kernels.triton.grid_gluon import Card
    from aphrodite.kernels.triton.grid_row import grid_row_cut

    with caplog.at_level(logging.INFO, "aphrodite"):
        for rows in (2, 1, 1):
            assert grid_row_cut(64, 1 << 20, rows, False, "iq2_xs", Card(132, 232_448)) is None
    assert [record.message for record in caplog.records] == [
        "a row times iq2_xs of 1048576 inputs: not by Gluon's kernel, for blocks have 232448 bytes"
    ]
