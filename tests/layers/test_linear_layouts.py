"""Linear layers and activations against float64 arithmetic on the dequantized values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from aphrodite.attention.torch_paged import rotate
from aphrodite.errors import ModelFormatError
from aphrodite.kernels import reference
from aphrodite.layers.activation import gated_activation
from aphrodite.layers.linear import DenseLinear, Int4Linear, build_linear
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import GptqMatrix, PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor

CPU = torch.device("cpu")


def quantized(rows: int, columns: int, qtype: QuantType, seed: int) -> tuple[RawTensor, torch.Tensor]:
    """A random matrix in a file format, and what it means in float64, both by the gguf package."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    ggml = gguf.GGMLQuantizationType(qtype.gguf_id)
    data = gguf.quantize(values, ggml)
    meaning = torch.from_numpy(gguf.dequantize(data, ggml).astype(np.float64))
    return RawTensor(f"w{seed}", (rows, columns), qtype, data.view(np.uint8)), meaning


def bias_of(rows: int, seed: int) -> RawTensor:
    values = np.random.default_rng(seed).normal(size=rows).astype("<f4")
    return RawTensor(f"b{seed}", (rows,), QuantType.F32, values.view(np.uint8)[None])


@pytest.mark.parametrize("rows_in", [1, 5, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_4_bit_equals_dequantized(rows_in: int, with_bias: bool) -> None:
    first, first_meaning = quantized(32, 96, QuantType.Q4_0, 1)
    second, second_meaning = quantized(16, 96, QuantType.Q4_1, 2)
    bias = bias_of(16, 3) if with_bias else None
    linear = build_linear([first, second], [None, bias], torch.bfloat16, CPU)
    assert isinstance(linear, Int4Linear)
    assert sum(tensor.nbytes for tensor in linear.tensors) == 48 * 96 // 2 + 48 * 3 * 4 + (48 * 2 if with_bias else 0)

    x = torch.randn(rows_in, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ torch.cat((first_meaning, second_meaning)).T
    if bias is not None:
        expected[:, 32:] += torch.from_numpy(bias.data.view("<f4")[0].astype(np.float64))
    error = (linear(x).double() - expected).abs().mean() / expected.abs().mean()
    assert error < 0.01  # bfloat16 scales and outputs: 8 bits each


def gptq(
    rows: int, columns: int, seed: int, *, bits: int = 4, group: int = 32, act_order: bool = False
) -> PackedTensor:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 32, (columns * bits // 32, rows), np.uint32)
    zeros = rng.integers(0, 1 << 32, (columns // group, rows * bits // 32), np.uint32)
    values = rng.uniform(0.001, 0.01, (columns // group, rows)).astype("<f2")
    scales = RawTensor("scales", values.shape, QuantType.F16, values.view(np.uint8))
    order = np.random.default_rng(7).permutation(columns) // group if act_order else None
    return PackedTensor(f"w{seed}", QuantType.F16, GptqMatrix(bits, words, zeros, 1, scales, order))


@pytest.mark.parametrize(("group", "act_order"), [(32, False), (64, True)])
def test_groups_of_4_bits_stay_packed(group: int, act_order: bool) -> None:
    parts = [gptq(32, 128, seed, group=group, act_order=act_order) for seed in range(2)]
    linear = build_linear(parts, [None, None], torch.bfloat16, CPU)
    assert isinstance(linear, Int4Linear)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ torch.from_numpy(np.concatenate([dequantize(part) for part in parts])).double().T
    assert (linear(x).double() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([gptq(16, 64, 1, bits=8)], "needs 4 bits in groups"),
        ([gptq(16, 96, 1, group=48)], "takes groups of 32, 64, 128, 256"),
        ([gptq(16, 64, 1), gptq(16, 64, 2, act_order=True)], "needs 4 bits in groups"),
    ],
)
def test_groups_that_the_kernel_does_not_take_become_dense(parts: list[PackedTensor], reason: str) -> None:
    linear = build_linear(parts, [None] * len(parts), torch.bfloat16, CPU)
    assert isinstance(linear, DenseLinear)
    assert any(reason in why for why in linear.choice.reasons)


@pytest.mark.parametrize("qtype", [QuantType.Q4_0, QuantType.Q4_1, QuantType.Q8_0, QuantType.F16, QuantType.F32])
def test_float32_is_exact(qtype: QuantType) -> None:
    raw, meaning = quantized(24, 64, qtype, 4)
    linear = build_linear([raw, raw], [None, None], torch.float32, CPU)
    assert isinstance(linear, DenseLinear)
    assert torch.equal(linear.weight.double(), torch.cat((meaning, meaning)))
    x = torch.randn(3, 64)
    torch.testing.assert_close(linear(x).double(), x.double() @ torch.cat((meaning, meaning)).T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "qtype", "dtype", "reason"),
    [
        (16, QuantType.Q8_0, torch.bfloat16, "Q8_0"),
        (16, QuantType.Q4_1, torch.float16, "float16"),
        (24, QuantType.Q4_1, torch.bfloat16, "24"),
    ],
)
def test_what_packing_declines_becomes_dense_with_the_reason(
    rows: int, qtype: QuantType, dtype: torch.dtype, reason: str
) -> None:
    raw, meaning = quantized(rows, 64, qtype, 5)
    linear = build_linear([raw], [None], dtype, CPU)
    assert isinstance(linear, DenseLinear)
    assert reason in str(linear.choice)
    assert torch.equal(linear.weight, meaning.to(dtype))


def test_mixed_storage_types_are_stacked_dense() -> None:
    first, first_meaning = quantized(16, 64, QuantType.Q4_1, 6)
    second, second_meaning = quantized(16, 64, QuantType.Q8_0, 7)
    linear = build_linear([first, second], [None, None], torch.bfloat16, CPU)
    assert isinstance(linear, DenseLinear)
    assert torch.equal(linear.weight, torch.cat((first_meaning, second_meaning)).bfloat16())


def test_large_matrices_are_converted_in_pieces_without_seams() -> None:
    values = np.random.default_rng(8).normal(size=(2049, 4096)).astype("<f4")
    raw = RawTensor("w", values.shape, QuantType.F32, values.view(np.uint8))
    linear = build_linear([raw], [None], torch.float32, CPU)
    assert isinstance(linear, DenseLinear)
    assert np.array_equal(linear.weight.numpy(), values)


def test_values_beyond_float16_are_refused_by_name() -> None:
    values = np.full((16, 32), 1e6, dtype="<f4")
    with pytest.raises(ModelFormatError, match=r"blk\.0.*float16"):
        build_linear([RawTensor("blk.0", (16, 32), QuantType.F32, values.view(np.uint8))], [None], torch.float16, CPU)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_activations_equal_the_reference(dtype: torch.dtype, atol: float) -> None:
    gate_up = torch.randn(7, 60, dtype=torch.float64).mul_(3).to(dtype)
    gate_up[0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    for kind, definition in (("silu", reference.silu_mul), ("gelu_tanh", reference.gelu_tanh_mul)):
        out = gated_activation(gate_up, kind)  # type: ignore[arg-type]
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), definition(gate_up.double()), rtol=1e-2, atol=atol)


def test_rotation_equals_the_reference_and_leaves_the_rest_of_a_head_alone() -> None:
    x = torch.randn(5, 3, 20, dtype=torch.float64)
    cos, sin = torch.randn(2, 9, 6, dtype=torch.float64)
    positions = torch.tensor([8, 0, 3, 3, 1], dtype=torch.int32)
    expected = reference.apply_rotary(x, positions, cos, sin)
    torch.testing.assert_close(rotate(x, cos[positions][:, None], sin[positions][:, None]), expected)
    assert torch.equal(expected[..., 12:], x[..., 12:])
