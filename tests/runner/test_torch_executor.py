"""The torch executor against transformers, and against itself under every way of cutting the work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch_executor_cases import Driver, executor_of, prompts, tiny_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from aphrodite.errors import ModelFormatError
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.torch_executor import TorchExecutor

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu, one head per kv head": {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 6},
    **{name: {"rope_parameters": {"rope_theta": 1e4, **rope}} for name, rope in ROPES.items()},
}


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def assert_equal_to_transformers(model: Any, **options: Any) -> None:
    driver = Driver(executor_of(model, **options))
    batch = [driver.add(tokens) for tokens in prompts(model.config.vocab_size)]
    for sequence, logits in zip(batch, driver.step([(s, len(s.tokens)) for s in batch]), strict=True):
        expected = reference_logits(model, sequence.tokens)
        assert expected.std() > 0.5  # a difference could be seen
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_logits_equal_transformers(options: dict[str, Any]) -> None:
    assert_equal_to_transformers(tiny_model(LlamaForCausalLM, LlamaConfig, **options))


def test_dynamic_scaling_beyond_the_original_context_equals_transformers() -> None:
    rope = {"rope_theta": 1e4, **ROPES["dynamic"]}
    model = tiny_model(LlamaForCausalLM, LlamaConfig, max_position_embeddings=128, rope_parameters=rope)
    (tokens,) = prompts(model.config.vocab_size, lengths=(300,))
    driver = Driver(executor_of(model, max_model_len=300))
    (logits,) = driver.step([(driver.add(tokens), 300)])
    torch.testing.assert_close(logits, reference_logits(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [1, 16, 40])
def test_sliding_window_equals_transformers(window: int) -> None:
    assert_equal_to_transformers(tiny_model(MistralForCausalLM, MistralConfig, sliding_window=window))


def test_qwen2_biases_equal_transformers() -> None:
    model = tiny_model(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.model.layers[0].self_attn.o_proj.bias is None
    assert_equal_to_transformers(model)


@pytest.mark.parametrize(
    "options", [{"head_dim": 32}, {"tie_word_embeddings": True}, {"attention_bias": True, "num_key_value_heads": 6}]
)
def test_qwen3_norms_of_heads_equal_transformers(options: dict[str, Any]) -> None:
    assert_equal_to_transformers(tiny_model(Qwen3ForCausalLM, Qwen3Config, **options))


@pytest.mark.parametrize("threads", [1, 3])
def test_norms_of_heads_keep_rows_independent(threads: int) -> None:
    driver = Driver(executor_of(tiny_model(Qwen3ForCausalLM, Qwen3Config)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone, chunked, neighbour = (driver.add(tokens) for tokens in (prompts(211)[2], prompts(211)[2], [7] * 50))
        (expected,) = driver.step([(alone, 300)])
        got = [driver.step([(chunked, 131), (neighbour, 37)])[0], driver.step([(neighbour, 2), (chunked, 1)])[1]]
        got.append(driver.step([(chunked, 168)])[0])
        assert torch.equal(torch.cat(got), expected)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[None, 40], ids=["full", "window"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(MistralForCausalLM, MistralConfig, sliding_window=request.param)


@pytest.fixture
def driver(model: Any) -> Driver:
    return Driver(executor_of(model))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_are_bitwise_independent_of_chunks_and_neighbours(driver: Driver, threads: int) -> None:
    """The reference mode's promise: however the work is cut, every token's logits have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone, chunked, decoded, mixed = (driver.add(prompts(211)[2]) for _ in range(4))
        (expected,) = driver.step([(alone, 300)])

        chunks = [driver.step([(chunked, count)])[0] for count in (7, 1, 64, 100, 128)]
        assert torch.equal(torch.cat(chunks), expected)

        driver.step([(decoded, 250)])
        tokens = [driver.step([(decoded, 1)])[0] for _ in range(50)]
        assert torch.equal(torch.cat(tokens), expected[250:])

        neighbours = [driver.add(prompts(211)[n % 2] * 9) for n in range(5)]
        driver.step([(neighbours[0], 30), (neighbours[1], 290)])
        got = [driver.step([(neighbours[0], 1), (mixed, 130), (neighbours[2], 40)])[1]]
        got += [driver.step([(neighbours[1], 1), (neighbours[0], 1), (mixed, 1), (neighbours[3], 3)])[2]]
        got += [driver.step([(mixed, 169), (neighbours[2], 1), (neighbours[4], 17)])[0]]
        assert torch.equal(torch.cat(got), expected)
    finally:
        torch.set_num_threads(before)
    assert driver.executor.describe()["batch invariance"].startswith("yes")


