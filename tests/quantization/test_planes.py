"""Planes of bits against the gguf package's values, and against the layouts that they are made of."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from packed_layouts import random_blocks, random_layouts

from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import GgufBlocks, Int4Groups, Int8Groups
from aphrodite.quantization.planes import Planes, decline_planes, planes_of
from aphrodite.quantization.types import QuantType

ROWS, COLUMNS = 5, 512
# Where the fields of a word begin, by their bits.
POSITIONS = {
    1: [4, 0, 5, 1, 6, 2, 7, 3],
    2: [4, 0, 6, 2, 12, 8, 14, 10],
    4: [0, 4, 8, 12, 16, 20, 24, 28],
    8: [0, 8, 16, 24],
}
GROUPED = [name for name, layout in random_layouts(1, 96).items() if not isinstance(layout, GgufBlocks)]


def decoded(planes: Planes) -> torch.Tensor:
    """What planes mean, column by column: float64 `[out, columns]`."""
    form, out = planes.form, torch.empty((planes.rows, planes.form.columns), dtype=torch.float64)
    in_word = 4 if form.low_bits == 8 else 8
    for column in range(form.columns):
        run, within = divmod(column, 4 * in_word)
        index, word = within // 4, 4 * run + within % 4
        code = planes.low[:, word].long() >> POSITIONS[form.low_bits][index] & (1 << form.low_bits) - 1
        if planes.high is not None:
            high = planes.high[:, word].long() >> POSITIONS[form.high_bits][index] & (1 << form.high_bits) - 1
            code |= high << form.low_bits
        value = (code - form.zero).double()
        if form.kind == "table":
            assert planes.table is not None
            value = planes.table[code].double()
        elif form.kind != "integer":
            float8 = torch.float8_e4m3fn if form.kind == "e4m3" else torch.float8_e5m2
            value = code.to(torch.uint8).view(float8).double()
        scale, offset = factors(planes, column)
        out[:, column] = (value - offset) * scale if form.offset == "zeros" else value * scale - offset
    return out


def factors(planes: Planes, column: int) -> tuple[torch.Tensor, torch.Tensor]:
    form, group = planes.form, column // planes.form.group_size
    scale, offset = planes.scales[:, group].double(), torch.zeros(planes.rows, dtype=torch.float64)
    if form.offset == "paired":
        byte = planes.scales[:, group].view(torch.uint8)
        scale, offset = (byte & 15).double(), (byte >> 4).double()
    elif planes.offsets is not None:
        offset = planes.offsets[:, group].double()
    if planes.super_scales is not None:
        scale *= planes.super_scales[:, column // form.super_size].double()
    if planes.super_offsets is not None:
        offset *= planes.super_offsets[:, column // form.super_size].double()
    return scale, offset


@pytest.mark.parametrize("qtype", BLOCK_FORMS)
def test_blocks(qtype: QuantType) -> None:
    blocks = random_blocks(qtype, ROWS, COLUMNS)
    planes = planes_of(blocks)
    kind = gguf.GGMLQuantizationType[qtype.name]
    expected = gguf.quants.dequantize(blocks.data.numpy(), kind).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(decoded(planes).numpy(), expected, rtol=2e-6, atol=1e-9)
    assert sum(tensor.nbytes for tensor in planes.tensors if tensor is not planes.table) <= 1.06 * blocks.nbytes


@pytest.mark.parametrize("qtype", GRID_FORMS)
def test_points_take_the_memory_of_the_file(qtype: QuantType) -> None:
    """What they mean, kernels tell: tests/kernels/triton/interpreted/test_interpreted_grid.py."""
    blocks = random_blocks(qtype, ROWS, COLUMNS)
    planes, again = planes_of(blocks), planes_of(blocks.take_rows(slice(1, 3)))
    assert planes.table is again.table
    assert sum(tensor.nbytes for tensor in planes.tensors if tensor is not planes.table) <= 1.06 * blocks.nbytes
    for whole, part in zip(planes.tensors, again.tensors, strict=True):
        assert whole is planes.table or torch.equal(whole[1:3], part)


@pytest.mark.parametrize("name", GROUPED)
def test_layouts(name: str) -> None:
    layout = random_layouts(ROWS, 96)[name]
    assert decline_planes(layout) is None
    planes = planes_of(layout)
    order = torch.arange(96) if planes.permutation is None else planes.permutation.long()
    np.testing.assert_allclose(decoded(planes).numpy(), layout.dequantize()[:, order].numpy(), rtol=1e-6, atol=1e-6)
    assert sum(tensor.nbytes for tensor in planes.tensors) == layout.nbytes


def test_what_does_not_fit_is_declined() -> None:
    layout = random_layouts(ROWS, 96)["int4"]
    assert isinstance(layout, Int4Groups)
    narrow = Int4Groups(layout.codes[:, :8], layout.scales[:, :1], layout.zeros[:, :1], 16)
    assert "multiple of 32" in str(decline_planes(narrow))
    odd = Int4Groups(layout.codes, layout.scales.repeat(1, 4), layout.zeros.repeat(1, 4), 8)
    assert "groups of 8" in str(decline_planes(odd))
    fine = Int8Groups(torch.zeros((1, 96), dtype=torch.int8), torch.ones((1, 24)), None, 4)
    assert "groups of 4" in str(decline_planes(fine))  # a run of 16 columns has two scales at most
    unknown = GgufBlocks(torch.zeros((1, QuantType.Q8_K.block_bytes), dtype=torch.uint8), QuantType.Q8_K)
    assert "Q8_K" in str(decline_planes(unknown))
