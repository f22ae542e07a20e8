"""Products with packed weights on the GPU, against float64 of what the weights mean.

Tests launch all that they launch before they assert: they are gone through once for the sake of their kernels, which
are compiled in parallel, for one after the other takes minutes.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from packed_layouts import random_blocks, random_layouts

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.compile_ahead import Jobs, compile_ahead
from aphrodite.kernels.triton.launch import recording
from aphrodite.layers.linear import RmsNorm
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import PackedLayout
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

NAMES = list(random_layouts(1, 96))
CHOICE = Choice("packed", ())
OUT, COLUMNS = 320, 1152


@functools.cache
def _layouts() -> dict[str, PackedLayout]:
    return random_layouts(OUT, COLUMNS)


@pytest.fixture(scope="module", autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        return
    jobs, device = Jobs(), torch.device("cuda", torch.cuda.current_device())
    with recording(jobs):
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.module is request.module:
                with contextlib.suppress(AssertionError):
                    item.function(device=device, **item.callspec.params)
    compile_ahead(jobs, lambda done, count: None)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_within_the_tolerance(device: torch.device, name: str) -> None:
    from aphrodite.layers.packed_linear import PackedLinear

    layout = _layouts()[name]
    weight = layout.dequantize().double().to(device)
    linear = PackedLinear([layout.to(device)], None, CHOICE, dtype=torch.bfloat16)
    tables = [part.table for part in linear.parts]  # a model's layers share them
    stored = sum(tensor.nbytes for tensor in linear.tensors if all(tensor is not table for table in tables))
    errors = {}
    for rows in (1, 2, 4, 5, 17, 64, 65, 300):
        x = torch.randn(rows, weight.shape[1], device=device).bfloat16()
        expected = x.double() @ weight.T
        errors[rows] = float((linear(x).double() - expected).norm() / expected.norm())
    assert stored <= 1.06 * layout.nbytes
    # Above 64 rows weights are rounded to bfloat16, which alone is 1.6e-3, as rounding the result is.
    assert all(error < (2e-3 if rows <= 64 else 2.5e-3) for rows, error in errors.items()), errors


@pytest.mark.parametrize("qtype", GRID_FORMS)
def test_points_are_those_of_the_file_bit_by_bit(device: torch.device, qtype: QuantType) -> None:
    from aphrodite.kernels.triton.packed_gemm import expand_planes, expand_rows

    blocks = random_blocks(qtype, OUT, 4 * 768)
    planes, weight = planes_of(blocks.to(device)), blocks.dequantize()
    dense = torch.empty(OUT - 3, 4 * 768, device=device)
    expand_planes(planes, dense, 3)
    numbers = torch.tensor([7, 0, 319, 7], device=device)
    named = torch.empty(4, 4 * 768, device=device)
    expand_rows(planes, numbers, named)
    assert torch.equal(dense.cpu(), weight[3:])
    assert torch.equal(named.cpu(), weight[numbers.cpu()])


@pytest.mark.parametrize("qtype", [QuantType.IQ2_XS, QuantType.IQ3_XXS, QuantType.IQ1_M])
@pytest.mark.parametrize(("out", "columns", "gated"), [(514, 4096, True), (130, 14336, False), (66, 28672, False)])
def test_rows_of_points(device: torch.device, qtype: QuantType, out: int, columns: int, gated: bool) -> None:
    from aphrodite.layers.packed_linear import PackedLinear

    layout = random_blocks(qtype, out, columns)
    weight = layout.dequantize().double().to(device)
    linear = PackedLinear([layout.to(device)], None, CHOICE, dtype=torch.bfloat16, gated=gated)
    norm = RmsNorm(torch.rand(columns, device=device).bfloat16(), 1e-5) if gated else None
    errors = []
    for rows in (1, 2, 7, 33):
        x = torch.randn(rows, columns, device=device).bfloat16()
        residual = torch.randn(rows, out // 2 if gated else out, device=device).bfloat16()
        expected = (reference.rms_norm(x.double(), norm.weight.double(), norm.eps) if norm else x.double()) @ weight.T
        expected = (reference.silu_mul(expected) if gated else expected) + residual.double()
        found = linear(x, norm=norm, activation="silu" if gated else None, residual=residual)
        errors.append(float((found.double() - expected).norm() / expected.norm()))
    assert max(errors) < 2e-3, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 4, 5, 200])
def test_layers(device: torch.device, rows: int, dtype: torch.dtype) -> None:
    from aphrodite.layers.packed_linear import PackedLinear

    torch.manual_seed(rows)
    layouts, errors = _layouts(), {}
    for names in (["int4"], ["int4", "int8"], ["int4 act-order"], ["Q4_0", "Q8_0"]):
        for gated in (False, True):
            chosen = [layouts[name].to(device) for name in names]
            out = OUT * len(chosen)
            bias = torch.randn(out, device=device).to(dtype)
            norm = RmsNorm(torch.rand(COLUMNS, device=device).to(dtype), 1e-5)
            linear = PackedLinear(chosen, bias, CHOICE, dtype=dtype, gated=gated)
            x = torch.randn(rows, COLUMNS, device=device).to(dtype)
            residual = torch.randn(rows, out // 2 if gated else out, device=device).to(dtype)
            weight = torch.cat([layout.dequantize() for layout in chosen]).double()
            expected = reference.rms_norm(x.double(), norm.weight.double(), norm.eps) @ weight.T + bias.double()
            expected = (reference.silu_mul(expected) if gated else expected) + residual.double()
            found = linear(x, norm=norm, activation="silu" if gated else None, residual=residual)
            errors[*names, gated] = float((found.double() - expected).norm() / expected.norm())
    # The exponential of a gate is computed as a power of two: wrong by 2^-24 times the gate.
    bounds = {case: 2e-3 if dtype == torch.float16 else 1e-5 if case[-1] else 5e-6 for case in errors}
    assert all(error < bounds[case] for case, error in errors.items()), errors
