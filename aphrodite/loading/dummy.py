"""Random weights for a model of which only the configuration is at hand (benchmarks, tests).

Never zeros: an idle multiplication is not what is to be measured, and uniform logits hide errors. On an accelerator
the values are others than on the host, made where they are needed.
"""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.parameters import parameter_shapes
from aphrodite.loading.weights import Parameter, Weights
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.dense_types import encode_dense
from aphrodite.quantization.packed import NoiseMatrix, PackedTensor
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor, StackedTensor

STANDARD_DEVIATION = 0.02
# Values are cut out of one pool of this prime length, so that large models are made at the speed of a
# copy while no two rows of a matrix begin at the same place.
_POOL_LENGTH = 1_048_573
_PACKINGS = {"awq": "AWQ", "gptq": "GPTQ"}


class GroupPacking(NamedTuple):
    """How AWQ and GPTQ quantize the matrices of the layers.

    Attributes:
        method: for people.
        bits: 4 or 8.
        group_size: inputs that share a scale; -1 for all.
        head: whether the output head is quantized, too.
    """

    method: str
    bits: int
    group_size: int
    head: bool


class BlockPacking(NamedTuple):
    """A GGUF file's types: `most`, and `more` for the head and what its quantizer thinks more of."""

    most: QuantType
    more: QuantType


Packing = GroupPacking | BlockPacking


_UNIFORM = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0",
)  # fmt: skip
_FILE_TYPES: dict[str, Packing] = {
    "Q4_K_M": BlockPacking(QuantType.Q4_K, QuantType.Q6_K),
    **{name: BlockPacking(QuantType[name], QuantType[name]) for name in _UNIFORM},
}


def packing_of(config: ConfigReader) -> Packing | None:
    """What `quantization_config` says, None where there is none.

    Beside AWQ and GPTQ that is {"quant_method": "gguf", "file_type": ...}, which no checkpoint has, with a type or
    Q4_K_M.

    Raises:
        ModelFormatError: another method, or bits or types that are not packed.
    """
    section = config.section("quantization_config")
    if section is None:
        return None
    method = section.read("quant_method", str, "")
    if method == "gguf":
        return section.choice("file_type", _FILE_TYPES, "")
    if method not in _PACKINGS:
        raise section.wrong("quant_method", "awq, gptq or gguf, of which dummy weights can be made", method)
    bits = section.read("bits", int)
    if bits not in (4, 8):
        raise section.wrong("bits", "4 or 8", bits)
    group_size = section.read("group_size", int, 128, low=-1, high=1 << 20)
    return GroupPacking(f"{_PACKINGS[method]} {bits}-bit", bits, group_size, section.read("lm_head", bool, False))


def dummy_weights(
    spec: ModelSpec, qtype: QuantType = QuantType.BF16, seed: int = 0, packing: Packing | None = None
) -> Weights:
    """Parameters of `spec`, each made when it is asked for and always the same for one seed.

    Matrices and biases are N(0, 0.02²), norms are 1.

    Args:
        qtype: F32, F16 or BF16.
        packing: of the layers' matrices, whose codes are uniform then, or of all; those stay dense whose inputs its
            groups do not divide.
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
        elif isinstance(packing, BlockPacking) and (kind := _block_type(name, shape, packing, spec.num_layers)):
            parameters[name] = Parameter(shape, kind, partial(_noise_in_blocks, name, shape, kind, seed))
        elif isinstance(packing, GroupPacking) and _is_packed(name, shape, packing):
            parameters[name] = _packed_noise(name, shape, qtype, packing, seed)
        else:
            parameters[name] = Parameter(shape, qtype, partial(_noise, name, shape, qtype, pool, seed))
    return Weights(parameters)


def _ones(name: str, shape: tuple[int, ...]) -> RawTensor:
    return RawTensor(name, shape, QuantType.F32, np.ones((math.prod(shape[:-1]), shape[-1]), "<f4").view(np.uint8))


def _is_packed(name: str, shape: tuple[int, ...], packing: GroupPacking) -> bool:
    projection = packing.head and name == "head.weight"
    projection |= name.startswith("layers.") and name.endswith(".weight") and "router" not in name
    return projection and len(shape) > 1 and packing.group_size != 0 and shape[-1] % abs(packing.group_size) == 0


def _packed_noise(name: str, shape: tuple[int, ...], qtype: QuantType, packing: GroupPacking, seed: int) -> Parameter:
    """A matrix, or one for each expert."""
    columns = shape[-1]
    group_size = columns if packing.group_size == -1 else packing.group_size
    matrices = [
        NoiseMatrix(
            packing.method,
            (shape[-2], columns),
            packing.bits,
            group_size,
            STANDARD_DEVIATION,
            zlib.crc32(f"{seed}:{name}:{number}".encode()),
        )
        for number in range(math.prod(shape[:-2]))
    ]

    def load() -> RawTensor:
        tensors = [PackedTensor(name, qtype, matrix) for matrix in matrices]
        return tensors[0] if len(shape) == 2 else StackedTensor(name, tensors)

    return Parameter(shape, qtype, load, matrices[0])


def _block_type(name: str, shape: tuple[int, ...], packing: BlockPacking, num_layers: int) -> QuantType | None:
    """A matrix's type, None where it stays dense."""
    kind = packing.more if _counts_more(name, num_layers) else packing.most
    stack = ".expert_" in name or name.endswith((".k_b.weight", ".v_b.weight"))
    matrix = name.endswith(".weight") and (len(shape) == 2 or stack) and "router" not in name
    return kind if matrix and shape[-1] % kind.block_size == 0 else None


def _counts_more(name: str, num_layers: int) -> bool:
    """Whether a K-quant mixture gives a matrix its finer type: the head, and of some layers v and down (llama.cpp)."""
    parts = name.split(".")
    if parts[0] != "layers":
        return parts[0] == "head"
    layer, eighth = int(parts[1]), num_layers // 8
    chosen = layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    return chosen and parts[2] in ("v", "down", "shared_down", "expert_down")


def _noise_in_blocks(name: str, shape: tuple[int, ...], qtype: QuantType, seed: int) -> NoiseTensor:
    own = zlib.crc32(f"{seed}:{name}".encode())

    def make() -> np.ndarray:
        import torch  # which opening a checkpoint does without

        from aphrodite.quantization.noise import noise_blocks

        rows = math.prod(shape[:-1])
        data: np.ndarray = noise_blocks(qtype, (rows, shape[-1]), STANDARD_DEVIATION, own, torch.device("cpu")).numpy()
        return data

    return NoiseTensor(name, shape, qtype, standard_deviation=STANDARD_DEVIATION, seed=own, make=make)


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
