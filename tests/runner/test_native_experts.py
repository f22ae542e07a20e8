"""Mixtures of experts on the native library, against a float64 model and against themselves under other cuts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_cases import CASES, gguf_tensors, write_gguf
from native_reference import ReferenceModel, tiny_spec, tiny_weights
from test_adapters_native import adapter, logits
from test_native_executor import Sequences

from aphrodite.kernels.cpu import library
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.models.spec import ModelSpec, MoeSpec, RotarySpec
from aphrodite.quantization.at_load import QuantizedWeights
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import GptqMatrix, PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not built")

NUM_BLOCKS = 200
WIDE = {"hidden_size": 256, "head_dim": 64, "num_heads": 4, "rotary": RotarySpec(dim=64)}
K_MEDIUM = {
    **dict.fromkeys(("q", "k", "o", "gate", "up"), QuantType.Q4_K),
    **dict.fromkeys(("v", "down", "embed", "head"), QuantType.Q6_K),
}
GRIDS = {
    **K_MEDIUM,
    "q": QuantType.TQ1_0,
    "gate": QuantType.IQ2_XXS,
    "up": QuantType.Q2_K,
    "down": QuantType.IQ1_M,
}
MIXED = {"gate": QuantType.Q5_0, "up": QuantType.F16, "down": QuantType.IQ4_NL}


def experts(**changes: Any) -> MoeSpec:
    return MoeSpec(**{"num_experts": 12, "top_k": 3, "intermediate_size": 96, **changes})


VARIANTS: dict[str, tuple[dict[str, Any], Mapping[str, QuantType] | QuantType]] = {
    "softmax": ({"moe": experts()}, QuantType.Q4_0),
    "one expert a token": ({"moe": experts(top_k=1, num_experts=3)}, QuantType.BF16),
    "normalized, dense first": ({"moe": experts(normalize=True, dense_layers=(0,))}, QuantType.Q8_0),
    "sigmoid in groups": (
        {
            "moe": experts(
                scoring="sigmoid",
                correction_bias=True,
                num_groups=4,
                top_groups=2,
                group_score="top2_sum",
                normalize=True,
                weight_scale=2.5,
                shared_intermediate_size=64,
            )
        },
        QuantType.Q4_1,
    ),
    "best groups": ({"moe": experts(num_groups=6, top_groups=2, weight_scale=1.5)}, QuantType.F32),
    "shared behind a gate": ({"moe": experts(shared_intermediate_size=160, shared_gate=True)}, MIXED),
    "gpt-oss": (
        {
            "moe": experts(scoring="softmax_of_chosen", router_bias=True, expert_bias=True, num_experts=5),
            "activation": "swiglu_oai",
            "attention_sinks": True,
            "qkv_bias": True,
            "output_bias": True,
            "windows": (24, None, 24),
        },
        {**dict.fromkeys(("gate", "up", "down"), QuantType.MXFP4), "q": QuantType.Q8_0},
    ),
    "k types": ({**WIDE, "moe": experts(intermediate_size=256)}, K_MEDIUM),
    "grids": ({**WIDE, "moe": experts(intermediate_size=256)}, GRIDS),
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> tuple[ModelSpec, dict[str, RawTensor]]:
    changes, types = VARIANTS[request.param]
    spec = tiny_spec(**changes)
    return spec, tiny_weights(spec, types)


def executor_of(spec: ModelSpec, weights: Mapping[str, RawTensor], **options: Any) -> NativeExecutor:
    executor = NativeExecutor(spec, weights, block_size=16, max_model_len=512, **{"threads": 2, **options})
    executor.allocate_kv_cache(NUM_BLOCKS)
    return executor


def runs_here(isa: str | None) -> bool:
    loaded = library.load()
    return loaded is not None and loaded.select_isa(isa) is not None


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 203, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("activations", "isa", "tolerance"),
    [("float32", None, 1e-4), ("int16", None, 0.02), ("float32", "avx2", 1e-4), ("float32", "portable", 1e-4)],
)
def test_logits_equal_float64(
    model: tuple[ModelSpec, dict[str, RawTensor]], activations: Any, isa: str | None, tolerance: float
) -> None:
    if not runs_here(isa):
        pytest.skip("the instruction set does not run here")
    executor = executor_of(*model, activations=activations, kv_dtype="float32", isa=isa)
    reference = ReferenceModel(*model)
    prompts = prompts_of((150, 7, 40))
    sequences = Sequences(executor, prompts)
    first = sequences.step({0: 149, 1: 6, 2: 13})
    second = sequences.step({0: 1, 1: 1, 2: 27})
    for prompt, *pieces in zip(prompts, first, second, strict=True):
        expected = reference.logits(prompt)
        assert expected.std() > 0.5
        np.testing.assert_allclose(torch.cat(pieces).numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"activations": "int8", "threads": 3}, {"isa": "avx2"}, {"isa": "portable"}])
def test_tokens_do_not_depend_on_the_batch(
    model: tuple[ModelSpec, dict[str, RawTensor]], options: dict[str, Any]
) -> None:
    if not runs_here(options.get("isa")):
        pytest.skip("the instruction set does not run here")
    executor = executor_of(*model, **options)
    tokens = prompts_of((70,))[0]
    sequences = Sequences(executor, [tokens, tokens, tokens, tokens[::-1]])
    (whole,) = sequences.step({0: 70})
    chunks = [sequences.step({1: count})[0] for count in (7, 1, 31)]
    chunks += [sequences.step({3: 37, 1: 31})[1]]
    assert torch.equal(torch.cat(chunks), whole)
    sequences.step({2: 60})
    steps = [sequences.step({2: 1, 3: 1} if number % 2 else {2: 1})[0] for number in range(10)]
    assert torch.equal(torch.cat(steps), whole[60:])


def test_a_token_that_is_not_finite_spoils_its_own_row(model: tuple[ModelSpec, dict[str, RawTensor]]) -> None:
    spec, weights = model
    embed = np.zeros((spec.vocab_size, spec.hidden_size), np.float32)
    embed[:] = np.random.default_rng(0).standard_normal(embed.shape)
    embed[5] = np.nan
    table = RawTensor("embed.weight", embed.shape, QuantType.F32, embed.view(np.uint8).reshape(len(embed), -1))
    executor = executor_of(spec, {**weights, "embed.weight": table})
    prompts = [[1, 2, 3, 4], [6, 5], [7, 8, 9]]
    (alone,) = Sequences(executor, prompts).step({2: 3})
    good, bad, other = Sequences(executor, prompts).step({0: 4, 1: 2, 2: 3})
    assert good.isfinite().all()
    assert bad[0].isfinite().all()
    assert not bad[1].isfinite().any()
    assert torch.equal(other, alone)


def test_experts_take_their_bytes_and_little_more() -> None:
    spec = tiny_spec(**WIDE, moe=experts(intermediate_size=256, num_experts=16))
    for types in (QuantType.Q4_K, QuantType.Q6_K, QuantType.MXFP4, QuantType.Q8_0, QuantType.IQ4_XS):
        weights = tiny_weights(spec, types)
        stored = sum(weight.nbytes for weight in weights.values())
        assert executor_of(spec, weights).weight_bytes <= 1.06 * stored


def test_a_quantized_gguf_file_equals_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in one tensor, in the types that llama.cpp stores them in."""
    case = CASES["qwen 3 moe"]
    model = case.model()
    writer = gguf.GGUFWriter.add_tensor

    def add(self: Any, name: str, values: np.ndarray) -> None:
        if "_exps" not in name:
            return writer(self, name, values)
        kind = gguf.GGMLQuantizationType.Q8_0 if "down" in name else gguf.GGMLQuantizationType.Q4_0
        return writer(self, name, gguf.quantize(values, kind), raw_dtype=kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    assert any("_exps" in name for name in gguf_tensors(case, case.architecture, model))  # type: ignore[arg-type]
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", case, model))
    assert checkpoint.weights.parameters["layers.1.expert_up.weight"].qtype is QuantType.Q4_0
    assert_equals_torch(checkpoint.spec, checkpoint.weights, 1e-4)


def test_adapters_of_attention_work_beside_experts() -> None:
    spec = tiny_spec(moe=experts(shared_intermediate_size=64))
    weights = tiny_weights(spec, QuantType.Q4_1)
    room = AdapterRoom(1, 16)
    executor = executor_of(spec, weights, activations="float32", kv_dtype="float32", adapters=room)
    own = adapter("q k v o", 8, QuantType.F16, 1, spec)
    executor.adapters.add(0, own)  # type: ignore[union-attr]
    executor.adapters.place(0, 0)  # type: ignore[union-attr]
    (tokens,) = prompts_of((40,))
    reference = ReferenceModel(spec, weights)
    plain = reference.logits(tokens)
    for name, (a, b, scale) in own.pairs.items():
        reference.w[f"{name}.weight"] = reference.w[f"{name}.weight"] + scale * dequantize(b).astype(
            float
        ) @ dequantize(a)
    expected = reference.logits(tokens)
    assert np.abs(expected - plain).mean() > 0.1
    with_adapter, without = (logits(executor, [tokens], [slot])[0].numpy() for slot in (0, -1))
    np.testing.assert_allclose(with_adapter, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(without, plain, rtol=0, atol=1e-4 * np.abs(plain).max())


def test_loading_tells_what_is_in_place() -> None:
    spec = tiny_spec(moe=experts())
    told: list[tuple[int, int]] = []
    executor = executor_of(spec, tiny_weights(spec, QuantType.Q8_0), progress=lambda *bytes: told.append(bytes))
    done = [first for first, _ in told]
    assert done == sorted(done)
    assert done[0] < executor.weight_bytes / 10
    assert told[-1] == (executor.weight_bytes, executor.weight_bytes)


def test_experts_of_several_types_are_left_to_torch() -> None:
    spec = tiny_spec(moe=experts())
    weights, finer = tiny_weights(spec, QuantType.Q4_0), tiny_weights(spec, QuantType.Q8_0)
    name = "layers.1.expert_down.weight"
    parts = [(finer if number == 3 else weights)[name].part(number) for number in range(12)]
    reason = NativeExecutor.declines(spec, {**weights, name: StackedTensor(name, parts)})
    assert reason == f"{name} is stored in types that differ from expert to expert"
    assert (
        NativeExecutor.declines(spec, {**weights, name: StackedTensor(name, [*parts[:3], *parts[4:], parts[0]])})
        is None
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_of_gptq_stay_in_groups(bits: int) -> None:
    spec = tiny_spec(moe=experts(intermediate_size=64))
    weights = tiny_weights(spec, QuantType.F16)
    for name in [name for name in weights if "expert_" in name]:
        count, rows, columns = weights[name].shape
        parts = [PackedTensor(name, QuantType.F16, gptq_matrix(bits, rows, columns, seed)) for seed in range(count)]
        weights[name] = StackedTensor(name, parts)
    executor = assert_equals_torch(spec, weights, 1e-4)
    assert executor.describe()["weights"] == f"F16, F32, GPTQ {bits}-bit"


@pytest.mark.parametrize("name", ["mixtral", "granite moe", "gpt-oss"])
def test_experts_quantized_at_load(name: str, tmp_path: Path) -> None:
    """Experts apart, two projections in one tensor, and alternating rows of transposed matrices."""
    CASES[name].model().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    executor = assert_equals_torch(checkpoint.spec, QuantizedWeights(checkpoint.weights, "int4", on_host=True), 1e-4)
    assert executor.describe()["weights"] == "F32, Q4_1"


def gptq_matrix(bits: int, rows: int, columns: int, seed: int) -> GptqMatrix:
    generator = np.random.default_rng(seed)
    groups = columns // 32
    scales = np.full((groups, rows), 2.0 / columns**0.5 / 2**bits, np.float16)
    return GptqMatrix(
        bits,
        generator.integers(0, 1 << 32, (columns * bits // 32, rows), np.uint32),
        np.full((groups, rows * bits // 32), 0x77777777 if bits == 4 else 0x7F7F7F7F, np.uint32),
        1,
        RawTensor("scales", scales.shape, QuantType.F16, scales.view(np.uint8)),
        None,
    )


def assert_equals_torch(spec: ModelSpec, weights: Mapping[str, RawTensor], tolerance: float) -> NativeExecutor:
    native = executor_of(spec, weights, activations="float32", kv_dtype="float32")
    other = TorchExecutor(
        spec, weights, block_size=16, max_model_len=512, dtype=torch.float32, device=torch.device("cpu")
    )
    other.allocate_kv_cache(NUM_BLOCKS)
    tokens = prompts_of((50,))
    results = [Sequences(executor, tokens).step({0: 50})[0] for executor in (native, other)]  # type: ignore[arg-type]
    assert results[0].std() > 0.01
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=tolerance)
    return native
