"""Checkpoints of mixtures of experts as they are published: MXFP4 experts, experts apart, damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import pytest
import torch
from family_cases import CASES, write_gguf
from safetensors.torch import load_file, save_file
from torch_executor_cases import Driver, executor_of, prompts

from aphrodite.errors import ModelFormatError
from aphrodite.layers.moe import route
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.models.spec import MoeSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.runner.torch_executor import TorchExecutor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_experts_of_safetensors(tmp_path: Path) -> None:
    model = CASES["gpt-oss"].model()
    generator = torch.Generator().manual_seed(3)
    packed = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, columns, rows = parameter.shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), generator=generator)
        exponents = torch.randint(122, 125, codes.shape[:-1], generator=generator)
        values = E2M1[codes] * torch.exp2(exponents.float() - 127)[..., None]
        parameter.data = values.flatten(2).swapaxes(1, 2).contiguous()
        packed[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        packed[f"{name}_scales"] = exponents.to(torch.uint8)
    model.save_pretrained(tmp_path)
    dense = executor_of(model)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if f"{name}_blocks" not in packed}
    assert len(kept) == len(tensors) - len(packed) // 2
    save_file({**kept, **packed}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.parameters["layers.0.expert_up.weight"].qtype is QuantType.MXFP4
    other = executor_at(checkpoint)
    (tokens,) = prompts(211, (70,))
    results = []
    for executor in (dense, other):
        driver = Driver(executor)
        results.append(driver.step([(driver.add(tokens), 70)])[0])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5)
    del packed[next(name for name in packed if name.endswith("_scales"))]
    save_file({**kept, **packed}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"has no .*_scales"):
        open_checkpoint(tmp_path)


def test_first_gguf_files_of_mixtral_keep_experts_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mixtral"]
    model = case.model()
    stacked = family_cases.gguf_tensors

    def apart(*args: Any) -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for name, values in stacked(*args).items():
            if "_exps" not in name:
                tensors[name] = values
                continue
            for expert, own in enumerate(values):
                tensors[name.replace("_exps", f".{expert}")] = own
        return tensors

    (tokens,) = prompts(211, (40,))
    results = []
    for number in range(2):
        checkpoint = open_checkpoint(write_gguf(tmp_path / f"{number}.gguf", case, model))
        driver = Driver(executor_at(checkpoint))
        results.append(driver.step([(driver.add(tokens), 40)])[0])
        monkeypatch.setattr(family_cases, "gguf_tensors", apart)
    assert torch.equal(*results)


def executor_at(checkpoint: Checkpoint) -> TorchExecutor:
    executor = TorchExecutor(
        checkpoint.spec, checkpoint.weights, block_size=16, max_model_len=512, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    executor.allocate_kv_cache(200)
    return executor


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    CASES["qwen 3 moe"].model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"] = torch.zeros(96, 63)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"layers\.1\.mlp\.experts\.7\.up_proj\.weight") as error:
        open_checkpoint(tmp_path)
    assert "layers.2.mlp.experts.3.down_proj.weight is [96, 63] instead of [96, 64]" in str(error.value)


def test_dummy_experts_load(tmp_path: Path) -> None:
    CASES["qwen 2 moe"].model().save_pretrained(tmp_path)
    spec = open_checkpoint(tmp_path).spec
    weights = dummy_weights(spec, QuantType.BF16)
    gate = weights["layers.0.expert_gate.weight"]
    assert dequantize(gate.part(3)).tolist() == dequantize(gate)[3].tolist()
    executor = TorchExecutor(
        spec, weights, block_size=16, max_model_len=64, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    # 4 layers: qkv, output, 2 of each of 10 experts, 2 of the shared one.
    assert executor.describe()["linear layers"].startswith("96 x dense bfloat16")
    assert "8 x router in float32" in executor.describe()["linear layers"]


def test_equal_scores_go_to_the_first_expert() -> None:
    moe = MoeSpec(num_experts=6, top_k=3, intermediate_size=1)
    routing = route(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0], [0.0] * 6]), None, moe)
    assert routing.experts.tolist() == [[1, 2, 4], [0, 1, 2]]
    torch.testing.assert_close(routing.weights[1], torch.full((3,), 1 / 6))
