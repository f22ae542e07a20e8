"""Latent attention on the native library: quantized files, precision, and rows under other cuts of the work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from adapter_cases import add_adapter, peft_logits, read_back
from family_cases import CASES, HEADS, LATENTS, Case, write_gguf
from test_adapters_native import logits
from test_native_executor import Sequences
from test_native_experts import assert_equals_torch, executor_of, prompts_of, runs_here

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu.program import KV_BLOCK
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading import latent
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.dummy import BlockPacking, dummy_weights
from aphrodite.models.spec import MlaSpec, ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.native import NativeExecutor

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not built")

NAMES = ("deepseek v2 lite", "deepseek v2, older gguf", "deepseek v3")


def quantized(path: Path, case: Case, monkeypatch: pytest.MonkeyPatch, *kinds: QuantType) -> Checkpoint:
    """A GGUF file whose matrices are of the first of `kinds` that their columns allow; routers and norms are dense."""
    add = gguf.GGUFWriter.add_tensor

    def add_quantized(self: Any, name: str, values: np.ndarray) -> None:
        for kind in kinds:
            if values.ndim > 1 and "ffn_gate_inp" not in name and values.shape[-1] % kind.block_size == 0:
                ggml_type = gguf.GGMLQuantizationType(kind.gguf_id)
                return add(self, name, gguf.quantize(values, ggml_type), raw_dtype=ggml_type)
        return add(self, name, values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_quantized)
    return open_checkpoint(write_gguf(path / "tiny.gguf", case, case.model()))


def wide_spec(**changes: Any) -> ModelSpec:
    """DeepSeek-V2-Lite in small, with columns that K types take."""
    mla = MlaSpec(q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    moe = MoeSpec(num_experts=8, top_k=3, intermediate_size=256, dense_layers=(0,), shared_intermediate_size=256)
    spec = ModelSpec(
        family="deepseek_v2",
        vocab_size=203,
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=8,
        num_kv_heads=8,
        head_dim=mla.head_dim,
        norm_eps=1e-6,
        max_position=512,
        rotary=RotarySpec(dim=32),
        windows=(None,) * 3,
        attention_scale=mla.head_dim**-0.5,
        moe=moe,
        mla=mla,
    )
    return dataclasses.replace(spec, **changes)


def with_louder_attention(weights: dict[str, RawTensor]) -> dict[str, RawTensor]:
    """Dummy weights whose scores differ from position to position."""
    for name in [
        name for name in weights if name.endswith((".q.weight", ".kv_a.weight", ".k_b.weight", ".v_b.weight"))
    ]:
        values = (4.0 * dequantize(weights[name])).astype("<f2")
        weights[name] = RawTensor(
            name, values.shape, QuantType.F16, values.reshape(-1, values.shape[-1]).view(np.uint8)
        )
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_quantized_files_equal_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expansions of keys and values in one matrix or in two, in a type whose blocks fit both or only one."""
    checkpoint = quantized(tmp_path, CASES[name], monkeypatch, QuantType.Q8_0)
    parameters = checkpoint.weights.parameters
    in_one = "older" in name
    assert parameters["layers.1.k_b.weight"].qtype is (QuantType.F16 if in_one else QuantType.Q8_0)
    assert parameters["layers.1.v_b.weight"].qtype is QuantType.Q8_0
    assert_equals_torch(checkpoint.spec, checkpoint.weights, 2e-4)


def test_parts_of_one_matrix_are_those_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = quantized(tmp_path, CASES["deepseek v2, older gguf"], monkeypatch, QuantType.Q5_0)
    keys, values = (checkpoint.weights[f"layers.2.{part}.weight"] for part in ("k_b", "v_b"))
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.2.attn_kv_b.weight")
    both = gguf.dequantize(stored.data, stored.tensor_type).reshape(HEADS, -1, LATENTS["kv_lora_rank"])
    nope = LATENTS["qk_nope_head_dim"]
    np.testing.assert_allclose(dequantize(keys), both[:, :nope].swapaxes(1, 2), rtol=2**-11)
    np.testing.assert_array_equal(dequantize(values), both[:, nope:])