def test_decode_batches_of_uneven_contexts_equal_prefill(driver: Driver) -> None:
    batch = [driver.add(tokens) for tokens in prompts(211, lengths=(2, 17, 33, 130, 258, 300, 16, 64))]
    whole = [driver.step([(driver.add(s.tokens), len(s.tokens))])[0][-1] for s in batch]
    for sequence in batch:
        if len(sequence.tokens) > 1:
            driver.step([(sequence, len(sequence.tokens) - 1)])
    for logits, expected in zip(driver.step([(s, 1) for s in batch]), whole, strict=True):
        assert torch.equal(logits[0], expected)


def test_not_a_number_left_in_a_freed_block_does_not_spread(model: Any) -> None:
    executor = executor_of(model)
    clean = Driver(executor, seed=3)
    tokens = prompts(211)[1]
    (expected,) = clean.step([(clean.add(tokens), len(tokens))])
    assert executor._cache is not None
    for tensor in executor._cache:
        tensor.fill_(float("nan"))
    poisoned = Driver(executor, seed=4)
    (logits,) = poisoned.step([(poisoned.add(tokens), len(tokens))])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.35), (torch.float16, 0.05)])
def test_half_precision_stays_near_float32(model: Any, dtype: torch.dtype, bound: float) -> None:
    driver = Driver(executor_of(model, dtype=dtype))
    batch = [driver.add(tokens) for tokens in prompts(211)]
    driver.step([(s, len(s.tokens) - 1) for s in batch])
    for sequence, logits in zip(batch, driver.step([(s, 1) for s in batch]), strict=True):
        expected = reference_logits(model, sequence.tokens)[-1]
        assert logits.dtype == torch.float32
        assert (logits[0] - expected).abs().mean() < bound
    assert driver.executor.describe()["batch invariance"].startswith("no")


def test_only_wanted_logits_are_computed(driver: Driver) -> None:
    inputs = driver.inputs([(driver.add(prompts(211)[0]), 5)])
    everything = driver.executor.forward(inputs).clone()
    some = driver.executor.forward(inputs._replace(logits_index=torch.tensor([2, 4], dtype=torch.int32)))
    assert torch.equal(some, everything[[2, 4]])
    assert driver.executor.forward(inputs._replace(logits_index=inputs.logits_index[:0])).shape == (0, 211)


def test_sizes_are_reported(model: Any) -> None:
    executor = executor_of(model)
    assert executor.weight_bytes == sum(4 * p.numel() for p in model.parameters())
    assert executor.kv_bytes_per_block == 3 * 2 * 2 * 16 * 16 * 4
    tied = tiny_model(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True)
    assert executor_of(tied).weight_bytes == sum(4 * p.numel() for p in tied.parameters())


def test_missing_and_misshapen_tensors_are_named() -> None:
    spec = ModelSpec(
        family="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        norm_eps=1e-5,
        max_position=64,
        rotary=RotarySpec(dim=4),
        windows=(None,),
        tied_head=True,
    )

    def load(tensors: dict[str, RawTensor]) -> None:
        TorchExecutor(spec, tensors, block_size=16, max_model_len=64, dtype=torch.float32, device=torch.device("cpu"))

    embed = RawTensor("model.embed", (8, 8), QuantType.F32, np.zeros((8, 32), np.uint8))
    with pytest.raises(ModelFormatError, match=r"layers\.0\.attn_norm\.weight"):
        load({"embed.weight": embed})
    with pytest.raises(ModelFormatError, match=r"model\.embed .*\[4, 8\].*\[8, 8\]"):
        load({"embed.weight": RawTensor("model.embed", (4, 8), QuantType.F32, embed.data[:4])})
