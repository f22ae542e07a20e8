"""Weights that name points of a grid, read by kernels under Triton's interpreter, against the gguf package's values."""

from __future__ import annotations

import gguf
import pytest
import torch
from packed_layouts import random_blocks

from aphrodite.kernels import reference
from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton import grouped_gemm
from aphrodite.kernels.triton import packed_gemv as gemv
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.expert_weights import ExpertWeights
from aphrodite.kernels.triton.grouped_gemm import PairConfig
from aphrodite.kernels.triton.packed_gemm import expand_planes, expand_rows
from aphrodite.kernels.triton.packed_gemv import PackedGemvCut, grid_gemv_cut, packed_gemv
from aphrodite.layers.embedding import PackedEmbedding
from aphrodite.layers.linear import RmsNorm
from aphrodite.layers.packed_linear import PackedLinear
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.planes import planes_of
from aphrodite.quantization.types import QuantType

ROWS, COLUMNS = 6, 768
TYPES = [*GRID_FORMS]


def exact(qtype: QuantType, seed: int = 0) -> torch.Tensor:
    """float32 `[ROWS, COLUMNS]`."""
    blocks = random_blocks(qtype, ROWS, COLUMNS, seed).data.numpy()
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[qtype.name])
    return torch.from_numpy(values).view(ROWS, COLUMNS)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("qtype", TYPES)
def test_expanded_rows_are_those_of_the_file_bit_by_bit(qtype: QuantType) -> None:
    planes, weight = planes_of(random_blocks(qtype, ROWS, COLUMNS)), exact(qtype)
    dense = torch.full((3, COLUMNS), float("nan"))
    expand_planes(planes, dense, 2)
    assert torch.equal(dense, weight[2:5])
    expand_rows(planes, torch.tensor([5, 0, 3]), dense)
    assert torch.equal(dense, weight[[5, 0, 3]])


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_of_a_row_with_norm_and_residual(qtype: QuantType, dtype: torch.dtype) -> None:
    """In chunks, the last of which is beyond the columns."""
    torch.manual_seed(1)
    planes, weight = planes_of(random_blocks(qtype, ROWS, COLUMNS)), exact(qtype).double()
    x, norm = torch.randn(1, COLUMNS).to(dtype), torch.rand(COLUMNS).to(dtype)
    residual = torch.randn(1, ROWS).to(dtype)
    expected = reference.rms_norm(x.double(), norm.double(), 1e-5) @ weight.T + residual.double()
    packed_gemv(x, planes, residual, Epilogue(None, None, residual), (norm, 1e-5), PackedGemvCut(4, 512, 1, 1))
    assert distance(residual, expected) < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("qtype", [QuantType.IQ2_XS, QuantType.IQ3_S, QuantType.IQ1_M])
def test_two_rows_gated(qtype: QuantType) -> None:
    planes, weight = planes_of(random_blocks(qtype, ROWS, COLUMNS)), exact(qtype).double()
    x, bias, out = torch.randn(2, COLUMNS).half(), torch.randn(ROWS).half(), torch.empty(2, ROWS // 2).half()
    packed_gemv(x, planes, out, Epilogue(bias, "silu"), cut=PackedGemvCut(2, 1024, 2, 1))
    pairs = (x.double() @ weight.T + bias.double()).view(2, -1, 2)
    assert distance(out, reference.silu_mul(torch.cat((pairs[..., 0], pairs[..., 1]), dim=1))) < 1e-3


@pytest.mark.parametrize("qtype", [QuantType.IQ2_XS, QuantType.IQ1_M])
def test_experts_of_a_token_alone(qtype: QuantType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grouped_gemm, "pair_config", lambda out, columns, packed: PairConfig(2 if packed else 256, 512, 4)
    )
    weight, x = exact(qtype).double().view(3, 2, COLUMNS), torch.randn(1, COLUMNS).half() / 8
    gate_up = ExpertWeights(planes_of(random_blocks(qtype, ROWS, COLUMNS)), 3)
    down = ExpertWeights(torch.ones((3, COLUMNS, 1)).half(), 3)
    chosen, weights = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([[0.25, 0.75]])
    found = grouped_gemm.experts_of_pairs(x, chosen, weights, gate_up, down, "silu", None)
    gate, up = (weight[[2, 0]] @ x[0].double()).T
    expected = (torch.nn.functional.silu(gate) * up * weights[0].double()).sum()
    assert distance(found, expected.expand(1, COLUMNS)) < 2e-3


def test_two_long_rows_are_multiplied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [grid_gemv_cut(14336, rows, False).rows for rows in (1, 2)] == [4, 1]
    assert grid_gemv_cut(16384, 2, True).rows == 2
    monkeypatch.setattr(gemv, "GRID_COLUMNS", 512)
    planes, x = planes_of(random_blocks(QuantType.IQ2_XXS, ROWS, COLUMNS)), torch.randn(2, COLUMNS)
    out = torch.full((2, ROWS), float("nan"))
    packed_gemv(x, planes, out)
    assert distance(out, x.double() @ exact(QuantType.IQ2_XXS).double().T) < 1e-5


@pytest.mark.parametrize("qtype", [QuantType.IQ3_XXS, QuantType.IQ2_S])
def test_embeddings_and_layers(qtype: QuantType) -> None:
    blocks, weight = random_blocks(qtype, ROWS, COLUMNS), exact(qtype)
    embedding = PackedEmbedding(planes_of(blocks), torch.float32)
    ids = torch.tensor([4, 0, 4, 5], dtype=torch.int32)
    assert torch.equal(embedding(ids), weight[ids.long()])
    norm, x = RmsNorm(torch.rand(COLUMNS).half(), 1e-5), torch.randn(5, COLUMNS).half()
    linear = PackedLinear([blocks], None, Choice("packed", ()), dtype=torch.float16, gated=True)
    expected = reference.rms_norm(x.double(), norm.weight.double(), norm.eps) @ weight.double().T
    assert distance(linear(x, norm=norm, activation="silu"), reference.silu_mul(expected)) < 2e-3
