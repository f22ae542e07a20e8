"""GGUF checkpoints: the real one, and small ones whose weights transformers also knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from aphrodite.errors import ModelFormatError
from aphrodite.layers.rotary import inverse_frequencies
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.inspect import inspect
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 16, 64
GGUF_MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
CANONICAL = {
    "attn_norm": "attn_norm", "ffn_norm": "mlp_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v",
    "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
    "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
    "token_embd": "embed", "output_norm": "norm", "output": "head",
}  # fmt: skip
Edit = Callable[[gguf.GGUFWriter], None]


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """What the GGUF converter does to rows of q and k of llama models."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def gguf_tensors(model: transformers.PreTrainedModel, *, permute: bool) -> dict[str, np.ndarray]:
    """A model's weights under GGUF's names and in GGUF's row order."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        path, kind = name.removeprefix("model.").rsplit(".", 1)
        if path.startswith("layers."):
            _, layer, module = path.split(".", 2)
            target = f"blk.{layer}.{GGUF_MODULES[module]}"
            if permute and target.endswith(("attn_q", "attn_k")):
                values = permuted(values, HEADS if target.endswith("attn_q") else KV_HEADS)
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[path]
        if target != "output" or not model.config.tie_word_embeddings:
            tensors[f"{target}.{kind}"] = values
    return tensors


def tiny(kind: str = "llama", **arguments: Any) -> transformers.PreTrainedModel:
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[kind]
    config = config_class(
        vocab_size=VOCAB, hidden_size=HEADS * HEAD_DIM, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128, **arguments,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    edit: Edit = lambda writer: None,
    *,
    architecture: str = "llama",
    quantize: bool = False,
    layers: int = 2,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(HEADS * HEAD_DIM)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM)
    edit(writer)
    for name, values in tensors.items():
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q5_1
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_weights(path: Path, model: transformers.PreTrainedModel) -> None:
    weights = open_checkpoint(path).weights
    expected = gguf_tensors(model, permute=False)
    assert len(weights) == len(expected)
    for name, values in expected.items():
        *layer, module, kind = name.split(".")
        canonical = ".".join([*(["layers", layer[1]] if layer else []), CANONICAL[module], kind])
        assert np.array_equal(dequantize(weights[canonical]), values), canonical


def test_the_real_model(real_model: Path) -> None:
    for path in (real_model, real_model.parent):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.name, checkpoint.path, checkpoint.format) == ("SmolLM2-135M-Instruct", real_model, "gguf")
    spec = checkpoint.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.rotary.theta, spec.max_position, spec.tied_head) == (100_000.0, 8192, True)
    assert checkpoint.quantization == "Q4_1 (210 tensors), Q8_0 (1), F32 (61)"
    assert checkpoint.parameters == 134_515_008
    assert 0 < real_model.stat().st_size - checkpoint.weight_bytes < 2_500_000
    assert checkpoint.generation_defaults.eos_token_ids == (2,)
    assert checkpoint.gguf is not None
    assert checkpoint.weights["layers.29.q.weight"].shape == (576, 576)
    with pytest.raises(KeyError):
        checkpoint.weights["head.weight"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_llama_rows_come_back_in_halves(tmp_path: Path, tied: bool, biased: bool) -> None:
    model = tiny(tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    path = write(tmp_path / "tiny.gguf", gguf_tensors(model, permute=True))
    assert_same_weights(path, model)
    spec = open_checkpoint(path).spec
    assert (spec.tied_head, spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (tied, biased, biased, biased)


def test_qwen2_rows_are_in_halves_already(tmp_path: Path) -> None:
    model = tiny("qwen2")
    path = write(tmp_path / "tiny.gguf", gguf_tensors(model, permute=False), architecture="qwen2")
    assert_same_weights(path, model)
    spec = open_checkpoint(path).spec
    assert (spec.family, spec.qkv_bias, spec.output_bias) == ("qwen2", True, False)


@pytest.mark.parametrize(("kind", "architecture"), [("qwen2", "qwen2vl"), ("qwen3", "qwen3vl")])
def test_text_parts_of_qwens_that_see_images(tmp_path: Path, kind: str, architecture: str) -> None:
    model = tiny(kind, head_dim=HEAD_DIM) if kind == "qwen3" else tiny(kind)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_sections([2, 3, 3, 0])

    path = write(tmp_path / "t.gguf", gguf_tensors(model, permute=False), edit, architecture=architecture)
    assert_same_weights(path, model)
    assert open_checkpoint(path).architecture == architecture


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_has_norms_of_heads_and_heads_of_their_own_size(tmp_path: Path, tied: bool) -> None:
    model = tiny("qwen3", head_dim=32, tie_word_embeddings=tied)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_rope_dimension_count(32)
        writer.add_rope_freq_base(1e6)

    path = write(tmp_path / "tiny.gguf", gguf_tensors(model, permute=False), edit, architecture="qwen3")
    assert_same_weights(path, model)
    spec = open_checkpoint(path).spec
    assert (spec.family, spec.qk_norm, spec.qkv_bias, spec.tied_head) == ("qwen3", True, False, tied)
    assert (spec.head_dim, spec.hidden_size, spec.rotary.dim, spec.rotary.theta) == (32, 64, 32, 1e6)


def test_quantized_rows_equal_those_that_transformers_reads(tmp_path: Path) -> None:
    """transformers has its own dequantization and its own reordering."""
    path = write(tmp_path / "tiny.gguf", gguf_tensors(tiny(), permute=True), quantize=True)
    model = tiny()
    model.load_state_dict(load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"])
    theirs = gguf_tensors(model, permute=False)
    weights = open_checkpoint(path).weights
    for ours, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("down", "ffn_down")):
        raw = weights[f"layers.1.{ours}.weight"]
        assert raw.qtype is QuantType.Q5_1
        assert np.array_equal(dequantize(raw), theirs[f"blk.1.{name}.weight"])


def test_split_models_are_put_together(tmp_path: Path) -> None:
    model = tiny()
    tensors = list(gguf_tensors(model, permute=True).items())
    for number, part in enumerate((tensors[:5], tensors[5:9], tensors[9:])):

        def edit(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 3)

        write(tmp_path / f"tiny-Q4_0-0000{number + 1}-of-00003.gguf", dict(part), edit)
    assert_same_weights(tmp_path, model)
    assert open_checkpoint(tmp_path).name == "tiny"
    with pytest.raises(ModelFormatError, match="name the first"):
        open_checkpoint(tmp_path / "tiny-Q4_0-00002-of-00003.gguf")
    for number in (2, 3):
        (tmp_path / f"tiny-Q4_0-0000{number}-of-00003.gguf").unlink()
    with pytest.raises(ModelFormatError, match=r"missing: tiny-Q4_0-00002-of-00003.gguf, tiny-Q4_0-00003-of-00003"):
        open_checkpoint(tmp_path)


def test_llama3_frequencies_are_read_from_their_tensor(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    path = write(tmp_path / "t.gguf", {**gguf_tensors(tiny(), permute=True), "rope_freqs.weight": divisors})
    spec = open_checkpoint(path).spec
    assert spec.rotary.scaling == "none"
    assert np.array_equal(np.array(spec.rotary.freq_divisors, np.float32), divisors)
    wrong = {**gguf_tensors(tiny(), permute=True), "rope_freqs.weight": divisors[1:]}
    with pytest.raises(ModelFormatError, match=r"rope_freqs\.weight should be F32 of 8"):
        open_checkpoint(write(tmp_path / "w.gguf", wrong))


PAPER = 0.1 * math.log(4.0) + 1.0  # arXiv 2309.00071, for the factor below


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def test_yarn_equals_the_same_scaling_in_config_json(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", gguf_tensors(tiny(), permute=True), yarn)
    spec = open_checkpoint(path).spec
    assert (spec.rotary.scaling, spec.max_position) == ("yarn", 256)
    rope = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    reference = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(tiny(rope_parameters=rope).config)
    frequencies, attention_factor = inverse_frequencies(spec.rotary, 256)
    np.testing.assert_allclose(frequencies, reference.inv_freq.numpy(), rtol=2e-6)
    assert attention_factor == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize(
    ("key", "factor", "meaning"),
    [("yarn_attn_factor", 1.3, 1.3), ("yarn_attn_factor", 1.0, PAPER), ("attn_factor", 1.3, 1.3 * PAPER)],
)
def test_factors_of_yarn(tmp_path: Path, key: str, factor: float, meaning: float) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        yarn(writer)
        writer.add_float32(f"llama.rope.scaling.{key}", factor)

    spec = open_checkpoint(write(tmp_path / "t.gguf", gguf_tensors(tiny(), permute=True), edit)).spec
    assert inverse_frequencies(spec.rotary, 256)[1] == pytest.approx(meaning)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_sliding_window(33)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(5)
    writer.add_eom_token_id(5)
    writer.add_bos_token_id(3)
    writer.add_float32("general.sampling.temp", 0.5)


def test_linear_scaling_window_and_ids(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "t-Q8_0.gguf", gguf_tensors(tiny(), permute=True), linear))
    assert (checkpoint.spec.rotary.scaling, checkpoint.spec.rotary.factor) == ("linear", 2.0)
    assert (checkpoint.spec.windows, checkpoint.spec.max_position) == ((33, 33), 128)
    defaults = checkpoint.generation_defaults
    assert (defaults.eos_token_ids, defaults.temperature) == ((1, 5), 0.5)
    assert checkpoint.name == "t"


def test_the_old_linear_key(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.gguf",
        gguf_tensors(tiny(), permute=True),
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
    )
    assert (open_checkpoint(path).spec.rotary.scaling, open_checkpoint(path).spec.rotary.factor) == ("linear", 4.0)


REFUSED: dict[str, tuple[Edit, str]] = {
    "experts": (lambda writer: writer.add_expert_count(8), "ffn_down_exps.weight should be present"),
    "scaling": (
        lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"),
        "one of linear, none, yarn",
    ),
    "values": (lambda writer: writer.add_value_length(8), "llama.attention.value_length should be 16"),
    "key type": (lambda writer: writer.add_string("llama.attention.key_length", "16"), 'but is "16"'),
    "key list": (lambda writer: writer.add_array("llama.attention.key_length", [1, 2]), "but is a list of 2"),
}


@pytest.mark.parametrize(("edit", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_metadata_names_the_key(tmp_path: Path, edit: Edit, problem: str) -> None:
    path = write(tmp_path / "t.gguf", gguf_tensors(tiny(), permute=True), edit)
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(path)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_may_be_listed_by_layer(tmp_path: Path) -> None:
    model = tiny()

    def listed(heads: list[int]) -> Edit:
        def edit(writer: gguf.GGUFWriter) -> None:
            for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
                del writer.kv_data[0][f"llama.{key}"]
            writer.add_head_count([HEADS] * 2)
            writer.add_head_count_kv(heads)
            writer.add_feed_forward_length([96, 96])

        return edit

    tensors = gguf_tensors(model, permute=True)
    assert_same_weights(write(tmp_path / "t.gguf", tensors, listed([KV_HEADS] * 2)), model)
    with pytest.raises(ModelFormatError, match=r"head_count_kv should be the same in all layers, but is a list of 2"):
        open_checkpoint(write(tmp_path / "p.gguf", tensors, listed([KV_HEADS, 1])))


def test_frequencies_that_old_converters_stored_are_harmless(tmp_path: Path) -> None:
    model = tiny()
    older = {f"blk.{layer}.attn_rot_embd.inv_freq": np.ones(HEAD_DIM // 2, np.float32) for layer in range(2)}
    assert_same_weights(write(tmp_path / "t.gguf", {**gguf_tensors(model, permute=True), **older}), model)


def test_unknown_architectures_list_what_is_supported(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", {}, architecture="lama")
    with pytest.raises(ModelFormatError, match=r"is 'lama', which is not supported in .*: .*llama, .*qwen2, .*qwen3"):
        open_checkpoint(path)
    with pytest.raises(ModelFormatError, match="only the part of a model that sees images"):
        open_checkpoint(write(tmp_path / "mmproj.gguf", {}, architecture="clip"))


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"token_embd\.weight"):
        open_checkpoint(write(tmp_path / "t.gguf", {}))


def test_missing_layers_and_quantized_norms_are_reported(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny(), permute=True)
    path = write(tmp_path / "t.gguf", tensors, layers=3)
    with pytest.raises(ModelFormatError, match=r"missing: blk\.2\.attn_norm\.weight.* and 1 more"):
        open_checkpoint(path)
    tensors["extra"] = np.ones(3, np.float32)
    with pytest.raises(ModelFormatError, match="not part of it: extra"):
        open_checkpoint(write(tmp_path / "u.gguf", tensors))


def test_folders_with_several_files_name_them(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"holds no \.gguf"):
        open_checkpoint(tmp_path, load_format="gguf")
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, {})
    with pytest.raises(ModelFormatError, match=r"name the one to load \(a\.gguf, b\.gguf\)"):
        open_checkpoint(tmp_path)


def test_a_projector_beside_a_model_is_passed_over(tmp_path: Path) -> None:
    model = tiny()
    write(tmp_path / "m-Q8_0.gguf", gguf_tensors(model, permute=True))
    (tmp_path / "mmproj-m-f16.gguf").write_bytes(b"GGUF")
    assert_same_weights(tmp_path, model)


def test_inspection_of_the_real_model(real_model: Path) -> None:
    found = inspect(real_model)
    assert (found.family, found.architecture, found.tokenizer, found.chat_template) == (
        "llama",
        "llama",
        "gpt2 (smollm)",
        True,
    )
    assert found.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2
    assert [need.context for need in found.memory] == [4096, 8192]
    assert found.memory[1].bytes == found.weight_bytes + 8192 * found.kv_bytes_per_token
    assert found.parameters_by_type["Q8_0"] == 49152 * 576
    assert sum(found.parameters_by_type.values()) == found.parameters


def test_inspection_of_a_folder(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert (found.tokenizer, found.chat_template, found.architecture) == (None, False, "LlamaForCausalLM")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = inspect(tmp_path)
    assert (found.tokenizer, found.chat_template) == ("BPE", True)
    assert [need.context for need in found.memory] == [128]
