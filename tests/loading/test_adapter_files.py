"""Adapters of PEFT and llama.cpp: how they are taken to the decoder's weights, and which are refused, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from aphrodite.cli.main import app
from aphrodite.errors import ModelFormatError
from aphrodite.loading.lora import Adapter, is_adapter, open_adapter, read_adapter
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.dequantize import dequantize

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, RANK = 32, 4, 2, 8, 48, 4
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
LAYER = "base_model.model.model.layers.1."


def spec_of(family: str = "llama", **changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "family": family,
        "vocab_size": 50,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_layers": 2,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "norm_eps": 1e-5,
        "max_position": 64,
        "rotary": RotarySpec(dim=HEAD_DIM),
        "windows": (None, None),
    }
    return ModelSpec(**{**sizes, **changes})


def pair(name: str, rows: int, columns: int, rank: int = RANK, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        f"{name}.lora_A.weight": random.standard_normal((rank, columns), np.float32),
        f"{name}.lora_B.weight": random.standard_normal((rows, rank), np.float32),
    }


def saved(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8, **config}))
    return folder


def values(adapter: Adapter, module: str) -> tuple[np.ndarray, np.ndarray]:
    found = adapter.pairs[module]
    return dequantize(found.a), dequantize(found.b)


def test_modules_find_their_weights(tmp_path: Path) -> None:
    tensors = pair(LAYER + "self_attn.q_proj", Q, HIDDEN) | pair(LAYER + "mlp.down_proj", HIDDEN, INNER, seed=1)
    adapter = read_adapter(saved(tmp_path, tensors), spec_of())
    assert adapter.pairs.keys() == {"layers.1.q", "layers.1.down"}
    assert (adapter.rank, adapter.pairs["layers.1.q"].scale) == (RANK, 2.0)
    a, b = values(adapter, "layers.1.down")
    assert np.array_equal(a, tensors[LAYER + "mlp.down_proj.lora_A.weight"])
    assert np.array_equal(b, tensors[LAYER + "mlp.down_proj.lora_B.weight"])
    assert is_adapter(tmp_path)


def test_stacked_modules_share_their_a(tmp_path: Path) -> None:
    tensors = pair(LAYER + "self_attn.qkv_proj", Q + 2 * KV, HIDDEN) | pair(
        LAYER + "mlp.gate_up_proj", 2 * INNER, HIDDEN
    )
    adapter = read_adapter(saved(tmp_path, tensors), spec_of("phi3"))
    b = tensors[LAYER + "self_attn.qkv_proj.lora_B.weight"]
    for part, rows in (("q", slice(0, Q)), ("k", slice(Q, Q + KV)), ("v", slice(Q + KV, None))):
        found_a, found_b = values(adapter, f"layers.1.{part}")
        assert np.array_equal(found_a, tensors[LAYER + "self_attn.qkv_proj.lora_A.weight"])
        assert np.array_equal(found_b, b[rows])
    assert np.array_equal(values(adapter, "layers.1.up")[1], tensors[LAYER + "mlp.gate_up_proj.lora_B.weight"][INNER:])
    copied = adapter.copied()
    assert copied.pairs["layers.1.q"].a is copied.pairs["layers.1.v"].a


def test_rows_follow_those_of_the_weight(tmp_path: Path) -> None:
    """GLM-4 pairs neighbouring dimensions of a head: what the decoder wants as halves."""
    tensors = pair(LAYER + "self_attn.k_proj", KV, HIDDEN)
    adapter = read_adapter(saved(tmp_path, tensors), spec_of("glm4"))
    order = np.concatenate([head * HEAD_DIM + np.r_[0:HEAD_DIM:2, 1:HEAD_DIM:2] for head in range(KV_HEADS)])
    assert np.array_equal(values(adapter, "layers.1.k")[1], tensors[LAYER + "self_attn.k_proj.lora_B.weight"][order])


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 16}}, (4.0, 2.0)),
        ({"alpha_pattern": {"^model.layers.1.self_attn.v_proj": 2, "layers.0.+": 100}}, (2.0, 0.5)),
        ({"alpha_pattern": {r"(q|k)_proj": 12}, "use_rslora": True}, (6.0, 4.0)),
    ],
)
def test_the_scale_is_alpha_by_rank(tmp_path: Path, config: dict[str, Any], scales: tuple[float, float]) -> None:
    tensors = pair(LAYER + "self_attn.q_proj", Q, HIDDEN) | pair(LAYER + "self_attn.v_proj", KV, HIDDEN)
    adapter = read_adapter(saved(tmp_path, tensors, **config), spec_of())
    assert (adapter.pairs["layers.1.q"].scale, adapter.pairs["layers.1.v"].scale) == scales


def test_ranks_are_those_of_the_matrices(tmp_path: Path) -> None:
    tensors = pair(LAYER + "self_attn.q_proj", Q, HIDDEN, rank=16) | pair(LAYER + "self_attn.v_proj", KV, HIDDEN)
    folder = saved(tmp_path, tensors, rank_pattern={"q_proj": 16})
    adapter = read_adapter(folder, spec_of())
    assert (adapter.rank, adapter.pairs["layers.1.q"].scale, adapter.pairs["layers.1.v"].scale) == (16, 0.5, 2.0)
    with pytest.raises(
        ModelFormatError, match="rank is 16 and the largest with room here is 8; start with --max-lora-rank"
    ):
        read_adapter(folder, spec_of(), max_rank=8)


def test_names_of_older_files_and_of_models_that_see_images(tmp_path: Path) -> None:
    older = {
        name.replace(".weight", ".default.weight"): a for name, a in pair(LAYER + "self_attn.q_proj", Q, HIDDEN).items()
    }
    assert read_adapter(saved(tmp_path, older), spec_of()).pairs.keys() == {"layers.1.q"}
    inside = pair("base_model.model.model.language_model.layers.0.self_attn.o_proj", HIDDEN, Q)
    assert read_adapter(saved(tmp_path, inside), spec_of()).pairs.keys() == {"layers.0.o"}


MOE = MoeSpec(num_experts=4, top_k=2, intermediate_size=16)
MLA = MlaSpec(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)


@pytest.mark.parametrize(
    ("tensors", "config", "changes", "words"),
    [
        (pair(LAYER + "self_attn.q_proj", Q + 8, HIDDEN), {}, {}, r"a weight \[40, 32\] and the model has \[32, 32\]"),
        (pair(LAYER + "mlp.fc1", INNER, HIDDEN), {}, {}, r"no module of the model: model\.layers\.1\.mlp\.fc1"),
        (pair("base_model.model.model.layers.7.mlp.up_proj", INNER, HIDDEN), {}, {}, "no module of the model"),
        (pair(LAYER + "mlp.experts.0.up_proj", 16, HIDDEN), {}, {"moe": MOE}, "experts cannot have adapters"),
        (pair("base_model.model.lm_head", 50, HIDDEN), {}, {}, "embedding and output head cannot"),
        (pair(LAYER + "self_attn.kv_b_proj", 64, 16), {}, {"mla": MLA, "family": "deepseek_v2"}, "latent attention"),
        ({LAYER + "input_layernorm.weight": np.ones(HIDDEN, np.float32)}, {}, {}, "no LoRA matrices"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN, rank=0), {}, {}, "A and B of rank 0"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"use_dora": True}, {}, "DoRA"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"lora_bias": True}, {}, "biases of B"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"alora_invocation_tokens": [3]}, {}, "aLoRA"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"peft_type": "IA3"}, {}, "'IA3' are not supported"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"alpha_pattern": {"(": 3}}, {}, "alpha_pattern .* cannot"),
        (pair(LAYER + "self_attn.q_proj", Q, HIDDEN), {"lora_alpha": "big"}, {}, "lora_alpha should be a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_its_reason(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFormatError, match=words):
        read_adapter(saved(tmp_path, tensors, **config), spec_of(**changes))


def test_a_tensor_beside_the_pairs_is_refused(tmp_path: Path) -> None:
    tensors = pair(LAYER + "self_attn.q_proj", Q, HIDDEN)
    saved(tmp_path, {**tensors, LAYER + "self_attn.q_proj.lora_magnitude_vector": np.ones(Q, np.float32)})
    with pytest.raises(ModelFormatError, match="lora_magnitude_vector"):
        read_adapter(tmp_path, spec_of())
    saved(tmp_path, {LAYER + "self_attn.q_proj.lora_A.weight": np.ones((RANK, HIDDEN), np.float32)})
    with pytest.raises(ModelFormatError, match="A without B"):
        read_adapter(tmp_path, spec_of())


def test_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="there is no adapter at"):
        read_adapter(tmp_path / "nowhere", spec_of())
    with pytest.raises(ModelFormatError, match="holds no adapter_model"):
        read_adapter(tmp_path, spec_of())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelFormatError, match="can run any code"):
        read_adapter(tmp_path, spec_of())


def test_an_adapter_of_llama_cpp(tmp_path: Path) -> None:
    """Whose rows of q and k are those of its models: neighbouring dimensions paired."""
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    a, b = (values_.astype(np.float16) for values_ in pair("", Q, HIDDEN).values())
    writer.add_tensor("blk.1.attn_q.weight.lora_a", a)
    writer.add_tensor("blk.1.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert is_adapter(path)
    adapter = read_adapter(path, spec_of())
    order = np.concatenate([head * HEAD_DIM + np.r_[0:HEAD_DIM:2, 1:HEAD_DIM:2] for head in range(HEADS)])
    found_a, found_b = values(adapter, "layers.1.q")
    assert adapter.pairs["layers.1.q"].scale == 2.0
    assert np.array_equal(found_a, a.astype(np.float32))
    assert np.array_equal(found_b, b.astype(np.float32)[order])


def test_a_gguf_model_is_no_adapter(smollm2_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="is a model and no LoRA adapter"):
        open_adapter(smollm2_path)
    assert not is_adapter(smollm2_path)


def test_the_command_line_says_what_an_adapter_is(tmp_path: Path) -> None:
    folder = saved(tmp_path, pair(LAYER + "self_attn.q_proj", Q, HIDDEN), base_model_name_or_path="org/base")
    result = CliRunner().invoke(app, ["models", "inspect", str(folder)])
    assert result.exit_code == 0, result.output
    for text in ("LoRA adapter, PEFT", "org/base", "1: q_proj", "Rank           4", "Scale          2"):
        assert text in result.output
    found = json.loads(CliRunner().invoke(app, ["models", "inspect", str(folder), "--json"]).output)
    assert found["base"] == "org/base"