def test_keys_are_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that has to be transposed takes long; its shape and type are asked for more often."""
    checkpoint = quantized(tmp_path, CASES["deepseek v2, older gguf"], monkeypatch, QuantType.Q8_0)
    expanded = []

    def counted(raw: RawTensor, qtype: QuantType) -> np.ndarray:
        expanded.append(raw.shape[0])
        return numbers(raw, qtype)

    numbers = latent._numbers
    monkeypatch.setattr(latent, "_numbers", counted)
    executor_of(checkpoint.spec, checkpoint.weights)
    assert sum(expanded) == checkpoint.spec.num_layers * HEADS * LATENTS["qk_nope_head_dim"]


@pytest.mark.parametrize(("kv_dtype", "activations"), [("float16", "float32"), ("int16", "int16")])
def test_smaller_caches_stay_near_float32(kv_dtype: Any, activations: Any) -> None:
    spec = wide_spec()
    weights = with_louder_attention(
        dict(dummy_weights(spec, QuantType.F16, packing=BlockPacking(QuantType.Q4_K, QuantType.Q6_K)))
    )
    (tokens,) = prompts_of((300,))
    results = []
    for options in (
        {"kv_dtype": "float32", "activations": "float32"},
        {"kv_dtype": kv_dtype, "activations": activations},
    ):
        results.append(Sequences(executor_of(spec, weights, **options), [tokens]).step({0: 300})[0])
    assert results[0].std() > 0.1
    difference = (results[0] - results[1]).abs()  # the largest is that of a token which chose another expert
    assert difference.mean() < 2e-3 * results[0].std()


@pytest.mark.parametrize("options", [{}, {"activations": "int8", "threads": 3}, {"isa": "avx2"}, {"isa": "portable"}])
@pytest.mark.parametrize("heads", [8, 50])
def test_tokens_do_not_depend_on_the_batch(heads: int, options: dict[str, Any]) -> None:
    """Also of models with more heads than a task computes."""
    if not runs_here(options.get("isa")):
        pytest.skip("the instruction set does not run here")
    spec = wide_spec(num_heads=heads, num_kv_heads=heads)
    packing = BlockPacking(QuantType.Q4_K, QuantType.Q6_K)
    executor = executor_of(spec, dict(dummy_weights(spec, QuantType.F16, packing=packing)), **options)
    tokens = prompts_of((160,))[0]
    sequences = Sequences(executor, [tokens, tokens, tokens, tokens[::-1]])
    (whole,) = sequences.step({0: 160})
    chunks = [sequences.step({1: count})[0] for count in (7, 1, 75)]
    chunks += [sequences.step({3: 37, 1: 77})[1]]
    assert torch.equal(torch.cat(chunks), whole)
    sequences.step({2: 150})
    steps = [sequences.step({2: 1, 3: 1} if number % 2 else {2: 1})[0] for number in range(10)]
    assert torch.equal(torch.cat(steps), whole[150:])


def test_an_adapter_behind_attention_equals_peft(tmp_path: Path) -> None:
    case = CASES["deepseek v2 lite"]
    model = case.model()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = add_adapter(model, "default", 1, target_modules=["o_proj"])
    room = AdapterRoom(1, 16)
    executor = executor_of(
        checkpoint.spec, checkpoint.weights, activations="float32", kv_dtype="float32", adapters=room
    )
    executor.adapters.add(0, read_back(model, "default", checkpoint.spec))  # type: ignore[union-attr]
    executor.adapters.place(0, 0)  # type: ignore[union-attr]
    (tokens,) = prompts_of((90,))
    with_adapter, without = logits(executor, [tokens, tokens], [0, -1])
    assert (with_adapter - without).abs().mean() > 0.1
    torch.testing.assert_close(with_adapter, peft_logits(model, "default", tokens), rtol=0, atol=2e-4)
    torch.testing.assert_close(without, peft_logits(model, None, tokens), rtol=0, atol=1e-4)


def test_weights_take_their_bytes_and_the_cache_one_vector() -> None:
    spec = wide_spec()
    weights = dummy_weights(spec, QuantType.F16, packing=BlockPacking(QuantType.Q4_K, QuantType.Q6_K))
    executor = executor_of(spec, weights)
    stored = sum(parameter.nbytes for parameter in weights.parameters.values())
    assert executor.weight_bytes <= 1.06 * stored
    units = 2 * 4  # a float32 for either part of a vector
    assert executor.kv_bytes_per_block == spec.num_layers * KV_BLOCK * (2 * (256 + 32) + units)


def test_sizes_that_lanes_do_not_divide_are_left_to_torch() -> None:
    spec = wide_spec()
    mla = dataclasses.replace(spec.mla, qk_rope_head_dim=24)  # type: ignore[type-var]
    reason = NativeExecutor.declines(dataclasses.replace(spec, mla=mla), {})
    assert reason == "its programs have no latents of 256 dimensions and 24 that turn, which are not multiples of 16"
