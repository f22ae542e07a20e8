"""Quantized safetensors checkpoints: every number of every module, and the model, against the formats' definitions."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_modules as modules
import torch
import transformers
from safetensors.torch import load_file, save_file

from aphrodite.errors import ModelFormatError
from aphrodite.kernels.dispatch import log_once
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.inspect import inspect_checkpoint
from aphrodite.quantization.dense_types import numbers_of, to_float32
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import PackedTensor, PackQuantizedMatrix, e4m3_values, e5m2_values, unpack_stream
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
CANONICAL = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
Pack = Callable[[np.random.Generator, int, int], modules.Module]


def grouped(function: Callable[..., modules.Module], group: int | None, **arguments: Any) -> Pack:
    return lambda rng, out, columns: function(rng, out, columns, group or columns, **arguments)


def awq_config(group: int = 32, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **changes}


def gptq_config(bits: int, group: int = 32, version: int = 1, **changes: Any) -> dict[str, Any]:
    form = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, **form, **changes}


def compressed(form: str, kind: str = "int", bits: int = 4, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}, "ignore": []}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BITSANDBYTES = {"quant_method": "bitsandbytes", "_load_in_4bit": True}
WORDS = compressed("pack-quantized")
WORD_CODES = modules.pack_quantized
E4M3 = torch.float8_e4m3fn
CASES: dict[str, tuple[Pack, dict[str, Any], str]] = {
    "awq": (grouped(modules.awq, 32), awq_config(), "AWQ 4-bit"),
    "awq, one group": (grouped(modules.awq, None), awq_config(-1), "AWQ 4-bit"),
    **{
        f"gptq {bits} v{version} {'act-order' if act_order else ''}": (
            grouped(modules.gptq, 32, bits=bits, version=version, act_order=act_order),
            gptq_config(bits, version=version, desc_act=act_order),
            f"GPTQ {bits}-bit",
        )
        for bits, version, act_order in [
            (2, 1, False), (3, 1, True), (3, 2, False), (4, 1, False), (4, 1, True), (4, 2, False), (8, 2, True)
        ]
    },
    "gptq, one group": (
        grouped(modules.gptq, None, bits=4, version=1, act_order=False), gptq_config(4, -1), "GPTQ 4-bit"
    ),
    "fp8 tensor": (partial(modules.float8, kind="tensor", dtype=E4M3), FP8, "FP8 E4M3"),
    "fp8 channel": (partial(modules.float8, kind="channel", dtype=torch.float8_e5m2), FP8, "FP8 E5M2"),
    "fp8 block": (
        partial(modules.float8, kind="block", dtype=E4M3), {**FP8, "weight_block_size": [24, 40]}, "FP8 E4M3"
    ),
    "w4a16": (
        grouped(WORD_CODES, 32, bits=4, symmetric=True), compressed("pack-quantized", group_size=32), "W4A16"
    ),
    "w4a16 asymmetric": (
        grouped(WORD_CODES, 32, bits=4, symmetric=False), WORDS, "W4A16"
    ),
    "w4a16 channel": (grouped(WORD_CODES, None, bits=4, symmetric=True), WORDS, "W4A16"),
    "w4a16 act-order": (
        grouped(WORD_CODES, 32, bits=4, symmetric=False, act_order=True), WORDS, "W4A16"
    ),
    "w8a16": (
        grouped(WORD_CODES, 32, bits=8, symmetric=False), compressed("pack-quantized", bits=8), "W8A16"
    ),
    "w4a16 tensor": (partial(modules.pack_quantized_tensor, bits=4), WORDS, "W4A16"),
    "w8a16 tensor": (
        partial(modules.pack_quantized_tensor, bits=8, words=True), compressed("pack-quantized", bits=8), "W8A16"
    ),
    "w2a16": (grouped(WORD_CODES, 32, bits=2, symmetric=False), compressed("pack-quantized", bits=2), "W2A16"),
    "w8a8": (partial(modules.int8, per_channel=True), compressed("int-quantized", bits=8), "W8A8 int8"),
    "w8a8 tensor": (partial(modules.int8, per_channel=False), compressed("int-quantized", bits=8), "W8A8 int8"),
    "w8a8 asymmetric": (
        partial(modules.int8, per_channel=True, symmetric=False), compressed("int-quantized", bits=8), "W8A8 int8"
    ),
    "compressed fp8": (
        partial(modules.float8, kind="channel", dtype=E4M3), compressed("float-quantized", "float", 8), "FP8 E4M3"
    ),
    "nf4": (partial(modules.bitsandbytes_4_bit, kind="nf4", nested=False), BITSANDBYTES, "bitsandbytes NF4"),
    "nf4 nested": (partial(modules.bitsandbytes_4_bit, kind="nf4", nested=True), BITSANDBYTES, "bitsandbytes NF4"),
    "fp4 nested": (partial(modules.bitsandbytes_4_bit, kind="fp4", nested=True), BITSANDBYTES, "bitsandbytes FP4"),
    "bitsandbytes int8": (
        modules.bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"
    ),
}  # fmt: skip


# What the native library keeps as it is.
IN_GROUPS = (
    *("awq", "awq, one group", "gptq 4 v1 ", "gptq 4 v2 ", "gptq, one group"),
    *("gptq 3 v1 act-order", "gptq 4 v1 act-order", "gptq 8 v2 act-order", "w4a16 act-order"),
    *("w4a16", "w4a16 asymmetric", "w4a16 channel", "w4a16 tensor", "w8a16", "w8a8", "w8a8 asymmetric"),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense float32 checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def write(original: Path, folder: Path, pack: Pack, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A copy of the checkpoint whose matrices, the head too, are packed anew; what they mean, by module."""
    tensors, meaning = load_file(original / "model.safetensors"), {}
    rng = np.random.default_rng(7)
    for name in [name for name in tensors if name.endswith(("_proj.weight", "lm_head.weight"))]:
        out, columns = tensors.pop(name).shape
        module = name.removesuffix(".weight")
        packed, meaning[module] = pack(rng, out, columns)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return meaning


