"""A model in each GGUF storage type computes what the same values do in float32."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch_executor_cases import Driver

from aphrodite.kernels.cpu import library
from aphrodite.kernels.dispatch import log_once
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.inspect import inspect_checkpoint
from aphrodite.quantization.types import QuantType
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.torch_executor import TorchExecutor

HIDDEN, HEADS, VOCAB = 256, 4, 64
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_up.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, HIDDEN),
}
NORMS = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
BLOCK_TYPES = [qtype for qtype in QuantType if qtype.block_size > 1 and qtype is not QuantType.Q8_K]


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks that mean moderate numbers, found by throwing away all others."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    needed, kept = shape[0] * shape[1] // block_size, np.empty((0, block_bytes), np.uint8)
    while len(kept) < needed:
        blocks = rng.integers(0, 256, (4 * needed, block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            values = np.abs(gguf.quants.dequantize(blocks, kind))
        kept = np.concatenate((kept, blocks[(values.max(1) < 1.0) & (values.max(1) > 1e-3)]))
    return kept[:needed].reshape(shape[0], -1)


def write(path: Path, tensors: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType | None) -> Checkpoint:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    for name in NORMS:
        writer.add_tensor(name, np.ones(HIDDEN, np.float32))
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def native_logits(checkpoint: Checkpoint) -> torch.Tensor:
    executor = NativeExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=16,
        max_model_len=64,
        activations="float32",
        kv_dtype="float32",
        threads=1,
    )
    executor.allocate_kv_cache(4)
    driver = Driver(executor, num_blocks=4)  # type: ignore[arg-type]
    return driver.step([(driver.add([3, 1, 4, 1, 5]), 5)])[0]


def torch_logits(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    executor = TorchExecutor(
        checkpoint.spec,
        checkpoint.weights,
        block_size=16,
        max_model_len=64,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    executor.allocate_kv_cache(4)
    driver = Driver(executor, num_blocks=4)
    return driver.step([(driver.add([3, 1, 4, 1, 5]), 5)])[0]


@pytest.mark.parametrize("qtype", BLOCK_TYPES)
def test_every_storage_type_runs_dense(qtype: QuantType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, rng = gguf.GGMLQuantizationType(qtype.gguf_id), np.random.default_rng(0)
    stored = {name: random_blocks(kind, shape, rng) for name, shape in SHAPES.items()}
    meaning = {name: gguf.quants.dequantize(data, kind) for name, data in stored.items()}
    checkpoint = write(tmp_path / "stored.gguf", stored, kind)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "aphrodite.kernels"):
        found = torch_logits(checkpoint)
    expected = torch_logits(write(tmp_path / "meaning.gguf", meaning, None))
    assert expected.std() > 0
    assert torch.equal(found, expected)
    told = [record.message for record in caplog.records if record.message.startswith(f"{qtype.name} weights")]
    factor = 4 * qtype.block_size / qtype.block_bytes
    assert told == [f"{qtype.name} weights: expanded to float32 in {factor:.1f} times their memory"]

    reason = NativeExecutor.declines(checkpoint.spec, checkpoint.weights)
    if library.load() is not None:
        assert reason is None
        torch.testing.assert_close(native_logits(checkpoint), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))

    facts = inspect_checkpoint(checkpoint)
    assert facts.weight_bytes == sum(data.nbytes for data in stored.values()) + 4 * HIDDEN * len(NORMS)
    assert facts.expanded_bytes == 2 * facts.parameters
    assert facts.quantization.startswith(f"{qtype.name} ({len(SHAPES)} tensors)")


def test_a_rounding_expansion_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = gguf.GGMLQuantizationType.Q4_K
    stored = {name: random_blocks(kind, shape, np.random.default_rng(0)) for name, shape in SHAPES.items()}
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "aphrodite.kernels"):
        torch_logits(write(tmp_path / "stored.gguf", stored, kind), torch.bfloat16)
    assert "Q4_K weights: expanded to bfloat16 in 3.6 times their memory, rounded to bfloat16" in caplog.text
