"""Adapters in the native library, against weights that have them merged in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_reference import ReferenceModel, tiny_spec, tiny_weights
from torch_executor_cases import Driver, prompts

from aphrodite.kernels.cpu import library
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.lora import Adapter, LowRank
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.native import NativeExecutor

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library was not built")

SPEC = tiny_spec(qkv_bias=True)
WEIGHTS = tiny_weights(SPEC, {"embed": QuantType.Q8_0, "o": QuantType.F16})
SHAPES = {
    "q": (96, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 96),
    "gate": (96, 64),
    "up": (96, 64),
    "down": (64, 96),
}
STORED = {QuantType.F32: "<f4", QuantType.F16: "<f2"}


def stored(values: np.ndarray, qtype: QuantType) -> RawTensor:
    if qtype is QuantType.BF16:
        data = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    else:
        data = values.astype(STORED[qtype])
    return RawTensor("", values.shape, qtype, data.view(np.uint8).reshape(len(values), -1))


def adapter(parts: str, rank: int, qtype: QuantType, seed: int, spec: ModelSpec = SPEC) -> Adapter:
    """Random pairs for some parts of every layer."""
    random = np.random.default_rng(seed)
    pairs = {}
    for layer in range(spec.num_layers):
        for part in parts.split():
            rows, columns = SHAPES[part]
            a = random.standard_normal((rank, columns)) * 0.5 / columns**0.5
            b = random.standard_normal((rows, rank)) / rank**0.5
            pairs[f"layers.{layer}.{part}"] = LowRank(stored(a, qtype), stored(b, qtype), 1.5)
    return Adapter(path=None, pairs=pairs, rank=rank)  # type: ignore[arg-type]


ADAPTERS = [
    adapter("q k v o gate up down", 16, QuantType.F32, 1),
    adapter("q v", 5, QuantType.F16, 2),
    adapter("gate down o", 33, QuantType.BF16, 3),
]


def merged(found: Adapter) -> ReferenceModel:
    model = ReferenceModel(SPEC, WEIGHTS)
    for name, (a, b, scale) in found.pairs.items():
        model.w[f"{name}.weight"] = model.w[f"{name}.weight"] + scale * dequantize(b).astype(float) @ dequantize(a)
    return model


def executor(**options: Any) -> NativeExecutor:
    made = NativeExecutor(
        SPEC,
        WEIGHTS,
        block_size=16,
        max_model_len=512,
        adapters=AdapterRoom(3, 64),
        **{"threads": 2, "kv_dtype": "float32", **options},
    )
    made.allocate_kv_cache(200)
    for number, one in enumerate(ADAPTERS):
        made.adapters.add(number, one)
        made.adapters.place(number, number)
    return made


def logits(made: NativeExecutor, texts: list[list[int]], slots: list[int], chunk: int = 1000) -> list[torch.Tensor]:
    driver = Driver(made)
    requests = [driver.add(text) for text in texts]
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    while any(request.computed < len(request.tokens) for request in requests):
        live = [n for n, request in enumerate(requests) if request.computed < len(request.tokens)]
        work = [(requests[n], min(chunk, len(requests[n].tokens) - requests[n].computed)) for n in live]
        own = torch.tensor([slots[n] for n in live], dtype=torch.int32)
        inputs = driver.inputs(work)._replace(adapters=own if (own >= 0).any() else None)
        for n, part in zip(live, made.forward(inputs).split([count for _, count in work]), strict=True):
            parts[n].append(part.clone())
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("number", range(3))
def test_logits_are_those_of_merged_weights(isa: str, number: int) -> None:
    if library.load().select_isa(isa) is None:
        pytest.skip(f"no {isa} here")
    (text,) = prompts(SPEC.vocab_size, [37])
    expected = merged(ADAPTERS[number]).logits(text)
    plain = ReferenceModel(SPEC, WEIGHTS).logits(text)
    assert np.abs(expected - plain).mean() > 0.1
    made = executor(activations="float32", isa=isa)
    (found,) = logits(made, [text], [number])
    assert np.abs(found.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("activations", "limit"), [("int16", 2e-3), ("int8", 0.2)])
def test_integer_activations_lose_as_little_as_without(activations: str, limit: float) -> None:
    (text,) = prompts(SPEC.vocab_size, [37])
    (found,) = logits(executor(activations=activations), [text], [0])
    assert np.abs(found.numpy() - merged(ADAPTERS[0]).logits(text)).mean() < limit


def test_a_mixed_batch_and_chunks_give_every_row_what_it_gets_alone() -> None:
    texts, slots = prompts(SPEC.vocab_size, [23, 40, 9, 31, 17, 3]), [1, -1, 0, 2, 1, 0]
    made, without = executor(), NativeExecutor(SPEC, WEIGHTS, block_size=16, max_model_len=512, kv_dtype="float32")
    without.allocate_kv_cache(200)
    together = logits(made, texts, slots)
    pieces = logits(made, texts, slots, chunk=7)
    for text, slot, found, chunked in zip(texts, slots, together, pieces, strict=True):
        (alone,) = logits(made, [text], [slot]) if slot >= 0 else logits(without, [text], [-1])
        assert torch.equal(found, alone)
        assert torch.equal(chunked, alone)


def test_slots_take_other_adapters_and_lose_them() -> None:
    made = executor()
    (text,) = prompts(SPEC.vocab_size, [20])
    first, second, plain = (logits(made, [text], [slot])[0] for slot in (0, 1, -1))
    made.adapters.place(0, 1)
    assert torch.equal(logits(made, [text], [0])[0], second)
    made.adapters.remove(1)
    assert torch.equal(logits(made, [text], [0])[0], plain)
    made.adapters.place(1, 0)
    assert torch.equal(logits(made, [text], [1])[0], first)


def test_a_slot_that_is_not_there_is_refused() -> None:
    made = executor()
    with pytest.raises(ValueError, match="has no slot"):
        logits(made, prompts(SPEC.vocab_size, [5]), [3])
