"""Every family against transformers, against itself under other cuts of the work, and through GGUF."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from family_cases import ARCH, CASES, HEAD_DIM, HEADS, KV_HEADS, SIZES, Case, write_gguf
from safetensors.torch import save_file
from torch_executor_cases import BLOCK_SIZE, Driver, executor_of, prompts, tiny_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

from aphrodite.errors import ModelFormatError
from aphrodite.kernels.cpu import library
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

STEPS = 32
LENGTHS = (5, 61, 150)


class Loaded(NamedTuple):
    case: Case
    model: Any
    executor: TorchExecutor


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def loaded(request: pytest.FixtureRequest) -> Loaded:
    model = request.param.model()
    return Loaded(request.param, model, executor_of(model))


def executor_at(path: Path, max_model_len: int = 512) -> TorchExecutor:
    checkpoint = open_checkpoint(path)
    executor = TorchExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    executor.allocate_kv_cache(200)
    return executor


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def assert_prompts_and_greedy_answer_equal(model: Any, executor: TorchExecutor) -> None:
    """Logits of three prompts in one step, and 32 tokens of which each is the most likely for transformers, too."""
    driver = Driver(executor)
    batch = [driver.add(tokens) for tokens in prompts(model.config.vocab_size, LENGTHS)]
    for request, logits in zip(batch, driver.step([(r, len(r.tokens)) for r in batch]), strict=True):
        expected = reference(model, request.tokens)
        assert expected.std() > 0.5  # a difference could be seen
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    (prompt,) = prompts(model.config.vocab_size, (45,), seed=2)
    request = driver.add(prompt, capacity=len(prompt) + STEPS)
    (logits,) = driver.step([(request, len(prompt))])
    for _ in range(STEPS):
        request.tokens.append(int(logits[-1].argmax()))
        (logits,) = driver.step([(request, 1)])
    expected = reference(model, request.tokens)
    assert request.tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_logits_and_greedy_tokens_equal_transformers(loaded: Loaded) -> None:
    assert_prompts_and_greedy_answer_equal(loaded.model, loaded.executor)


def test_chunks_and_decode_equal_prefill(loaded: Loaded) -> None:
    driver = Driver(loaded.executor)
    (tokens,) = prompts(211, (130,))
    whole, chunked, decoded, neighbour = (driver.add(tokens) for _ in range(4))
    (expected,) = driver.step([(whole, 130)])
    chunks = [driver.step([(chunked, count)])[0] for count in (7, 1, 64)]
    chunks.append(driver.step([(neighbour, 37), (chunked, 58)])[1])
    assert torch.equal(torch.cat(chunks), expected)
    driver.step([(decoded, 115)])
    steps = [driver.step([(decoded, 1), (neighbour, 1)])[0] for _ in range(15)]
    assert torch.equal(torch.cat(steps), expected[115:])


def test_gguf_gives_the_same_logits(loaded: Loaded, tmp_path: Path) -> None:
    if loaded.case.architecture is None:
        pytest.skip("llama.cpp does not know it, or not in this shape")
    other = executor_at(write_gguf(tmp_path / "tiny.gguf", loaded.case, loaded.model))
    (tokens,) = prompts(211, (150,))
    results = []
    for executor in (loaded.executor, other):
        driver = Driver(executor)
        results.append(driver.step([(driver.add(tokens), 150)])[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-5)


def test_half_precision_stays_near_float32(loaded: Loaded) -> None:
    driver = Driver(executor_of(loaded.model, dtype=torch.bfloat16))
    batch = [driver.add(tokens) for tokens in prompts(211, LENGTHS)]
    driver.step([(request, len(request.tokens) - 1) for request in batch])
    for request, logits in zip(batch, driver.step([(request, 1) for request in batch]), strict=True):
        expected = reference(loaded.model, request.tokens)[-1]
        assert (logits[0] - expected).abs().mean() < 0.2 * expected.std()


def test_the_native_executor_equals_transformers(loaded: Loaded, tmp_path: Path) -> None:
    if library.load() is None:
        pytest.skip("the native library is not built")
    loaded.model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert NativeExecutor.declines(checkpoint.spec, checkpoint.weights) is None
    executor = NativeExecutor(
        checkpoint.spec, checkpoint.weights, block_size=BLOCK_SIZE, max_model_len=512, kv_dtype="float32", threads=1
    )
    executor.allocate_kv_cache(200)
    driver = Driver(executor)  # type: ignore[arg-type]
    (tokens,) = prompts(211, (150,))
    (logits,) = driver.step([(driver.add(tokens), 150)])
    torch.testing.assert_close(logits, reference(loaded.model, tokens), rtol=0, atol=1e-4)


def test_internlm2_tensors_become_llamas(tmp_path: Path) -> None:
    """transformers has no code for InternLM 2, whose decoder is Llama's: rename and stack Llama's tensors."""
    model = tiny_model(LlamaForCausalLM, LlamaConfig, **SIZES)
    parts = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    state = model.state_dict()
    tensors = {}
    for name, values in state.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        if "self_attn" not in name:
            tensors[name] = values.clone()
    for layer in range(SIZES["num_hidden_layers"]):
        q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        grouped = (
            q.view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, -1),
            *(x.view(KV_HEADS, 1, HEAD_DIM, -1) for x in (k, v)),
        )
        tensors[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(grouped, dim=1).flatten(0, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    config["bias"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_prompts_and_greedy_answer_equal(model, executor_at(tmp_path))


@pytest.mark.parametrize(("served", "length"), [(128, 120), (512, 300)])
def test_longrope_takes_the_factors_of_the_length_that_is_served(served: int, length: int, tmp_path: Path) -> None:
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    }
    options = {**SIZES, "rope_parameters": rope, "original_max_position_embeddings": 128}
    model = tiny_model(Phi3ForCausalLM, Phi3Config, **options)
    (tokens,) = prompts(211, (length,))
    expected = reference(model, tokens)
    factors = {f"rope_factors_{kind}": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("short", "long")}
    file = write_gguf(tmp_path / "tiny.gguf", Case("Phi3", {}, ARCH.PHI3, longrope_keys, turning=12), model, **factors)
    for executor in (executor_of(model, max_model_len=served), executor_at(file, served)):
        driver = Driver(executor)
        (logits,) = driver.step([(driver.add(tokens), length)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def longrope_keys(writer: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_rope_scaling_attn_factors(math.sqrt(1.0 + math.log(512 / 128) / math.log(128)))


def test_text_part_of_gemma_3_that_sees_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**CASES["gemma 3"].sizes(), "vocab_size": 211, "initializer_range": 0.15}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    check_text_part(Gemma3ForConditionalGeneration(config), tmp_path, caplog)
    described = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"):  # as in published files
        del described["text_config"][key]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelFormatError, match=r"q_proj\.weight is \[192, 96\] instead of \[256, 96\]"):
        open_checkpoint(tmp_path)


def test_text_part_of_mistral_small_that_sees_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = {**SIZES, "model_type": "mistral", "vocab_size": 211, "initializer_range": 0.15}
    vision: dict[str, Any] = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    vision |= {"num_attention_heads": 2, "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    check_text_part(Mistral3ForConditionalGeneration(config), tmp_path, caplog)


def test_text_part_of_mistral_4_that_sees_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same class as around older text models; the text model's type tells."""
    text = {**CASES["mistral 4"].sizes(), "model_type": "mistral4", "vocab_size": 211, "initializer_range": 0.15}
    vision: dict[str, Any] = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    check_text_part(Mistral3ForConditionalGeneration(config), tmp_path, caplog)


def check_text_part(model: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.float().eval().save_pretrained(folder)
    driver = Driver(executor_at(folder))
    assert "will not see images" in caplog.text
    (tokens,) = prompts(200, (61,))
    (logits,) = driver.step([(driver.add(tokens), 61)])
    torch.testing.assert_close(logits, reference(model, tokens), rtol=0, atol=1e-4)
