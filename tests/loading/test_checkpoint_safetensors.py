"""Safetensors directories made by transformers: specs, names and values against the model that wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aphrodite.errors import ModelFormatError, UnknownArchitectureError
from aphrodite.layers.rotary import inverse_frequencies
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.quantization.dense_types import encode_dense
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn without original": {"factor": 4.0},
    "yarn mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn attention": {"factor": 4.0, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": LLAMA3,
}
MODULES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def save(folder: Path, config: transformers.PreTrainedConfig, **arguments: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **arguments)
    return model


def assert_same_weights(folder: Path, model: transformers.PreTrainedModel) -> None:
    checkpoint = open_checkpoint(folder)
    state = model.state_dict()
    expected = {"embed.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        expected["head.weight"] = state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in MODULES.items():
            for kind in ("weight", "bias"):
                name = f"model.layers.{layer}.{theirs}.{kind}"
                if name in state:
                    expected[f"layers.{layer}.{ours}.{kind}"] = state[name]
    assert set(checkpoint.weights) == set(expected)
    for name, tensor in expected.items():
        raw = checkpoint.weights[name]
        assert raw.data.dtype == np.uint8
        assert np.array_equal(dequantize(raw), tensor.float().numpy()), name
    assert checkpoint.parameters == sum(tensor.numel() for tensor in expected.values())
    assert checkpoint.weight_bytes == sum(raw.nbytes for raw in checkpoint.weights.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_llama_weights_arrive_under_canonical_names(tmp_path: Path, tied: bool, biased: bool) -> None:
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    model = save(tmp_path, config)
    assert_same_weights(tmp_path, model)
    checkpoint = open_checkpoint(tmp_path)
    spec = checkpoint.spec
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.intermediate_size) == ("llama", 97, 32, 48)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (2, 4, 2, 8)
    assert (spec.max_position, spec.norm_eps, spec.activation) == (256, config.rms_norm_eps, "silu")
    assert (spec.tied_head, spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (tied, biased, biased, biased)
    assert spec.windows == (None, None)
    assert (checkpoint.format, checkpoint.name, checkpoint.path, checkpoint.gguf) == (
        "safetensors",
        tmp_path.name,
        tmp_path,
        None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_types_keep_their_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(tmp_path)
    assert_same_weights(tmp_path, model)
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert open_checkpoint(tmp_path).quantization == f"{name} (21 tensors)"


def test_shards_are_put_together(tmp_path: Path) -> None:
    model = save(tmp_path, transformers.LlamaConfig(**SHAPE), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(tmp_path, model)


def test_shards_without_their_index_are_put_together(tmp_path: Path) -> None:
    model = save(tmp_path, transformers.LlamaConfig(**SHAPE), max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_weights(tmp_path, model)
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ModelFormatError, match=r"safetensors files and no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_a_file_alone_uses_the_configuration_beside_it(tmp_path: Path) -> None:
    save(tmp_path, transformers.LlamaConfig(**SHAPE))
    assert open_checkpoint(tmp_path / "model.safetensors").path == tmp_path


@pytest.mark.parametrize("style", ["transformers 5", "transformers 4", "before 4.43"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_scalings_equal_transformers(tmp_path: Path, scaling: str, style: str) -> None:
    kind, values = scaling.split()[0], SCALINGS[scaling]
    described: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}
    if style == "transformers 5":
        described["rope_parameters"] = {"rope_type": kind, "rope_theta": 50_000.0, **values}
    else:
        described["rope_theta"] = 50_000.0
        key = "rope_type" if style == "transformers 4" else "type"
        described["rope_scaling"] = {key: kind, **values} if values else None
    (tmp_path / "config.json").write_text(json.dumps(described))
    spec = open_checkpoint(tmp_path, load_format="dummy").spec
    assert spec.rotary.theta == 50_000.0
    assert spec.rotary.scaling == ("none" if kind == "default" else kind)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    reference = LlamaRotaryEmbedding(config)
    frequencies, attention_factor = inverse_frequencies(spec.rotary, config.max_position_embeddings)
    np.testing.assert_allclose(frequencies, reference.inv_freq.numpy(), rtol=2e-6)
    assert attention_factor == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize(
    ("scaling", "max_position"),
    [
        ("default", 256),
        ("linear", 1024),
        ("dynamic", 512),
        ("yarn", 256),
        ("yarn without original", 1024),
        ("yarn mscale", 2560),
        ("llama3", 256),
    ],
)
def test_scalings_stretch_the_context(tmp_path: Path, scaling: str, max_position: int) -> None:
    rope = {"rope_type": scaling.split()[0], "rope_theta": 1e4, **SCALINGS[scaling]}
    described = {"architectures": ["LlamaForCausalLM"], **SHAPE, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert open_checkpoint(tmp_path, load_format="dummy").spec.max_position == max_position


def test_mistral_has_a_window(tmp_path: Path) -> None:
    model = save(tmp_path, transformers.MistralConfig(**SHAPE, sliding_window=100, head_dim=16))
    assert_same_weights(tmp_path, model)
    spec = open_checkpoint(tmp_path).spec
    assert (spec.family, spec.windows, spec.head_dim) == ("mistral", (100, 100), 16)


@pytest.mark.parametrize(("described", "window"), [({}, 4096), ({"sliding_window": None}, None)])
def test_mistral_without_a_window(tmp_path: Path, described: dict[str, None], window: int | None) -> None:
    values = {"architectures": ["MistralForCausalLM"], **SHAPE, **described}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path, load_format="dummy").spec.windows == (window, window)


def test_qwen2_has_biases_and_windows_in_late_layers(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=50, max_window_layers=1)
    model = save(tmp_path, config)
    assert_same_weights(tmp_path, model)
    spec = open_checkpoint(tmp_path).spec
    assert (spec.windows, spec.qkv_bias, spec.output_bias) == ((None, 50), True, False)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).spec.windows == (None, 50)


@pytest.mark.parametrize(("tied", "biased"), [(False, True), (True, False)])
def test_qwen3_has_norms_of_heads_and_heads_of_their_own_size(tmp_path: Path, tied: bool, biased: bool) -> None:
    config = transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=tied, attention_bias=biased)
    model = save(tmp_path, config)
    assert_same_weights(tmp_path, model)
    spec = open_checkpoint(tmp_path).spec
    assert (spec.family, spec.head_dim, spec.qk_norm, spec.tied_head) == ("qwen3", 16, True, tied)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.windows) == (biased, biased, False, (None, None))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path, load_format="dummy").spec.head_dim == transformers.Qwen3Config().head_dim


def test_qwen3_may_have_windows_in_late_layers(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=50, max_window_layers=1)
    save(tmp_path, config)
    assert open_checkpoint(tmp_path).spec.windows == (None, 50)


def test_generation_defaults_come_from_both_files(tmp_path: Path) -> None:
    save(tmp_path, transformers.LlamaConfig(**SHAPE, eos_token_id=5, pad_token_id=None))
    generation = {"eos_token_id": [7, 5, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 40}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    defaults = open_checkpoint(tmp_path).generation_defaults
    assert defaults.eos_token_ids == (7, 5, 9)
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.6, 0.9, 40, None)


def test_ends_outside_the_vocabulary_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in models whose vocabulary was cut or merged."""
    save(tmp_path, transformers.LlamaConfig(**SHAPE, eos_token_id=[97, 5, -1], pad_token_id=None))
    assert open_checkpoint(tmp_path).generation_defaults.eos_token_ids == (5,)
    assert "end-of-text ids [97] are outside the vocabulary of 97 and ignored" in caplog.text


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_missing_left_over_and_misshapen_tensors_are_reported_together(tmp_path: Path) -> None:
    save(tmp_path, transformers.LlamaConfig(**SHAPE))
    edit_tensors(
        tmp_path,
        model__layers__1__mlp__up_proj__weight=None,
        lm_head__weight=torch.zeros(96, 32),
        lora__extra=torch.zeros(3),
    )
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "lm_head.weight is [96, 32] instead of [97, 32]" in message
    assert "not part of it: lora.extra" in message
    assert "\n" not in message


