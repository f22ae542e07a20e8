"""Quantizing at load: errors against what round-to-nearest costs, the bitsandbytes library's codes, and the engine."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from aphrodite.errors import ConfigError
from aphrodite.quantization.at_load import NF4_VALUES, AtLoad, QuantizedWeights, quantize, quantize_blocks
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.layouts import CodebookGroups, Int4Groups
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import QuantType, RawTensor

CPU = torch.device("cpu")


def normal(rows: int, columns: int) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02
    values[0] = 0.0
    values[1] = 0.25
    return values


def raw(values: torch.Tensor, name: str = "w") -> RawTensor:
    return RawTensor(
        name, tuple(values.shape), QuantType.F32, values.numpy().reshape(-1, values.shape[-1]).view(np.uint8)
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "most", "bits"), [("int4", 0.105, 4.19), ("int8", 0.0075, 8.13), ("bitsandbytes", 0.095, 4.51)]
)
def test_errors_are_those_of_the_bits(kind: AtLoad, most: float, bits: float) -> None:
    values = normal(64, 512)
    layout = quantize(values.clone(), kind)
    found = layout.dequantize()
    assert relative(found[2:], values[2:]) < most
    assert torch.equal(found[0], values[0])
    assert relative(found[1], values[1]) < 1e-3
    assert (layout.nbytes - 64) * 8 / values.numel() <= bits  # without the table of NF4


def test_the_search_beats_the_full_range() -> None:
    values = normal(64, 512)[2:]
    groups = values.view(len(values), -1, 128)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    zero = (-low / step).round()
    plain = (((groups / step).round() + zero).clamp(0, 15) - zero) * step
    found = quantize(values, "int4").dequantize()
    assert relative(found, values) < 0.97 * relative(plain.view_as(values), values)


def test_nf4_takes_the_nearest_number_of_the_codebook() -> None:
    values = normal(8, 128)
    layout = quantize(values, "bitsandbytes")
    assert isinstance(layout, CodebookGroups)
    groups = values.view(8, 2, 64)
    scale = groups.abs().amax(-1, keepdim=True)
    codebook = torch.tensor(NF4_VALUES)
    distance = (groups / scale.clamp(min=1e-30))[..., None].sub(codebook).abs()
    nearest = codebook[distance.argmin(-1)] * scale
    torch.testing.assert_close(layout.dequantize(), nearest.view(8, 128), rtol=1e-6, atol=0)


def test_nf4_is_the_bitsandbytes_librarys() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = normal(32, 256)[2:]
    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=False)
    expected = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(quantize(values, "bitsandbytes").dequantize(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("qtype", "most"), [(QuantType.Q4_1, 0.085), (QuantType.Q8_0, 0.006)])
def test_blocks_are_what_the_gguf_package_reads(qtype: QuantType, most: float) -> None:
    values = normal(64, 512)
    data = quantize_blocks(values, qtype)
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype.name]).reshape(values.shape)
    assert relative(torch.from_numpy(found)[2:], values[2:]) < most
    theirs = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[qtype.name]),
                                    gguf.GGMLQuantizationType[qtype.name])  # fmt: skip
    assert relative(torch.from_numpy(found), values) <= 1.001 * relative(torch.from_numpy(theirs), values)


def test_parameters_of_layers_only() -> None:
    names = ["embed.weight", "head.weight", "layers.0.q.weight", "layers.0.attn_norm.weight", "layers.0.router.weight"]
    weights = {name: raw(normal(64, 128), name) for name in names}
    weights["layers.0.expert_up.weight"] = raw(normal(48, 128).view(3, 16, 128), "experts")
    weights["layers.0.down.weight"] = raw(normal(64, 40), "down")  # not a multiple of 32
    on_host = QuantizedWeights(weights, "int4", on_host=True)
    assert {name: value.qtype.name for name, value in on_host.items()} == {
        **dict.fromkeys(weights, "F32"), "layers.0.q.weight": "Q4_1", "layers.0.expert_up.weight": "Q4_1"
    }  # fmt: skip
    expert = on_host["layers.0.expert_up.weight"]
    assert expert.shape == (3, 16, 128)
    assert np.array_equal(dequantize(expert.part(1)), dequantize(expert)[1])
    some = on_host["layers.0.q.weight"].take_rows(np.array([5, 2]))
    assert np.array_equal(dequantize(some), dequantize(on_host["layers.0.q.weight"])[[5, 2]])

    on_device = QuantizedWeights(weights, "int4", on_host=False)
    query = on_device["layers.0.q.weight"]
    assert decline_layout(query) is None
    layout = layout_of(query.take_rows(slice(3, 40)), CPU)
    assert isinstance(layout, Int4Groups)
    assert np.array_equal(layout.dequantize().numpy(), dequantize(query)[3:40])
    one = on_device["layers.0.expert_up.weight"].part(2)
    assert torch.equal(layout_of(one, CPU).dequantize(), quantize(normal(48, 128)[32:], "int4").dequantize())


def test_quantized_checkpoints_are_refused() -> None:
    packed = RawTensor("blk.0.attn_q", (2, 32), QuantType.Q8_0, np.zeros((2, 34), np.uint8))
    for kind in ("int4", "fp8"):
        with pytest.raises(ConfigError, match="quantized already"):
            QuantizedWeights({"layers.0.q.weight": packed}, kind, on_host=False)["layers.0.q.weight"]
