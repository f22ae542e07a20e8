"""Models in packings of safetensors on the native library, against the same numbers in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from native_reference import tiny_spec, tiny_weights
from test_native_executor import Sequences

from aphrodite.kernels.cpu import library
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.packed import (
    BitsAndBytesMatrix,
    GptqMatrix,
    NestedScales,
    PackedMatrix,
    PackedTensor,
    ScaledMatrix,
    e4m3_values,
    e5m2_values,
)
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.native import NativeExecutor

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not built")

SPEC = tiny_spec(
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    head_dim=32,
    num_heads=4,
    rotary=RotarySpec(dim=32),
    windows=(None, None),
)


def raw(values: np.ndarray, qtype: QuantType) -> RawTensor:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)
    return RawTensor("scales", values.shape, qtype, data)


def gptq(bits: int) -> Callable[..., PackedMatrix]:
    def make(rows: int, columns: int, generator: np.random.Generator) -> PackedMatrix:
        scales = generator.uniform(1, 2, (columns // 64, rows)) / columns**0.5 / 2 ** (bits - 1)
        return GptqMatrix(
            bits,
            generator.integers(0, 1 << 32, (columns * bits // 32, rows), np.uint32),
            generator.integers(0, 1 << 32, (columns // 64, rows * bits // 32), np.uint32),
            1,
            raw(scales.astype(np.float16), QuantType.F16),
            None,
        )

    return make


def four_bits(nested: bool) -> Callable[..., PackedMatrix]:
    def make(rows: int, columns: int, generator: np.random.Generator) -> PackedMatrix:
        codebook = np.sort(generator.uniform(-1, 1, 16)).astype(np.float32)
        codes, blocks = generator.integers(0, 256, rows * columns // 2, np.uint8), rows * columns // 64
        absmax = (generator.uniform(1, 2, blocks) * 2 / columns**0.5).astype(np.float32)
        outer = None
        if nested:
            # Sums that float16 holds, so that what is kept is exact.
            outer = NestedScales(
                np.arange(256, dtype=np.float32) / 512, np.full(blocks // 256 + 1, 0.5, "f4"), 256, 0.125
            )
            absmax = generator.integers(0, 256, blocks, np.uint8)  # type: ignore[assignment]
        return BitsAndBytesMatrix("NF4", (rows, columns), codes, codebook, 64, absmax, outer)

    return make


def scaled(
    table: np.ndarray | None, tile: Callable[[int], tuple[int, int]], divisor: float
) -> Callable[..., PackedMatrix]:
    def make(rows: int, columns: int, generator: np.random.Generator) -> PackedMatrix:
        values = generator.integers(0, 256, (rows, columns), np.uint8)
        height, width = tile(columns)
        if table is not None:
            values = values & 0xBF  # below 2
        stored = values if table is not None else values.view(np.int8)
        spread = 1.0 if table is not None else 1 / 80
        grid = generator.uniform(1, 2, (-(-rows // height), columns // width)) / columns**0.5 * divisor * spread
        return ScaledMatrix(
            "scaled", stored, table, raw(grid.astype(np.float32), QuantType.F32), (height, width), divisor
        )

    return make


# The packing, and how much more its tiles may take.
PACKINGS: dict[str, tuple[Callable[..., PackedMatrix], float]] = {
    "gptq 2 bits": (gptq(2), 1.06),
    "gptq 3 bits": (gptq(3), 1.06),
    "nf4": (four_bits(nested=False), 1.05),  # a table a tile, which is of 128 columns here
    "nf4 with double quantization": (four_bits(nested=True), 1.06),
    "fp8 of channels": (scaled(e4m3_values(), lambda columns: (1, columns), 1.0), 1.01),
    "fp8 of blocks": (scaled(e4m3_values(), lambda columns: (48, 64), 1.0), 1.07),
    "int8 of bitsandbytes": (scaled(None, lambda columns: (1, columns), 127.0), 1.02),
}


def model(make: Callable[..., PackedMatrix]) -> tuple[dict[str, RawTensor], dict[str, RawTensor]]:
    """The weights of a model with packed projections, and the same in float32."""
    packed, plain = tiny_weights(SPEC, QuantType.F32), tiny_weights(SPEC, QuantType.F32)
    generator = np.random.default_rng(4)
    for name, tensor in plain.items():
        if name.startswith("layers.") and len(tensor.shape) == 2:
            packed[name] = PackedTensor(name, QuantType.F16, make(*tensor.shape, generator))
            values = packed[name].expand()  # type: ignore[attr-defined]
            plain[name] = RawTensor(name, tensor.shape, QuantType.F32, values.view(np.uint8).reshape(len(values), -1))
    return packed, plain


def run(spec: ModelSpec, weights: dict[str, RawTensor], **options: Any) -> tuple[NativeExecutor, torch.Tensor]:
    executor = NativeExecutor(spec, weights, block_size=16, max_model_len=512, kv_dtype="float32", threads=2, **options)
    executor.allocate_kv_cache(120)
    (logits,) = Sequences(executor, [np.random.default_rng(3).integers(0, 203, 40).tolist()]).step({0: 40})
    return executor, logits


@pytest.mark.parametrize(("make", "most"), PACKINGS.values(), ids=PACKINGS)
def test_packed_models_compute_what_their_numbers_do(make: Callable[..., PackedMatrix], most: float) -> None:
    packed, plain = model(make)
    executor, logits = run(SPEC, packed, activations="float32")
    other, expected = run(SPEC, plain, activations="float32")
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * float(expected.std()))
    saved = other.weight_bytes - executor.weight_bytes
    names = [name for name, tensor in packed.items() if isinstance(tensor, PackedTensor)]
    dense = sum(4 * int(np.prod(plain[name].shape)) for name in names)
    assert dense - saved <= most * sum(packed[name].nbytes for name in names)
    _, default = run(SPEC, packed)
    torch.testing.assert_close(default, expected, rtol=0, atol=0.01 * float(expected.std()))


def test_other_floats_are_expanded() -> None:
    packed, plain = model(scaled(e5m2_values(), lambda columns: (1, columns), 1.0))
    (_, logits), (_, expected) = run(SPEC, packed, activations="float32"), run(SPEC, plain, activations="float32")
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * float(expected.std()))
