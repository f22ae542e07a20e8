"""DeepSeek checkpoints as they are published, FP8 in blocks and with layers for further tokens; and damaged ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, LATENTS
from safetensors.torch import load_file, save_file
from torch_executor_cases import BLOCK_SIZE, Driver, prompts

from aphrodite.attention.latent import EXPANDED_BYTES
from aphrodite.errors import ModelFormatError
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.inspect import inspect_checkpoint
from aphrodite.runner.memory import device_workspace
from aphrodite.runner.torch_executor import TorchExecutor

BLOCK = 128
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def model() -> Any:
    return CASES["deepseek v3"].model()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deepseek")
    model.save_pretrained(path)
    return path


def copy_of(folder: Path, path: Path, tensors: dict[str, torch.Tensor], **changed: object) -> Path:
    path.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changed}))
    save_file(tensors, path / "model.safetensors")
    return path


def logits_of(path: Path, tokens: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    executor = TorchExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=BLOCK_SIZE,
        max_model_len=512,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    executor.allocate_kv_cache(20)
    driver = Driver(executor, num_blocks=20)
    (logits,) = driver.step([(driver.add(tokens), len(tokens))])
    return logits


def test_layers_for_further_tokens_are_left_out(
    model: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(folder / "model.safetensors")
    count = model.config.num_hidden_layers
    last, behind = f"model.layers.{count - 1}.", f"model.layers.{count}."
    more = {name.replace(last, behind): values.clone() for name, values in tensors.items() if name.startswith(last)}
    more[behind + "eh_proj.weight"] = torch.zeros(2, 2)
    (tokens,) = prompts(211, (90,))
    with caplog.at_level(logging.INFO):
        logits = logits_of(copy_of(folder, tmp_path, {**tensors, **more}), tokens)
    assert f"further tokens are not used ({len(more)} tensors)" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([tokens])).logits[0], rtol=0, atol=1e-4)


def test_fp8_in_blocks(folder: Path, tmp_path: Path) -> None:
    """As it is published, against a checkpoint of what its codes stand for."""
    codes: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        codes[name] = rounded[name] = values
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            codes[name], scales = in_blocks(values)
            codes[f"{name}_scale_inv"] = scales
            spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            rounded[name] = codes[name].float() * spread[: values.shape[0], : values.shape[1]]
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    (tokens,) = prompts(211, (90,))
    found = logits_of(copy_of(folder, tmp_path / "fp8", codes, quantization_config=method), tokens)
    torch.testing.assert_close(
        found, logits_of(copy_of(folder, tmp_path / "plain", rounded), tokens), rtol=0, atol=1e-5
    )


def in_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes, and the factor of each block of 128 x 128."""
    rows, columns = (-(-size // BLOCK) for size in values.shape)
    scales, codes = torch.empty(rows, columns), torch.empty(values.shape, dtype=FP8)
    for row in range(rows):
        for column in range(columns):
            at = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scales[row, column] = values[at].abs().max() / 448.0
            codes[at] = (values[at] / scales[row, column]).to(FP8)
    return codes, scales


def test_the_cache_is_counted_as_latents(folder: Path) -> None:
    layers = CASES["deepseek v3"].model().config.num_hidden_layers
    width = LATENTS["kv_lora_rank"] + LATENTS["qk_rope_head_dim"]
    assert inspect_checkpoint(open_checkpoint(folder)).kv_bytes_per_token == 2 * layers * width


def test_a_gpu_keeps_room_for_expanded_prompts(folder: Path) -> None:
    spec = open_checkpoint(folder).spec
    sizes = {"total": 0, "max_num_seqs": 1, "max_num_batched_tokens": 512, "itemsize": 2}
    short, long = (device_workspace(spec, max_model_len=length, **sizes) for length in (4096, 1 << 21))
    plain = device_workspace(dataclasses.replace(spec, mla=None), max_model_len=4096, **sizes)
    assert short - plain > EXPANDED_BYTES
    each = LATENTS["kv_lora_rank"] + LATENTS["qk_rope_head_dim"] + LATENTS["qk_nope_head_dim"] + LATENTS["v_head_dim"]
    assert long - short > ((1 << 21) * each * 2) - 2 * EXPANDED_BYTES  # one head of a context that long


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_bias": True}, "attention_bias should be false"),
        ({"rope_interleave": False}, "rope_interleave should be true"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim should be even"),
        ({"n_group": 3}, "n_group should be a divisor of the 8 experts"),
        ({"n_group": 8, "topk_group": 4}, "n_group should be groups of two experts at least"),
        ({"topk_group": 1}, "topk_group should be enough groups for the 3 experts"),
        ({"topk_method": "other"}, "topk_method should be one of noaux_tc"),
        ({"kv_lora_rank": 48}, "wrong shape"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"q_lora_rank": None}, r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path, changed: dict[str, object], message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(copy_of(folder, tmp_path, tensors, **changed))