def test_long_reports_are_cut(tmp_path: Path) -> None:
    save(tmp_path, transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 1000}))
    with pytest.raises(ModelFormatError, match="and 8983 more"):
        open_checkpoint(tmp_path)


def test_a_head_that_differs_from_its_embedding_is_not_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    edit_tensors(tmp_path, lm_head__weight=torch.ones(97, 32))
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.spec.tied_head
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, theirs in (("head.weight", reference.lm_head), ("embed.weight", reference.model.embed_tokens)):
        assert np.array_equal(dequantize(checkpoint.weights[name]), theirs.weight.detach().numpy())
    assert "lm_head.weight differs" in caplog.text


def test_harmless_tensors_are_ignored(tmp_path: Path) -> None:
    model = save(tmp_path, transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    edit_tensors(
        tmp_path,
        lm_head__weight=model.get_input_embeddings().weight.detach().clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
    )
    assert "head.weight" not in open_checkpoint(tmp_path).weights


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"architectures": ["LlamaForCausalML"]}, "did you mean 'LlamaForCausalLM'"),
    "no architecture": ({"architectures": None, "model_type": None}, "architecture is not named"),
    "architectures": ({"architectures": "LlamaForCausalLM"}, "architectures should be a list of texts"),
    "text": ({"hidden_size": "32"}, 'hidden_size should be a whole number from 2 to 1048576, but is "32"'),
    "bool": ({"num_hidden_layers": True}, "but is true"),
    "negative": ({"num_hidden_layers": -1}, "but is -1"),
    "layers": ({"num_hidden_layers": 2**62}, "num_hidden_layers"),
    "missing": ({"vocab_size": None}, "vocab_size is missing"),
    "heads": ({"num_key_value_heads": 3}, "divisor of the 4"),
    "odd head": ({"head_dim": 7}, "head_dim should be even"),
    "activation": ({"hidden_act": "relu6"}, "hidden_act should be one of"),
    "quantized": ({"quantization_config": {"quant_method": "hqq"}}, "quantized with hqq, which is not supported"),
    "scaling": ({"rope_scaling": {"type": "ntk"}}, "rope_scaling.type should be one of"),
    "long factors": (
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0, "x"]}},
        "rope_scaling.long_factor should be a list in which each is a number",
    ),
    "factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor should be"),
    "factors": ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor"),
    "scaling kind": ({"rope_scaling": [1]}, "rope_scaling should be an object, but is a list of 1"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor should be 1"),
    "theta": ({"rope_theta": float("nan")}, "rope_theta"),
    "eos list": ({"eos_token_id": [1, None]}, "eos_token_id"),
}


