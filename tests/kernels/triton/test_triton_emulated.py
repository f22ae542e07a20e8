"""What Gluon's kernels compute, without a GPU: their PTX on numpy, against float64 of what the weights mean."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import pytest
import torch
from cases_grid import mma_case, row_case
from compiling import compile_case
from packed_layouts import random_blocks
from ptx_emulator import Memory, run_ptx

from aphrodite.kernels import reference
from aphrodite.kernels.triton.launch import ceil_div, gluon_version_reason
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.planes import Planes, planes_of
from aphrodite.quantization.types import QuantType

pytestmark = pytest.mark.skipif(gluon_version_reason() is not None, reason="Gluon's kernels do not run")
TARGET, PROGRAMS = "sm_90", 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"bf16": 2.3e-3, "fp16": 3e-4}  # rounding the result is most of it


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Launch:
    """A product's operands in an emulated device's memory."""

    def __init__(self, qtype: QuantType, out: int, columns: int, rows: int, gated: bool, dtype: str) -> None:
        torch.manual_seed(rows)
        blocks = random_blocks(qtype, out, columns)
        self.weight, self.planes = blocks.dequantize().double(), planes_of(blocks)
        self.x = torch.randn(rows, columns).to(DTYPES[dtype])
        self.residual = torch.randn(rows, out // 2 if gated else out).to(DTYPES[dtype])
        self.gated = gated
        self.memory = Memory()
        self.out = self.put(self.residual)

    def put(self, tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else self.memory.put(_numpy(tensor))

    def plane_arguments(self, dtype: torch.dtype) -> list[int]:
        from aphrodite.kernels.triton.grid_gluon import operand_table

        planes: Planes = self.planes
        table = operand_table(planes.form.kind, dtype, torch.device("cpu"))
        return [self.put(plane) for plane in (planes.low, planes.high, planes.scales, planes.super_scales, table)]

    def error(self, x: torch.Tensor) -> float:
        """Of what the kernel has left, relative to the product of `x` float64."""
        expected = x @ self.weight.T
        if self.gated:
            pairs = expected.view(len(x), -1, 2)
            expected = reference.silu_mul(torch.cat((pairs[..., 0], pairs[..., 1]), dim=1))
        else:
            expected = expected + self.residual.double()
        raw = torch.from_numpy(self.memory.get(self.out, _numpy(self.residual)))
        found = raw.view(self.residual.dtype).double()
        return float((found - expected).norm() / expected.norm())


def _row_error(
    qtype: QuantType, shape: tuple[int, int], rows: int, cut: tuple[int, ...], gated: bool, normed: bool, dtype: str
) -> float:
    """`cut`: a GridRowCut."""
    from aphrodite.kernels.triton.grid_row import GridRowCut

    whole = GridRowCut(*cut)
    case = row_case(
        qtype.name, shape, rows, gated=gated, normed=normed, dtype=dtype, cut=whole, multiprocessors=PROGRAMS
    )
    launch = _Launch(qtype, *shape, rows, gated, dtype)
    norm = torch.rand(shape[1]).to(DTYPES[dtype])
    arguments = [
        launch.put(launch.x), shape[1], launch.put(norm), 1e-5, *launch.plane_arguments(DTYPES[dtype]), 0, launch.out,
        launch.out, launch.residual.shape[1], shape[0], ceil_div(shape[0], whole.tile),
    ]  # fmt: skip
    made = compile_case(case, TARGET)
    run_ptx(
        made.asm["ptx"], case.num_warps, made.shared, (whole.programs(shape[0], PROGRAMS), 1), arguments, launch.memory
    )
    x = launch.x.double()
    return launch.error(reference.rms_norm(x, norm.double(), 1e-5) if normed else x)


def _mma_error(
    qtype: QuantType, shape: tuple[int, int], rows: int, cut: tuple[int, ...], gated: bool, dtype: str
) -> float:
    """`cut`: a GridMmaCut."""
    from aphrodite.kernels.triton.grid_mma import GridMmaCut

    whole = GridMmaCut(*cut)
    case = mma_case(qtype.name, shape, rows, gated=gated, dtype=dtype, cut=whole)
    launch = _Launch(qtype, *shape, rows, gated, dtype)
    x, scales = launch.x.half(), 2.0 ** (torch.arange(rows) % 5 - 3).float()
    tiles = ceil_div(shape[0], 16 * whole.warps * whole.strips)
    workspace = torch.zeros(whole.splits, tiles * 16 * whole.warps * whole.strips, case.arguments["COLUMNS"])
    arguments = [
        launch.put(x), shape[1], launch.put(scales), *launch.plane_arguments(torch.float16), 0, launch.out, launch.out,
        launch.residual.shape[1], launch.put(workspace), launch.put(torch.zeros(tiles).int()), rows, shape[0],
    ]  # fmt: skip
    made = compile_case(case, TARGET)
    run_ptx(made.asm["ptx"], case.num_warps, made.shared, (tiles, whole.splits), arguments, launch.memory)
    return launch.error(x.double() * scales.double()[:, None])


@pytest.mark.parametrize("qtype", GRID_FORMS)
def test_a_row_of_every_kind(qtype: QuantType) -> None:
    """With a norm, whose product with the activations takes two 16-bit numbers."""
    copies = 1 if qtype == QuantType.TQ1_0 else 2
    assert _row_error(qtype, (48, 1024), 1, (2, 1, 1, 2, 2, 1, copies), False, True, "fp16") < BOUNDS["fp16"]


@pytest.mark.parametrize(
    ("shape", "rows", "cut", "gated", "normed", "dtype"),
    [
        ((64, 2560), 1, (2, 2, 1, 2, 1, 1, 8), True, True, "bf16"),  # the last step ends beyond the columns
        ((40, 1024), 1, (4, 1, 1, 2, 1, 1, 8), False, True, "bf16"),  # activations stay in registers
        ((80, 1280), 2, (4, 1, 1, 1, 2, 1, 4), True, True, "fp16"),  # two pairs of lines
        ((70, 2048), 2, (2, 1, 2, 2, 2, 1, 2), False, False, "bf16"),  # a tile ends beyond the rows
    ],
)
def test_rows_in_other_cuts(
    shape: tuple[int, int], rows: int, cut: tuple[int, ...], gated: bool, normed: bool, dtype: str
) -> None:
    assert _row_error(QuantType.IQ2_XS, shape, rows, cut, gated, normed, dtype) < BOUNDS[dtype]


@pytest.mark.parametrize("qtype", GRID_FORMS)
def test_six_rows_of_every_kind(qtype: QuantType) -> None:
    assert _mma_error(qtype, (64, 768), 6, (4, 1, 2, 1, 3, 1, 1), False, "fp16") < BOUNDS["fp16"]


@pytest.mark.parametrize(
    ("shape", "rows", "cut", "gated", "dtype"),
    [
        ((200, 1280), 8, (4, 2, 1, 2, 3, 1, 8), True, "bf16"),
        ((128, 768), 40, (8, 1, 1, 1, 3, 2, 4), False, "fp16"),
    ],
)
def test_more_rows_in_other_cuts(
    shape: tuple[int, int], rows: int, cut: tuple[int, ...], gated: bool, dtype: str
) -> None:
    assert _mma_error(QuantType.IQ2_XS, shape, rows, cut, gated, dtype) < BOUNDS[dtype]
