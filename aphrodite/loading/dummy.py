"""Random weights for a model of which only the configuration is at hand (benchmarks, tests).

Never zeros: an idle multiplication is not what is to be measured, and uniform logits hide errors. On an accelerator
the values are others than on the host, made where they are needed.
"""

from __future__ import annotations

import math
import zlib
from functools import partial

import numpy as np

from aphrodite.loading.parameters import parameter_shapes
from aphrodite.loading.weights import Parameter, Weights
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.dense_types import encode_dense
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor

STANDARD_DEVIATION = 0.02
# Values are cut out of one pool of this prime length, so that large models are made at the speed of a
# copy while no two rows of a matrix begin at the same place.
_POOL_LENGTH = 1_048_573


def dummy_weights(spec: ModelSpec, qtype: QuantType = QuantType.BF16, seed: int = 0) -> Weights:
    """Parameters of `spec`, each made when it is asked for and always the same for one seed.

    Matrices and biases are N(0, 0.02²), norms are 1.

    Args:
        qtype: F32, F16 or BF16.
    """
    if qtype.block_size > 1:
        raise ValueError(f"dummy weights are dense, not {qtype.name}")
    noise = np.random.default_rng(seed).standard_normal(_POOL_LENGTH, np.float32) * np.float32(STANDARD_DEVIATION)
    pool = encode_dense(noise, qtype)
    parameters: dict[str, Parameter] = {}
    for name, shape in parameter_shapes(spec).items():
        if name.endswith("norm.weight"):
            load = partial(_ones, name, shape)
            parameters[name] = Parameter(shape, QuantType.F32, load)
        else:
            parameters[name] = Parameter(shape, qtype, partial(_noise, name, shape, qtype, pool, seed))
    return Weights(parameters)


def _ones(name: str, shape: tuple[int, ...]) -> RawTensor:
    return RawTensor(name, shape, QuantType.F32, np.ones((math.prod(shape[:-1]), shape[-1]), "<f4").view(np.uint8))


def _noise(name: str, shape: tuple[int, ...], qtype: QuantType, pool: np.ndarray, seed: int) -> NoiseTensor:
    own = zlib.crc32(f"{seed}:{name}".encode())
    make = partial(_cut, shape, qtype, pool, own % _POOL_LENGTH)
    return NoiseTensor(name, shape, qtype, standard_deviation=STANDARD_DEVIATION, seed=own, make=make)


def _cut(shape: tuple[int, ...], qtype: QuantType, pool: np.ndarray, start: int) -> np.ndarray:
    count = math.prod(shape)
    values = np.empty((count, qtype.block_bytes), np.uint8)
    filled = 0
    while filled < count:
        piece = pool[start : start + count - filled]
        values[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), 0
    return values.reshape(math.prod(shape[:-1]), -1)
