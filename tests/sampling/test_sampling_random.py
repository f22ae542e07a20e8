"""The counter-based generator against published vectors; all implementations equal bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import reference_noise
import torch

from aphrodite.kernels.cpu.sampling import load
from aphrodite.sampling.random import (
    Use,
    gumbel,
    philox,
    philox_numpy,
    signed_seed,
    uniforms,
    uniforms_at,
    uniforms_numpy,
)

# Random123's known-answer vectors of philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [(0, 0), (1, 7), (2**64 - 1, 2**20), (0x9E3779B97F4A7C15, 131071), (2**63, 3)]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]) -> None:
    assert tuple(philox_numpy(np.array(counter, np.uint32), np.array(key, np.uint32)).tolist()) == output
    words = philox(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert tuple(int(word) for word in words) == output
    assert reference_noise.philox(counter, key) == output


@pytest.mark.parametrize("count", [1, 7, 64, 8193])
def test_torch_equals_numpy(count: int) -> None:
    seeds = torch.tensor([signed_seed(seed) for seed, _ in SEEDS])
    positions = torch.tensor([position for _, position in SEEDS])
    batch = uniforms(seeds, positions, Use.XTC, count).numpy()
    for row, (seed, position) in enumerate(SEEDS):
        np.testing.assert_array_equal(batch[row], uniforms_numpy(seed, position, Use.XTC, np.arange(count)))


def test_single_indices_equal_whole_rows() -> None:
    seeds = torch.tensor([signed_seed(seed) for seed, _ in SEEDS])
    positions = torch.tensor([position for _, position in SEEDS])
    indices = torch.tensor([0, 3, 6, 4097, 8190])
    whole = uniforms(seeds, positions, Use.DRAW, 8193)
    assert torch.equal(uniforms_at(seeds, positions, Use.DRAW, indices), whole.gather(1, indices[:, None])[:, 0])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("count", [1, 7, 64, 8193])
def test_native_equals_numpy(isa: str, count: int) -> None:
    native = load(isa)
    if native is None:
        pytest.skip(f"no native library for {isa} here")
    for seed, position in SEEDS:
        expected = uniforms_numpy(seed, position, Use.DRAW, np.arange(count))
        np.testing.assert_array_equal(native.uniforms(seed, position, Use.DRAW, count), expected)


def test_uniforms_stay_inside_the_open_interval() -> None:
    lowest, highest = np.float32(0.5 * 2**-23), np.float32((2**23 - 0.5) * 2**-23)
    assert lowest > 0
    assert highest < 1
    noise = gumbel(torch.tensor([lowest, highest])).tolist()
    assert noise == pytest.approx([-2.8119, 16.6355], abs=1e-3)
    sample = uniforms_numpy(5, 5, 0, np.arange(200_000))
    assert lowest <= sample.min() < sample.max() <= highest
    counts = np.histogram(sample, 100, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-square, 99 degrees of freedom: p about 1e-4


def test_uses_share_no_numbers() -> None:
    streams = [uniforms_numpy(1, 1, use, np.arange(1000)) for use in Use]
    for i, first in enumerate(streams):
        for second in streams[i + 1 :]:
            assert (first == second).mean() < 0.01
