"""Models that see images, served without their vision part: as transformers computes texts with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_cases import SIZES
from safetensors.torch import load_file, save_file
from torch_executor_cases import BLOCK_SIZE, Driver, prompts

from aphrodite.errors import ModelFormatError, UnknownArchitectureError
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.torch_executor import TorchExecutor

TEXT: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 2,
    "vocab_size": 211,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 96,
    "num_heads": 2,
    "intermediate_size": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary embedding whose frequencies belong to time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes), **more}}


def qwen(name: str, **text: Any) -> Any:
    config = getattr(transformers, f"{name}Config")
    tower = {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 96} if name == "Qwen2VL" else QWEN_TOWER
    if name.startswith("Qwen3"):
        tower = {**tower, "deepstack_visual_indexes": []}
    return config(text_config={**TEXT, **text}, vision_config=tower, tie_word_embeddings=False)


def glm(name: str, **text: Any) -> Any:
    rope = sections(2, 1, 1, partial_rotary_factor=0.5)
    return getattr(transformers, f"{name}Config")(text_config={**TEXT, **rope, **text}, vision_config=QWEN_TOWER)


def around(name: str, text: str, **options: Any) -> Any:
    inner = getattr(transformers, f"{text}Config")(**TEXT)
    return getattr(transformers, f"{name}Config")(text_config=inner, **options)


CASES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "qwen 2.5 vl": ("Qwen2_5_VL", lambda: qwen("Qwen2_5_VL", **sections(2, 3, 3, type="mrope")), "qwen2"),
    "qwen 3 vl": ("Qwen3VL", lambda: qwen("Qwen3VL", **sections(4, 2, 2, mrope_interleaved=True)), "qwen3"),
    "qwen 3 vl moe": ("Qwen3VLMoe", lambda: qwen("Qwen3VLMoe", **EXPERTS, **sections(4, 2, 2)), "qwen3_moe"),
    "glm 4.1 v": ("Glm4v", lambda: glm("Glm4v"), "glm4"),
    "llava": (
        "Llava",
        lambda: around("Llava", "Mistral", vision_config=transformers.CLIPVisionConfig(**TOWER)),
        "mistral",
    ),
    "internvl": ("InternVL", lambda: around("InternVL", "Qwen2", vision_config=TOWER), "qwen2"),
    "smolvlm": ("SmolVLM", lambda: around("SmolVLM", "Llama", vision_config=TOWER), "llama"),
}


def saved(name: str, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    model.save_pretrained(folder)
    return model


def logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    executor = TorchExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=BLOCK_SIZE,
        max_model_len=128,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    executor.allocate_kv_cache(200)
    driver = Driver(executor)
    (found,) = driver.step([(driver.add(tokens), len(tokens))])
    return found


@pytest.mark.parametrize(("name", "config", "family"), CASES.values(), ids=CASES.keys())
def test_logits_of_texts_equal_transformers(
    name: str, config: Callable[[], Any], family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(name, config(), tmp_path)
    (tokens,) = prompts(200, (61,))
    found = logits(tmp_path, tokens)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].float()
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert open_checkpoint(tmp_path).spec.family == family
    assert "will not see images" in caplog.text


def test_fused_experts_may_lie_either_way(tmp_path: Path) -> None:
    """Qwen's own files have them `[experts, in, out]`."""
    name, config, _ = CASES["qwen 3 vl moe"]
    saved(name, config(), tmp_path)
    (tokens,) = prompts(200, (20,))
    expected = logits(tmp_path, tokens)
    tensors = load_file(tmp_path / "model.safetensors")
    fused = {key: tensor.transpose(1, 2).contiguous() for key, tensor in tensors.items() if ".mlp.experts." in key}
    assert len(fused) == 4
    save_file({**tensors, **fused}, tmp_path / "model.safetensors")
    assert torch.equal(logits(tmp_path, tokens), expected)


def test_a_text_model_described_beside_the_rest(tmp_path: Path) -> None:
    """As in Qwen 2.5 VL's published files, which have no text_config."""
    name, config, _ = CASES["qwen 2.5 vl"]
    saved(name, config(), tmp_path)
    (tokens,) = prompts(200, (20,))
    expected = logits(tmp_path, tokens)
    described = json.loads((tmp_path / "config.json").read_text())
    text = described.pop("text_config")
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    text.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps({**text, **described, **rope}))
    assert torch.equal(logits(tmp_path, tokens), expected)


def test_a_text_model_that_is_not_known_is_named(tmp_path: Path) -> None:
    name, config, _ = CASES["llava"]
    saved(name, config(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["text_config"]["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnknownArchitectureError, match="'LlavaForConditionalGeneration with mamba'"):
        open_checkpoint(tmp_path)
    del described["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelFormatError, match="text_config should be an object"):
        open_checkpoint(tmp_path)