@pytest.mark.parametrize(("changes", "problem"), REFUSED_CONFIGS.values(), ids=REFUSED_CONFIGS.keys())
def test_wrong_configurations_name_the_key(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    save(tmp_path, transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(tmp_path)
    assert problem in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Which some editors write."""
    model = save(tmp_path, transformers.LlamaConfig(**SHAPE))
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_same_weights(tmp_path, model)


def test_an_embedding_model_without_a_head_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, transformers.MistralConfig(**SHAPE))
    edit_tensors(tmp_path, lm_head__weight=None)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "architectures": ["MistralModel"]}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.spec.family, checkpoint.spec.tied_head) == ("mistral", True)
    assert "it makes embeddings, its texts mean nothing" in caplog.text
    described |= {"architectures": ["MistralModel"], "is_causal": False}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnknownArchitectureError, match="'MistralModel'"):
        open_checkpoint(tmp_path)


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for model in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ModelFormatError, match="convert the model to safetensors"):
            open_checkpoint(model)


def test_ambiguous_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="neither GGUF nor safetensors"):
        open_checkpoint(tmp_path)
    save(tmp_path, transformers.LlamaConfig(**SHAPE))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFormatError, match="--load-format"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, load_format="safetensors").format == "safetensors"


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="there is no file or folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelFormatError, match="aphrodite models pull org/model-7b"):
        open_checkpoint("org/model-7b")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dummy_weights_need_only_a_configuration(tmp_path: Path, dtype: str) -> None:
    transformers.LlamaConfig(
        **{**SHAPE, "vocab_size": 40_000}, architectures=["LlamaForCausalLM"], dtype=dtype
    ).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "config.json", load_format="dummy")
    again = open_checkpoint(tmp_path, load_format="dummy")
    embedding = dequantize(checkpoint.weights["embed.weight"])
    expected_type = {"float32": QuantType.F32, "float16": QuantType.F16, "bfloat16": QuantType.BF16}[dtype]
    assert checkpoint.weights["embed.weight"].qtype is expected_type
    assert embedding.shape == (40_000, 32)
    assert abs(embedding.mean()) < 1e-4
    assert embedding.std() == pytest.approx(0.02, rel=0.01)
    assert len(np.unique(embedding[:, :4], axis=0)) > 32_000
    assert np.array_equal(embedding, dequantize(again.weights["embed.weight"]))
    layer_0, layer_1 = (dequantize(checkpoint.weights[f"layers.{i}.q.weight"]) for i in range(2))
    assert not np.array_equal(layer_0, layer_1)
    assert (dequantize(checkpoint.weights["norm.weight"]) == 1).all()


@pytest.mark.parametrize("qtype", [QuantType.F32, QuantType.F16, QuantType.BF16])
def test_dense_encoding_rounds_like_torch(qtype: QuantType) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    encoded = encode_dense(values.numpy(), qtype)
    dtype = {QuantType.F32: torch.float32, QuantType.F16: torch.float16, QuantType.BF16: torch.bfloat16}[qtype]
    assert encoded.tobytes() == values.to(dtype).view(torch.uint8).numpy().tobytes()


def test_dummy_weights_want_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json: No such file"):
        open_checkpoint(tmp_path, load_format="dummy")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFormatError, match="not valid JSON"):
        open_checkpoint(tmp_path, load_format="dummy")


def test_all_types_that_are_not_supported_are_told(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    changed = {name: tensor.double() if "norm" in name else tensor for name, tensor in tensors.items()}
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"].to(torch.int8)
    save_file(changed, file)
    with pytest.raises(ModelFormatError, match=r"types that are not supported: of them: .*\(F64\).*\(I8\)") as caught:
        open_checkpoint(tmp_path)
    assert "use a checkpoint in F32, F16, BF16" in str(caught.value)
