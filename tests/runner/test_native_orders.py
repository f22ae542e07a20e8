"""Models whose weights have scattered groups (GPTQ's act-order) on the native library, against the same numbers in
float32; and the library's order of columns by itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_reference import tiny_spec, tiny_weights
from test_adapters_native import adapter, logits
from test_native_executor import Sequences

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from native_harness import available_isas, product_harness, random_weight, step

from aphrodite.kernels.cpu.program import Activation
from aphrodite.layers.lora import AdapterRoom
from aphrodite.models.spec import ModelSpec, MoeSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import GptqMatrix, PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor
from aphrodite.runner.native import NativeExecutor

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")

DENSE = tiny_spec(qkv_bias=True, output_bias=True, mlp_bias=True)
EXPERTS = MoeSpec(
    num_experts=5, top_k=2, intermediate_size=96, dense_layers=(0,), shared_intermediate_size=64, expert_bias=True
)
SPECS = {
    "dense": DENSE,
    "parallel": tiny_spec(block="parallel", norm="layer"),
    "post norm": tiny_spec(block="post_norm"),
    "experts": tiny_spec(moe=EXPERTS),
    "shared experts behind a gate": tiny_spec(
        moe=MoeSpec(num_experts=4, top_k=2, intermediate_size=64, shared_intermediate_size=64, shared_gate=True)
    ),
}


def scattered(name: str, rows: int, columns: int, generator: np.random.Generator, group_of: np.ndarray) -> PackedTensor:
    groups = int(group_of.max()) + 1
    scales = (generator.uniform(1, 2, (groups, rows)) / columns**0.5 / 8).astype(np.float16)
    matrix = GptqMatrix(
        4,
        generator.integers(0, 1 << 32, (columns // 8, rows), np.uint32),
        generator.integers(0, 1 << 32, (groups, rows // 8), np.uint32),
        1,
        RawTensor("scales", scales.shape, QuantType.F16, scales.view(np.uint8)),
        group_of.astype(np.intp),
    )
    return PackedTensor(name, QuantType.F16, matrix)


def plain(tensor: RawTensor) -> RawTensor:
    parts = tensor.parts if isinstance(tensor, StackedTensor) else [tensor]
    values = np.concatenate([dequantize(part) for part in parts]).astype(np.float32).reshape(tensor.shape)
    return RawTensor(tensor.name, values.shape, QuantType.F32, values.reshape(-1, values.shape[-1]).view(np.uint8))


def model(spec: ModelSpec, *, same: bool = False) -> tuple[dict[str, RawTensor], dict[str, RawTensor]]:
    """Weights whose projections take their inputs in orders of their own, and the same numbers in float32.

    With `same`, weights of one size share the order; without, up projections have none.
    """
    packed, generator = dict(tiny_weights(spec, QuantType.F32)), np.random.default_rng(4)

    def one(name: str, rows: int, columns: int) -> PackedTensor:
        order = np.arange(columns) // 32
        if same:
            order = np.random.default_rng(columns).permutation(order)
        elif "up" not in name:
            order = generator.permutation(order)
        return scattered(name, rows, columns, generator, order)

    for name, tensor in list(packed.items()):
        if name.startswith("layers.") and name.endswith(".weight") and len(tensor.shape) > 1 and "router" not in name:
            *stack, rows, columns = tensor.shape
            parts = [one(name, rows, columns) for _ in range(stack[0] if stack else 1)]
            packed[name] = StackedTensor(name, parts) if stack else parts[0]
    return packed, {name: plain(tensor) for name, tensor in packed.items()}


def executor_of(spec: ModelSpec, weights: dict[str, RawTensor], **options: Any) -> NativeExecutor:
    options = {"activations": "float32", "kv_dtype": "float32", "threads": 2, **options}
    executor = NativeExecutor(spec, weights, block_size=16, max_model_len=512, **options)
    executor.allocate_kv_cache(200)
    return executor


def prompt_and_decode(executor: NativeExecutor) -> torch.Tensor:
    sequences = Sequences(executor, [np.random.default_rng(3).integers(0, 203, 40).tolist()])
    return torch.cat([sequences.step({0: count})[0] for count in (33, 1, 1, 5)])


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("variant", SPECS)
def test_scattered_groups_stay_packed_and_compute_what_their_numbers_do(variant: str, same: bool) -> None:
    spec = SPECS[variant]
    packed, exact = model(spec, same=same)
    executor, other = executor_of(spec, packed), executor_of(spec, exact)
    assert "GPTQ 4-bit" in executor.describe()["weights"]
    in_groups = [name for name, tensor in packed.items() if tensor is not exact[name] and "GPTQ" in tensor.type_name]
    stored = sum(packed[name].nbytes for name in in_groups)
    saved = other.weight_bytes - executor.weight_bytes
    assert sum(exact[name].nbytes for name in in_groups) - saved <= 1.06 * stored
    expected = prompt_and_decode(other)
    assert expected.std() > 0.1
    torch.testing.assert_close(prompt_and_decode(executor), expected, rtol=0, atol=2e-4 * float(expected.std()))
    default = prompt_and_decode(executor_of(spec, packed, activations="int16"))
    assert (default - expected).abs().mean() < 2e-3 * float(expected.std())


def test_adapters_follow_the_orders_of_their_weights() -> None:
    packed, exact = model(DENSE)
    text = np.random.default_rng(5).integers(0, 203, 30).tolist()
    results = []
    for weights in (packed, exact):
        executor = executor_of(DENSE, weights, adapters=AdapterRoom(1, 64))
        executor.adapters.add(0, adapter("q k v o gate up down", 16, QuantType.F32, 1))
        executor.adapters.place(0, 0)
        results.append([logits(executor, [text], [slot])[0] for slot in (0, -1)])
    (ours, bare), (expected, _) = results
    assert (ours - bare).abs().mean() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4 * float(expected.std()))


def test_groups_of_unequal_sizes_are_expanded() -> None:
    packed, exact = model(DENSE)
    generator, name = np.random.default_rng(8), "layers.1.down.weight"
    group_of = np.arange(96) // 32
    group_of[:3] = 1
    packed[name] = scattered(name, 64, 96, generator, group_of)
    exact[name] = plain(packed[name])
    results = [prompt_and_decode(executor_of(DENSE, weights)) for weights in (packed, exact)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=5e-3 * float(results[1].std()))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", list(Activation))
def test_columns_are_taken_in_another_order(isa: str, kind: Activation) -> None:
    generator = np.random.default_rng(11)
    table = generator.standard_normal((40, 96)).astype(np.float32)
    weight, order = random_weight(QuantType.Q8_0, 48, 96, 5), generator.permutation(96).astype(np.int32)
    ordered = product_harness(table, weight, kind, isa, order=order)
    expected = product_harness(np.ascontiguousarray(table[:, order]), weight, kind, isa)
    for count in (1, 2, 7, 40):
        inputs = step([(range(count), 0, range(4))])
        np.testing.assert_array_equal(ordered.run(inputs), expected.run(inputs))
