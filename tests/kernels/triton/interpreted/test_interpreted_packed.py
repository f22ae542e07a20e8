"""Products with packed weights of every layout against float64 of what they mean, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from packed_layouts import random_layouts

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.packed_gemm import PackedSkinnyCut, expand_planes, expand_rows, packed_skinny
from aphrodite.kernels.triton.packed_gemv import PackedGemvCut, packed_gemv
from aphrodite.layers import packed_linear
from aphrodite.layers.embedding import PackedEmbedding
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.packed_linear import PackedLinear
from aphrodite.quantization.planes import planes_of

ROWS, COLUMNS = 6, 192
LAYOUTS = random_layouts(ROWS, COLUMNS)
CHOICE = Choice("packed", ())

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str) -> None:
    torch.manual_seed(0)
    planes, weight = planes_of(LAYOUTS[name]), LAYOUTS[name].dequantize()
    if planes.permutation is not None:
        weight = weight[:, planes.permutation.long()]
    x = torch.randn(2, 2 * weight.shape[1])[:, : weight.shape[1]]
    expected = x.double() @ weight.double().T
    out = torch.full((2, 9), float("nan"))[:, :ROWS]
    packed_gemv(x, planes, out, cut=PackedGemvCut(4, 128, 1, 1))
    assert distance(out, expected) < 1e-5
    halves = torch.full((2, ROWS), float("nan"), dtype=torch.float16)
    packed_skinny((x * 0.1).half(), planes, halves, cut=PackedSkinnyCut(16, 128, 2, 2, 4))
    assert distance(halves, (x * 0.1).half().double() @ weight.double().T) < 1e-3
    brain = torch.full((2, ROWS), float("nan"), dtype=torch.bfloat16)
    packed_skinny(x.bfloat16(), planes, brain, cut=PackedSkinnyCut(16, 512, 1, 2, 4))
    assert distance(brain, x.bfloat16().double() @ weight.double().T) < 8e-3  # the interpreter cuts the result off
    dense = torch.full((3, weight.shape[1]), float("nan"))
    expand_planes(planes, dense, 2)
    assert distance(dense, weight[2:5]) < 1e-6
    expand_rows(planes, torch.tensor([5, 0, 3]), dense)
    assert distance(dense, weight[[5, 0, 3]]) < 1e-6


@pytest.mark.parametrize("cut", [PackedGemvCut(2, 128, 1, 1), PackedGemvCut(8, 256, 2, 1), PackedGemvCut(4, 128, 1, 2)])
def test_norm_bias_and_residual(cut: PackedGemvCut) -> None:
    planes, weight = planes_of(LAYOUTS["int4"]), LAYOUTS["int4"].dequantize()
    x, bias, residual = torch.randn(2, COLUMNS), torch.randn(ROWS), torch.randn(2, ROWS)
    norm = torch.rand(COLUMNS)
    expected = reference.rms_norm(x.double(), norm.double(), 1e-5) @ weight.double().T + bias + residual
    packed_gemv(x, planes, residual, Epilogue(bias, None, residual), (norm, 1e-5), cut)
    assert distance(residual, expected) < 1e-5


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("names", [["int4"], ["int4", "int8"], ["int4 act-order"]])
@pytest.mark.parametrize("gated", [False, True])
def test_layers(monkeypatch: pytest.MonkeyPatch, rows: int, names: list[str], gated: bool) -> None:
    monkeypatch.setattr(packed_linear, "SCRATCH_BYTES", 2 * COLUMNS * 4)  # four rows at a time
    packed_linear.shared_scratch.cache_clear()
    torch.manual_seed(rows)
    layouts = [LAYOUTS[name] for name in names]
    out = ROWS * len(layouts)
    bias, norm = torch.randn(out).half(), RmsNorm(torch.rand(COLUMNS).half(), 1e-5)
    linear = PackedLinear(layouts, bias, CHOICE, dtype=torch.float16, gated=gated)
    x = torch.randn(rows, COLUMNS).half()
    residual = torch.randn(rows, out // 2 if gated else out).half()
    weight = torch.cat([layout.dequantize() for layout in layouts]).double()
    expected = reference.rms_norm(x.double(), norm.weight.double(), norm.eps) @ weight.T + bias.double()
    if gated:
        expected = reference.silu_mul(expected)
    expected = expected + residual.double()
    found = linear(x, norm=norm, activation="silu" if gated else None, residual=residual)
    assert found.shape == expected.shape
    assert rows == 0 or distance(found, expected) < 2e-3
    packed_linear.shared_scratch.cache_clear()


@pytest.mark.parametrize("name", ["Q6_K", "Q8_0", "nf4"])
def test_embeddings_and_tied_heads(name: str) -> None:
    planes, weight = planes_of(LAYOUTS[name]), LAYOUTS[name].dequantize()
    embedding = PackedEmbedding(planes, torch.float32)
    ids = torch.tensor([4, 0, 4, 5], dtype=torch.int32)
    assert distance(embedding(ids), weight[ids.long()]) < 1e-6
    hidden = torch.randn(2, weight.shape[1])
    assert distance(embedding.tied_head()(hidden), hidden.double() @ weight.double().T) < 1e-5
    assert [tensor.data_ptr() for tensor in embedding.tied_head().tensors] == [t.data_ptr() for t in embedding.tensors]
