"""What is sent to a device: the file's own values, whatever piece of a matrix it is."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from aphrodite.layers.dense import _pieces, _send, to_dense
from aphrodite.loading.dummy import STANDARD_DEVIATION, dummy_weights
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor

CPU = torch.device("cpu")
STORED = {QuantType.F32: torch.float32, QuantType.F16: torch.float16, QuantType.BF16: torch.bfloat16}


@pytest.mark.parametrize("qtype", [*STORED, QuantType.Q4_1, QuantType.Q8_0])
def test_sent_values_are_those_of_the_file(qtype: QuantType) -> None:
    values = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType(qtype.gguf_id)
    data = gguf.quantize(values, kind)
    meaning = torch.from_numpy(gguf.dequantize(data, kind))
    raw = RawTensor("w", (40, 96), qtype, data.view(np.uint8).reshape(40, -1))
    sent = _send(raw, CPU)
    assert sent.dtype == STORED.get(qtype, torch.float32)
    assert torch.equal(sent.float(), meaning)
    reordered = _send(raw.take_rows(np.arange(40)[::-1]), CPU)
    assert torch.equal(reordered.float(), meaning.flip(0))


@pytest.mark.parametrize("shape", [(1500, 4096), (12, 125, 4096), (3, 1100, 2048)])
def test_pieces_cover_a_matrix_or_a_stack_of_them_once(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(2).normal(size=shape).astype("<f4")
    raw = RawTensor("w", shape, QuantType.F32, values.reshape(-1, shape[-1]).view(np.uint8))
    out = torch.full(values.shape, float("nan"))
    pieces = list(_pieces(raw, out))
    assert len(pieces) > 1
    for piece, target in pieces:
        target.copy_(_send(piece, CPU))
    assert np.array_equal(out.numpy(), values)


def test_noise_is_described_without_being_made() -> None:
    def make() -> np.ndarray:
        raise AssertionError("the bytes were read")

    noise = NoiseTensor("w", (3, 64), QuantType.BF16, standard_deviation=0.1, seed=4, make=make)
    assert (noise.shape, noise.nbytes, noise.seed, noise.standard_deviation) == ((3, 64), 3 * 128, 4, 0.1)
    with pytest.raises(AssertionError, match="were read"):
        _ = noise.data


def test_dummy_weights_are_noise_that_a_device_can_make() -> None:
    spec = ModelSpec(
        family="llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=16, norm_eps=1e-5, max_position=64, rotary=RotarySpec(dim=16), windows=(None, None), qkv_bias=True,
    )  # fmt: skip
    weights = dummy_weights(spec)
    noise = {name: raw for name, raw in weights.items() if isinstance(raw, NoiseTensor)}
    assert {name for name in weights if not name.endswith("norm.weight")} == noise.keys()
    assert len({raw.seed for raw in noise.values()}) == len(noise)
    assert all(raw.standard_deviation == STANDARD_DEVIATION for raw in noise.values())
    assert all(raw.nbytes == raw.data.nbytes == weights.parameters[name].nbytes for name, raw in noise.items())
    on_host = to_dense(noise["layers.1.q.weight"], torch.float32, CPU)
    assert 0.9 * STANDARD_DEVIATION < on_host.std() < 1.1 * STANDARD_DEVIATION