def canonical(module: str) -> str:
    return "head.weight" if module == "lm_head" else f"layers.0.{CANONICAL[module.split('.', 3)[3]]}.weight"


def logits(checkpoint: Checkpoint, *, native: bool = False) -> torch.Tensor:
    if native:
        assert NativeExecutor.declines(checkpoint.spec, checkpoint.weights) is None
        executor: Any = NativeExecutor(checkpoint.spec, checkpoint.weights, block_size=16, max_model_len=64)
    else:
        executor = TorchExecutor(
            checkpoint.spec, checkpoint.weights, block_size=16, max_model_len=64, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
    return run(executor)


def run(executor: Any) -> torch.Tensor:
    executor.allocate_kv_cache(2)

    def ints(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    inputs = ForwardInputs(
        ints([3, 1, 4]), ints([0, 1, 2]), ints([0, 1, 2], torch.int64), ints([0, 3]), ints([3]), ints([[0]]), ints([2])
    )
    found: torch.Tensor = executor.forward(inputs)
    return found.clone()


@pytest.mark.parametrize(("pack", "config", "method"), CASES.values(), ids=CASES.keys())
def test_values_are_those_of_the_definition(
    original: Path, tmp_path: Path, pack: Pack, config: dict[str, Any], method: str
) -> None:
    meaning = write(original, tmp_path / "m", pack, config)
    checkpoint = open_checkpoint(tmp_path / "m")
    for module, expected in meaning.items():
        raw = checkpoint.weights[canonical(module)]
        found = dequantize(raw)
        assert found.dtype == np.float32
        if method == "bitsandbytes int8":  # a quotient is rounded before the product is
            np.testing.assert_allclose(found, expected, rtol=2.0**-22, atol=0)
        else:
            assert np.array_equal(found, expected.astype(np.float32)), module
        shuffled = np.random.default_rng(1).permutation(raw.shape[0])[: raw.shape[0] // 2]
        assert np.array_equal(dequantize(raw.take_rows(shuffled)), found[shuffled])
        assert np.array_equal(dequantize(raw.take_rows(slice(5, 13))), found[5:13])
        stored = to_float32(numbers_of(raw), raw.qtype)
        assert np.abs(stored - found).max() <= np.abs(found).max() * 2.0**-8
    facts = inspect_checkpoint(checkpoint)
    assert f"{method} (8" in facts.quantization
    assert facts.parameters_by_type[method] == sum(matrix.size for matrix in meaning.values())
    on_disk = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert 0 <= on_disk - facts.weight_bytes < 12_000  # the header, and what describes the packing
    assert facts.expanded_bytes == 2 * facts.parameters


@pytest.mark.parametrize(("case"), CASES)
def test_canonical_layouts_hold_the_same_values_in_the_same_memory(original: Path, tmp_path: Path, case: str) -> None:
    pack, config, _ = CASES[case]
    meaning = write(original, tmp_path / "m", pack, config)
    weights = open_checkpoint(tmp_path / "m").weights
    kept = 0
    for module, expected in meaning.items():
        raw = weights[canonical(module)]
        if decline_layout(raw) is not None:
            continue
        kept += 1
        layout = layout_of(raw, torch.device("cpu"))
        # Scales of bitsandbytes' that were quantized once more are float16; its int8 has a quotient of its own.
        tolerance = 2.0**-11 if "nested" in case else 2.0**-22
        np.testing.assert_allclose(layout.dequantize().numpy(), expected, rtol=tolerance, atol=0)
        # What a row has, of only 64 columns, and zeros of few bits that take bytes, of 2 or 3 groups.
        assert layout.nbytes <= 1.06 * raw.nbytes + 8 * raw.shape[0]
        some = np.random.default_rng(1).permutation(raw.shape[0])[:9]
        assert torch.equal(layout_of(raw.take_rows(some), torch.device("cpu")).dequantize(), layout.dequantize()[some])
    # Blocks of 40 divide neither 64 nor 96 columns; of 64 values they divide the rows of some projections only.
    assert (kept == 0) == (case == "fp8 block")


@pytest.mark.parametrize("rows", [1, 5])
def test_zeros_of_rows_that_fill_no_more_than_a_word(rows: int) -> None:
    tensors, expected = modules.pack_quantized(np.random.default_rng(2), rows, 96, 32, bits=4, symmetric=False)
    numbers = {name: tensor.view(torch.int16 if "scale" in name else tensor.dtype) for name, tensor in tensors.items()}
    words = {name: tensor.numpy() for name, tensor in numbers.items()}
    scales = RawTensor("scales", (rows, 3), QuantType.BF16, words["weight_scale"].view(np.uint8))
    codes, zeros = words["weight_packed"].view(np.uint32), words["weight_zero_point"].view(np.uint32)
    raw = PackedTensor("gate", QuantType.BF16, PackQuantizedMatrix(4, 96, codes, scales, zeros, None))
    np.testing.assert_allclose(layout_of(raw, torch.device("cpu")).dequantize().numpy(), expected, rtol=2.0**-22)


@pytest.mark.parametrize("case", ["awq", "gptq 3 v1 act-order", "fp8 block", "w4a16 asymmetric", "nf4 nested"])
def test_a_quantized_model_is_the_dense_one_with_its_values(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    pack, config, method = CASES[case]
    meaning = write(original, tmp_path / "m", pack, config)
    dense = load_file(original / "model.safetensors")
    dense |= {f"{module}.weight": torch.from_numpy(matrix).float().contiguous() for module, matrix in meaning.items()}
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_bytes((original / "config.json").read_bytes())
    log_once.cache_clear()
    checkpoint = open_checkpoint(tmp_path / "m")
    with caplog.at_level(logging.INFO, "aphrodite.kernels"):
        found = logits(checkpoint)
    assert torch.equal(found, logits(open_checkpoint(tmp_path / "dense")))
    assert f"{method} weights: expanded to float32 in" in caplog.text
    with caplog.at_level(logging.WARNING, "aphrodite.kernels"):
        native = logits(checkpoint, native=True)
    expanded = f"{method} weights: expanded to {checkpoint.weights['head.weight'].qtype.name} in" in caplog.text
    assert expanded != (case in IN_GROUPS)
    assert torch.linalg.norm(native - found) < 0.02 * torch.linalg.norm(found)  # its matrices are rounded to 16 bits


@pytest.mark.parametrize("case", IN_GROUPS)
def test_groups_of_integers_stay_what_they_are_in_the_native_library(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    pack, config, method = CASES[case]
    write(original, tmp_path, pack, config)
    checkpoint = open_checkpoint(tmp_path)
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "aphrodite.kernels"):
        executor = NativeExecutor(
            checkpoint.spec,
            checkpoint.weights,
            block_size=16,
            max_model_len=64,
            activations="float32",
            kv_dtype="float32",
        )
    assert not caplog.text
    packed = [raw for raw in checkpoint.weights.values() if isinstance(raw, PackedTensor)]
    dense = checkpoint.weights["embed.weight"].nbytes
    # Scales of a row, of only 64 columns, weigh more than in a model.
    assert executor.weight_bytes <= dense + sum(1.06 * raw.nbytes + 8 * raw.shape[0] + 64 for raw in packed)
    assert method in executor.describe()["weights"]
    torch.testing.assert_close(run(executor), logits(checkpoint), rtol=1e-4, atol=1e-4)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown method": ("awq", {"quant_method": "quip"}, "quantized with quip, which is not supported"),
    "awq bits": ("awq", awq_config(bits=3), "bits should be 4, but is 3"),
    "awq layout": ("awq", awq_config(version="gemv"), "version should be gemm"),
    "awq groups": ("awq", awq_config(48), "groups of 48 do not divide the 64 inputs"),
    "awq scales": ("awq", awq_config(16), "'lm_head.qzeros' should be of shape [4, 12]"),
    "gptq bits": ("gptq 4 v1 ", gptq_config(5), "bits should be 2, 3, 4 or 8, but is 5"),
    "gptq other bits": ("gptq 4 v1 ", gptq_config(8), "qzeros' should be of shape"),
    "gptq marlin": ("gptq 4 v1 ", gptq_config(4, is_marlin_format=True), "is_marlin_format"),
    "gptq zeros": ("awq", gptq_config(4, dynamic={"x": {"bits": 8}}), "packed in 2, 3, 4 or 8 bits with zeros of"),
    "auto-round layout": ("awq", gptq_config(4, quant_method="auto-round", packing_format="itrex"), "packing_format"),
    "auto-round type": ("awq", gptq_config(4, quant_method="auto-round", data_type="mx_fp"), "data_type should be int"),
    "modelopt": ("fp8 tensor", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo should be FP8"),
    "mlx": ("awq", {"group_size": 64, "bits": 4}, "quantized with MLX, which is not supported"),
    "rotated": (
        "w4a16",
        {**WORDS, "transform_config": {"config_groups": {"u": {}}}},
        "weights and activations rotated",
    ),
    "gptq format": ("gptq 4 v1 ", gptq_config(4, checkpoint_format="marlin"), "checkpoint_format should be one of"),
    "fp8 blocks": ("fp8 block", {**FP8, "weight_block_size": [16, 16]}, "a scale for the tensor"),
    "format": ("w4a16", compressed("nvfp4-pack-quantized"), "format should be one of"),
    "kind": ("w4a16", compressed("pack-quantized", "float", 4), "num_bits should be"),
    "words": ("w4a16", compressed("pack-quantized", bits=8), "codes a row"),
    "no groups": ("w4a16", {**WORDS, "config_groups": {}}, "names no quantized weights"),
    "bitsandbytes bits": ("nf4", {"quant_method": "bitsandbytes"}, "load_in_4bit should be true"),
    "wrong method": ("awq", gptq_config(4), "should be of shape"),
}


@pytest.mark.parametrize(("case", "config", "problem"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused_in_one_line(
    original: Path, tmp_path: Path, case: str, config: dict[str, Any], problem: str
) -> None:
    write(original, tmp_path, CASES[case][0], config)
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(tmp_path)
    assert problem in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "problem"),
    [
        ("awq", {"lm_head.qzeros": None}, "tensor 'lm_head.qzeros' is missing"),
        ("awq", {"lm_head.scales": torch.zeros(2, 96, dtype=torch.int8)}, "should be stored as F16 or BF16 or F32"),
        ("gptq 4 v1 ", {"lm_head.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "a group outside 0 to 1"),
        ("gptq 4 v1 act-order", {"lm_head.g_idx": None}, "tensor 'lm_head.g_idx' is missing"),
        (
            "gptq 4 v1 ",
            {
                "lm_head.qweight": torch.zeros(8, 92, dtype=torch.int32),
                "lm_head.qzeros": torch.zeros(2, 11, dtype=torch.int32),
                "lm_head.scales": torch.zeros(2, 92, dtype=torch.float16),
            },
            "'lm_head.qweight' should be numbers of outputs and inputs whose 4 bits fill words",
        ),
        ("nf4", {"lm_head.weight.absmax": torch.zeros(3)}, "absmax' should be of shape"),
        ("nf4", {"lm_head.weight": torch.zeros(9, 1, dtype=torch.uint8)}, "6144 codes of 4 bits"),
        ("fp8 tensor", {"lm_head.weight_scale": None}, "tensor 'lm_head.weight_scale' is missing"),
        ("w8a8 asymmetric", {"lm_head.weight_zero_point": torch.zeros(3, dtype=torch.int8)}, "zeros for scales of [96"),
        ("w4a16 tensor", {"lm_head.weight_zero_point": torch.zeros(2, dtype=torch.int8)}, "should be one number"),
        ("w4a16", {"lm_head.weight_packed": None}, "tensor 'lm_head.weight' is missing"),
        (
            "fp8 tensor",
            {"lm_head.weight": torch.zeros(0, 64).to(E4M3)},
            "'lm_head.weight' should be of shape [any, any",
        ),
        ("w8a8", {"extra": torch.zeros(3, dtype=torch.int64)}, "'extra' is stored as I64"),
        ("awq", {"lm_head.bias": torch.ones(96)}, "not part of it: lm_head.bias"),
    ],
)
def test_damaged_modules_are_refused(
    original: Path, tmp_path: Path, case: str, change: dict[str, torch.Tensor | None], problem: str
) -> None:
    write(original, tmp_path, *CASES[case][:2])
    tensors = {**load_file(tmp_path / "model.safetensors"), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError) as caught:
        open_checkpoint(tmp_path)
    assert problem in str(caught.value)


def test_biases_of_zeros_that_quantizers_add_are_harmless(original: Path, tmp_path: Path) -> None:
    pack, config, _ = CASES["gptq 4 v1 "]
    write(original, tmp_path, pack, config)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.bias": torch.zeros(96)}, tmp_path / "model.safetensors")
    assert "head.bias" not in open_checkpoint(tmp_path).weights


OTHER_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "fbgemm": ("fp8 channel", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": ("fp8 tensor", {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "modelopt, unnamed": ("fp8 tensor", {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
    "auto-round as gptq": (
        "gptq 4 v1 ",
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round as awq": (
        "awq",
        {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
    ),
}


@pytest.mark.parametrize(("case", "config"), OTHER_NAMES.values(), ids=OTHER_NAMES.keys())
def test_the_same_layouts_under_other_names(original: Path, tmp_path: Path, case: str, config: dict[str, Any]) -> None:
    meaning = write(original, tmp_path, CASES[case][0], config)
    weights = open_checkpoint(tmp_path).weights
    for module, expected in meaning.items():
        assert np.array_equal(dequantize(weights[canonical(module)]), expected.astype(np.float32)), module


@pytest.mark.parametrize(
    "config",
    [
        gptq_config(4, dynamic={r"+:.*q_proj": {"bits": 8}, r"-:.*router": {}}),
        gptq_config(4, quant_method="auto-round", extra_config={"model.layers.0.self_attn.q_proj": {"bits": 8}}),
    ],
    ids=["gptq dynamic", "auto-round"],
)
def test_modules_may_have_bits_and_groups_of_their_own(original: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    kinds = itertools.cycle([(8, 16), (4, 32), (2, 32), (3, 32)])

    def pack(rng: np.random.Generator, out: int, columns: int) -> modules.Module:
        bits, group = next(kinds)
        return modules.gptq(rng, out, columns, group, bits=bits, version=1, act_order=bits == 3)

    meaning = write(original, tmp_path, pack, config)
    checkpoint = open_checkpoint(tmp_path)
    for module, expected in meaning.items():
        assert np.array_equal(dequantize(checkpoint.weights[canonical(module)]), expected.astype(np.float32)), module
    assert {"GPTQ 8-bit", "GPTQ 4-bit", "GPTQ 3-bit", "GPTQ 2-bit"} <= inspect_checkpoint(
        checkpoint
    ).parameters_by_type.keys()


def test_scales_of_activations_are_left_out(original: Path, tmp_path: Path) -> None:
    def pack(rng: np.random.Generator, out: int, columns: int) -> modules.Module:
        tensors, meaning = modules.float8(rng, out, columns, kind="tensor", dtype=E4M3)
        tensors["weight_scale_inv"] = tensors.pop("weight_scale")
        return {**tensors, "activation_scale": torch.ones(()), "input_scale_ub": torch.ones(())}, meaning

    write(original, tmp_path, pack, {**FP8, "activation_scheme": "static", "weight_block_size": None})
    assert open_checkpoint(tmp_path).weights["head.weight"].type_name == "FP8 E4M3"


def test_codes_may_be_stored_as_other_numbers(original: Path, tmp_path: Path) -> None:
    """bitsandbytes' bnb_4bit_quant_storage, for trainers that share out weights of one type."""

    def pack(rng: np.random.Generator, out: int, columns: int) -> modules.Module:
        tensors, meaning = modules.bitsandbytes_4_bit(rng, out, columns, kind="nf4", nested=False)
        return {**tensors, "weight": tensors["weight"].reshape(1, -1).view(torch.bfloat16).T.contiguous()}, meaning

    meaning = write(original, tmp_path, pack, BITSANDBYTES)
    weights = open_checkpoint(tmp_path).weights
    for module, expected in meaning.items():
        assert np.array_equal(dequantize(weights[canonical(module)]), expected.astype(np.float32))


def test_nvidias_file_of_its_own_is_read(original: Path, tmp_path: Path) -> None:
    write(original, tmp_path, CASES["fp8 tensor"][0], {})
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    assert open_checkpoint(tmp_path).weights["head.weight"].type_name == "FP8 E4M3"


def test_a_scheme_for_the_cache_alone_leaves_weights_as_they_are(original: Path, tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}, "config_groups": {}}
    (tmp_path / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    values = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    assert open_checkpoint(tmp_path).quantization.startswith("F32")


def test_a_configuration_in_a_file_of_its_own_is_read(original: Path, tmp_path: Path) -> None:
    pack, config, _ = CASES["gptq 4 v1 "]
    meaning = write(original, tmp_path, pack, config)
    (tmp_path / "config.json").write_bytes((original / "config.json").read_bytes())
    own = {key: value for key, value in config.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    found = dequantize(open_checkpoint(tmp_path).weights["head.weight"])
    assert np.array_equal(found, meaning["lm_head"].astype(np.float32))


def test_opening_reads_no_weights(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(original, tmp_path, *CASES["awq"][:2])

    def fail(*arguments: object) -> np.ndarray:
        raise AssertionError("rows were expanded")

    monkeypatch.setattr(PackedTensor, "expand", fail)
    checkpoint = open_checkpoint(tmp_path)
    assert inspect_checkpoint(checkpoint).weight_bytes > 0
    assert checkpoint.weights["head.weight"].shape == (96, 64)


def test_float8_tables_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for table, dtype in ((e4m3_values(), torch.float8_e4m3fn), (e5m2_values(), torch.float8_e5m2)):
        assert np.array_equal(table, codes.view(dtype).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_streams_of_bits(bits: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 1 << bits, (3, 64))
    words = modules.words_of(numbers.tolist(), bits).numpy().view(np.uint32)
    assert np.array_equal(unpack_stream(words, bits), numbers)
