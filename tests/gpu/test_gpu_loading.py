"""Weights on the GPU: sent as they are stored, converted there, or made there."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from aphrodite.errors import ModelFormatError
from aphrodite.layers.dense import stack_dense, to_dense
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor


def stored(rows: int, columns: int, qtype: QuantType, seed: int) -> tuple[RawTensor, torch.Tensor]:
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    kind = gguf.GGMLQuantizationType(qtype.gguf_id)
    data = gguf.quantize(values, kind)
    raw = RawTensor(f"w{seed}", (rows, columns), qtype, data.view(np.uint8).reshape(rows, -1))
    return raw, torch.from_numpy(gguf.dequantize(data, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stacked_weights_equal_the_host_s(device: torch.device, dtype: torch.dtype) -> None:
    kinds = (QuantType.BF16, QuantType.F16, QuantType.F32, QuantType.Q4_1)
    parts = [stored(1100, 4096, qtype, seed) for seed, qtype in enumerate(kinds)]
    got = stack_dense([raw for raw, _ in parts], dtype, device)
    assert (got.dtype, got.device.type) == (dtype, "cuda")
    assert torch.equal(got.cpu(), torch.cat([meaning for _, meaning in parts]).to(dtype))
    vector = RawTensor("n", (1100,), QuantType.F32, np.arange(1100, dtype="<f4").view(np.uint8)[None])
    assert torch.equal(to_dense(vector, torch.float32, device).cpu(), torch.arange(1100.0))


def test_values_beyond_float16_are_refused_by_name(device: torch.device) -> None:
    values = np.full((16, 32), 1e6, dtype="<f4")
    raw = RawTensor("blk.0", (16, 32), QuantType.F32, values.view(np.uint8))
    with pytest.raises(ModelFormatError, match=r"blk\.0.*float16"):
        to_dense(raw, torch.float16, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_made_on_the_device(device: torch.device, dtype: torch.dtype) -> None:
    def make() -> np.ndarray:
        raise AssertionError("made on the host")

    def noise(seed: int) -> NoiseTensor:
        return NoiseTensor("w", (2048, 4096), QuantType.BF16, standard_deviation=0.02, seed=seed, make=make)

    first, again, other = (to_dense(noise(seed), dtype, device).float() for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(first.mean().item()) < 1e-4
    assert (first == 0).float().mean().item() < 1e-4
