"""The native executor against a float64 model, transformers, and itself under every way of cutting the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_reference import ReferenceModel, tiny_spec, tiny_weights

from aphrodite.errors import ConfigError
from aphrodite.kernels.cpu import library
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native import NativeExecutor

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not built")

NUM_BLOCKS = 120
MIXED = {"v": QuantType.Q8_0, "k": QuantType.F16, "up": QuantType.Q5_1, "down": QuantType.Q5_0, "embed": QuantType.Q8_0}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_heads": 4, "rotary": RotarySpec(dim=64)}
K_MEDIUM = {
    **dict.fromkeys(("q", "k", "o", "gate", "up"), QuantType.Q4_K),
    **dict.fromkeys(("v", "down", "embed"), QuantType.Q6_K),
    "head": QuantType.Q5_K,
}
SMALL = {
    "q": QuantType.Q2_K,
    "k": QuantType.Q3_K,
    "v": QuantType.Q5_K,
    "o": QuantType.MXFP4,
    "gate": QuantType.IQ4_XS,
    "up": QuantType.IQ4_NL,
    "down": QuantType.Q3_K,
    "embed": QuantType.IQ4_XS,
    "head": QuantType.Q2_K,
}
GRIDS = {
    "q": QuantType.IQ3_S,
    "k": QuantType.IQ2_S,
    "v": QuantType.IQ1_M,
    "o": QuantType.TQ1_0,
    "gate": QuantType.IQ2_XXS,
    "up": QuantType.IQ1_S,
    "down": QuantType.IQ3_XXS,
    "embed": QuantType.IQ2_XS,
    "head": QuantType.IQ3_S,
}
VARIANTS: dict[str, tuple[dict[str, Any], Mapping[str, QuantType] | QuantType]] = {
    "q4_1": ({}, QuantType.Q4_1),
    "k types": (WIDE, K_MEDIUM),
    "small types": (WIDE, SMALL),
    "grids": (WIDE, GRIDS),
    "tied": ({"tied_head": True}, {"embed": QuantType.Q8_0}),
    "mixed types": ({}, MIXED),
    "dense": ({}, QuantType.BF16),
    "biases": ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, QuantType.Q4_0),
    "gelu": ({"activation": "gelu_tanh"}, QuantType.F32),
    "windows": ({"windows": (None, 24, 150)}, QuantType.Q8_0),
    "head size 80": ({"head_dim": 80, "num_heads": 2, "num_kv_heads": 2, "rotary": RotarySpec(dim=80)}, QuantType.Q4_1),
    "partial rotary": ({"head_dim": 32, "rotary": RotarySpec(dim=24)}, QuantType.Q4_1),
    "norms of heads": (
        {"qk_norm": True, "head_dim": 32, "num_heads": 4, "rotary": RotarySpec(dim=32)},
        QuantType.Q4_1,
    ),
    "soft bounds": ({"attention_softcap": 1.5, "logit_softcap": 3.0}, QuantType.Q4_1),
    "linear scaling": ({"rotary": RotarySpec(dim=16, scaling="linear", factor=2.0)}, QuantType.Q4_1),
}


class Sequences:
    """Token sequences with scattered blocks, fed to an executor in pieces."""

    def __init__(self, executor: NativeExecutor, prompts: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.executor, self.prompts = executor, prompts
        free = np.random.default_rng(seed).permutation(NUM_BLOCKS).tolist()
        self.blocks = [[free.pop() for _ in range(-(-len(prompt) // 16))] for prompt in prompts]
        self.computed = [0] * len(prompts)

    def step(self, counts: Mapping[int, int]) -> list[torch.Tensor]:
        """Logits of the next `count` tokens of each sequence."""
        logits = self.executor.forward(self.inputs(counts))
        for sequence, count in counts.items():
            self.computed[sequence] += count
        return list(logits.clone().split(list(counts.values())))

    def inputs(self, counts: Mapping[int, int]) -> ForwardInputs:
        tokens, positions, slots, contexts = [], [], [], []
        tables = torch.full((len(counts), 2 + max(len(self.blocks[s]) for s in counts)), -1, dtype=torch.int32)
        for row, (s, count) in enumerate(counts.items()):
            where = range(self.computed[s], self.computed[s] + count)
            tokens += [self.prompts[s][p] for p in where]
            positions += where
            slots += [self.blocks[s][p // 16] * 16 + p % 16 for p in where]
            contexts.append(self.computed[s] + count)
            tables[row, : len(self.blocks[s])] = torch.tensor(self.blocks[s])
        ends = np.cumsum([0, *counts.values()])
        as_int = {"dtype": torch.int32}
        return ForwardInputs(
            token_ids=torch.tensor(tokens, **as_int),
            positions=torch.tensor(positions, **as_int),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(ends, **as_int),
            context_lens=torch.tensor(contexts, **as_int),
            block_tables=tables,
            logits_index=torch.arange(len(tokens), **as_int),
        )


def _executor(spec: ModelSpec, weights: Mapping[str, RawTensor], **options: Any) -> NativeExecutor:
    executor = NativeExecutor(spec, weights, block_size=16, max_model_len=512, **{"threads": 2, **options})
    executor.allocate_kv_cache(NUM_BLOCKS)
    return executor


def _prompts(lengths: Sequence[int], vocab_size: int = 203) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("activations", "kv_dtype", "tolerance"),
    [
        ("float32", "float32", 1e-4),
        ("int16", "float32", 0.02),
        ("int16", "float16", 0.06),
        ("int16", "int16", 0.06),
        ("int8", "int16", 3.0),
    ],
)
def test_logits_equal_float64(name: str, activations: Any, kv_dtype: Any, tolerance: float) -> None:
    changes, types = VARIANTS[name]
    spec = tiny_spec(**changes)
    weights = tiny_weights(spec, types)
    executor = _executor(spec, weights, activations=activations, kv_dtype=kv_dtype)
    reference = ReferenceModel(spec, weights)
    prompts = _prompts((200, 7, 40))
    sequences = Sequences(executor, prompts)
    first = sequences.step({0: 199, 1: 6, 2: 13})
    second = sequences.step({0: 1, 1: 1, 2: 27})
    for prompt, *pieces in zip(prompts, first, second, strict=True):
        expected = reference.logits(prompt)
        assert expected.std() > 0.5
        np.testing.assert_allclose(torch.cat(pieces).numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("activations", ["float32", "int16", "int8"])
def test_no_bit_depends_on_chunks_neighbours_or_threads(activations: Any, isa: str) -> None:
    loaded = library.load()
    if loaded is None or loaded.select_isa(isa) is None:
        pytest.skip(f"{isa} does not run here")
    spec = tiny_spec(windows=(None, 70, None))
    weights = tiny_weights(spec, MIXED)
    prompts = _prompts((180, 33, 90, 20))
    alone = []
    for s in range(len(prompts)):
        executor = _executor(spec, weights, activations=activations, isa=isa, threads=1)
        alone.append(Sequences(executor, prompts).step({s: len(prompts[s])})[0])
    generator = np.random.default_rng(4)
    for seed in range(3):
        executor = _executor(spec, weights, activations=activations, isa=isa, threads=1 + seed)
        sequences = Sequences(executor, prompts, seed)
        pieces: list[list[torch.Tensor]] = [[] for _ in prompts]
        while left := {
            s: len(p) - c for s, (p, c) in enumerate(zip(prompts, sequences.computed, strict=True)) if len(p) > c
        }:
            chosen = [s for s in left if generator.random() < 0.7] or list(left)
            counts = {s: min(left[s], int(generator.choice([1, 1, 2, 5, 16, 40]))) for s in chosen}
            for s, logits in zip(counts, sequences.step(counts), strict=True):
                pieces[s].append(logits)
        for s, expected in enumerate(alone):
            assert torch.equal(torch.cat(pieces[s]), expected)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize(
    "changes",
    [
        {"block": "post_norm", "qk_norm": True, "head_norm": "width", "attention_softcap": 2.0, "logit_softcap": 3.0},
        {"block": "parallel", "norm": "layer", "norm_bias": True, "qk_norm": True, "head_norm": "each_head"},
        {"block": "sandwich", "norm": "layer", "qk_norm": True, "activation": "gelu_tanh"},
    ],
)
def test_instruction_sets_agree_on_other_blocks_and_norms(changes: dict[str, Any], isa: str) -> None:
    """What tests of families hold to transformers on the best set, where dense and packed inputs share a norm."""
    loaded = library.load()
    if loaded is None or loaded.select_isa(isa) is None:
        pytest.skip(f"{isa} does not run here")
    spec = tiny_spec(**changes)
    weights = tiny_weights(spec, {**MIXED, "gate": QuantType.F16})
    prompts = _prompts((100, 3))
    logits = []
    for name in (None, isa):
        executor = _executor(spec, weights, activations="float32", kv_dtype="float32", isa=name)
        logits.append(torch.cat(Sequences(executor, prompts).step({0: 100, 1: 3})))
    assert logits[0].std() > 0.3
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


def test_only_the_wanted_rows_get_logits() -> None:
    spec = tiny_spec()
    executor = _executor(spec, tiny_weights(spec, QuantType.Q4_1))
    sequences = Sequences(executor, _prompts((30, 9)))
    inputs = sequences.inputs({0: 30, 1: 9})
    every = executor.forward(inputs).clone()
    some = executor.forward(inputs._replace(logits_index=torch.tensor([29, 38], dtype=torch.int32)))
    assert torch.equal(some, every[[29, 38]])
    assert executor.forward(inputs._replace(logits_index=torch.empty(0, dtype=torch.int32))).shape == (0, 203)


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("token_ids", 0, 203, "vocabulary"),
        ("token_ids", 3, -1, "vocabulary"),
        ("positions", 5, 9, "positions"),
        ("context_lens", 0, 513, "context_lens"),
        ("context_lens", 1, 0, "context_lens"),
        ("slot_mapping", 2, NUM_BLOCKS * 16, "slot_mapping"),
        ("slot_mapping", 2, -1, "slot_mapping"),
        ("query_start", 1, 0, "query_start"),
        ("query_start", 2, 100, "query_start"),
        ("block_tables", (0, 1), NUM_BLOCKS, "block table"),
        ("block_tables", (1, 0), -1, "block table"),
        ("logits_index", 0, 39, "logits_index"),
    ],
)
def test_bad_inputs_raise_and_change_nothing(field: str, index: Any, value: int, message: str) -> None:
    spec = tiny_spec()
    executor = _executor(spec, tiny_weights(spec, QuantType.Q4_1))
    inputs = Sequences(executor, _prompts((30, 9))).inputs({0: 30, 1: 9})
    expected = executor.forward(inputs).clone()
    tensor = getattr(inputs, field).clone()
    tensor[index] = value
    with pytest.raises(ValueError, match=message):
        executor.forward(inputs._replace(**{field: tensor}))
    assert torch.equal(executor.forward(inputs), expected)


def test_tensors_of_another_type_or_length_are_refused() -> None:
    spec = tiny_spec()
    executor = _executor(spec, tiny_weights(spec, QuantType.Q4_1))
    inputs = Sequences(executor, _prompts((30,))).inputs({0: 30})
    for wrong in (
        inputs._replace(token_ids=inputs.token_ids.long()),
        inputs._replace(positions=inputs.positions[:5]),
        inputs._replace(block_tables=inputs.block_tables.repeat(3, 1)),
        inputs._replace(slot_mapping=inputs.slot_mapping.repeat(2)[::2]),
    ):
        with pytest.raises(ValueError, match="a step"):
            executor.forward(wrong)


def test_models_that_it_cannot_run_are_declined_with_a_reason() -> None:
    spec = tiny_spec()
    weights = tiny_weights(spec, QuantType.Q4_1)
    assert NativeExecutor.declines(spec, weights) is None
    assert "blocks of 16" in str(NativeExecutor.declines(spec, weights, block_size=32))
    assert "head size 24" in str(NativeExecutor.declines(tiny_spec(head_dim=24), weights))
    narrow = tiny_spec(hidden_size=48)
    reason = NativeExecutor.declines(narrow, tiny_weights(narrow, QuantType.F32))
    assert "multiple of 32" in str(reason)
    with pytest.raises(ConfigError, match="multiple of 32"):
        _executor(narrow, tiny_weights(narrow, QuantType.F32))
    with pytest.raises(ConfigError, match="z80"):
        _executor(spec, weights, isa="z80")


def test_real_model_is_close_to_transformers(smollm2_path: Path, smollm2_oracle: Any) -> None:
    """Random tokens, harder than text: bounds about twice the worst of three draws, one of which holds a token that
    magnifies every error about thirty times; int8 keeps most of the greedy choices."""
    checkpoint = open_checkpoint(smollm2_path)
    draws = [np.random.default_rng(seed).integers(0, checkpoint.spec.vocab_size, 96).tolist() for seed in range(3)]
    with torch.no_grad():
        expected = smollm2_oracle(torch.tensor(draws)).logits
    bounds = (
        ("float32", "float32", 1e-3, 5e-5, 1.0),
        ("int16", "float16", 0.3, 8e-3, 0.98),
        ("int16", "int16", 0.3, 8e-3, 0.98),
        ("int8", "int16", 35.0, 0.6, 0.8),
    )
    for activations, kv_dtype, most, mean, agreement in bounds:
        executor = _executor(checkpoint.spec, checkpoint.weights, activations=activations, kv_dtype=kv_dtype)
        assert executor.weight_bytes <= 1.15 * checkpoint.weight_bytes
        logits = torch.stack([Sequences(executor, [draw]).step({0: len(draw)})[0].clone() for draw in draws])
        difference = (logits - expected).abs()
        assert difference.max() < most
        assert difference.mean() < mean
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= agreement
