"""Dummy weights of quantized configurations: the types that the configuration names, of the spread of dense ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aphrodite.errors import ModelFormatError
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import GgufBlocks, Int4Groups, Int8Groups
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import QuantType

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 512,
    "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip
CPU = torch.device("cpu")


def opened(folder: Path, quantization: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    return open_checkpoint(folder, load_format="dummy")


@pytest.mark.parametrize(("method", "bits", "group"), [("awq", 4, 128), ("gptq", 4, -1), ("gptq", 8, 64)])
def test_groups(tmp_path: Path, method: str, bits: int, group: int) -> None:
    checkpoint = opened(tmp_path, {"quant_method": method, "bits": bits, "group_size": group})
    assert f"{method.upper()} {bits}-bit (56 tensors)" in checkpoint.quantization
    raw = checkpoint.weights["layers.3.down.weight"]
    assert decline_layout(raw) is None
    layout = layout_of(raw, CPU)
    assert isinstance(layout, Int4Groups if bits == 4 else Int8Groups)
    assert layout.shape == (512, 768)
    assert layout.group_size == (768 if group == -1 else group)
    assert layout.nbytes <= 1.06 * raw.nbytes
    for values in (layout.dequantize().numpy(), dequantize(raw)):
        assert abs(values.std() - 0.02) < 1e-3
        assert abs(values.mean()) < 3e-3  # half a code
    assert np.array_equal(
        dequantize(raw)[7:9], dequantize(checkpoint.weights["layers.3.down.weight"].take_rows(slice(7, 9)))
    )
    assert checkpoint.weights["embed.weight"].qtype is QuantType.F16


def test_a_mixture_of_blocks(tmp_path: Path) -> None:
    weights = opened(tmp_path, {"quant_method": "gguf", "file_type": "Q4_K_M"}).weights
    types = {name: parameter.qtype.name for name, parameter in weights.parameters.items()}
    assert types["embed.weight"] == "Q4_K"
    assert types["head.weight"] == "Q6_K"
    assert [types[f"layers.{layer}.v.weight"] for layer in range(8)].count("Q6_K") == 4
    assert types["layers.0.q.weight"] == types["layers.1.down.weight"] == "Q4_K"


@pytest.mark.parametrize("qtype", [*BLOCK_FORMS, *GRID_FORMS])
def test_blocks(tmp_path: Path, qtype: QuantType) -> None:
    raw = opened(tmp_path, {"quant_method": "gguf", "file_type": qtype.name}).weights["layers.0.up.weight"]
    layout = layout_of(raw, CPU)
    assert isinstance(layout, GgufBlocks)
    for values in (layout.dequantize().numpy(), dequantize(raw)):
        assert 0.01 < values.std() < 0.04
        assert abs(values.mean()) < 4e-3


def test_other_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="quant_method"):
        opened(tmp_path, {"quant_method": "fp8"})
    with pytest.raises(ModelFormatError, match="bits"):
        opened(tmp_path, {"quant_method": "gptq", "bits": 3})
    with pytest.raises(ModelFormatError, match="file_type"):
        opened(tmp_path, {"quant_method": "gguf", "file_type": "Q8_K"})
