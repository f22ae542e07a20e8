"""Checkpoint tensors to float32, exactly as ggml defines each block layout (ggml-quants.c, ggml-common.h).

Here are the types with blocks of 32 values: a float16 scale d, for the `_1` types a float16 minimum m, for 5-bit types
the fifth bits as one 32-bit word, then the quants. Of 4-bit quants, byte j holds value j in its low half and value
j + 16 in its high half. The others are in `kquants.py` and `iquants.py`. Arithmetic is float32, one rounding an
operation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aphrodite.quantization import iquants, kquants
from aphrodite.quantization.block_fields import half, nibbles
from aphrodite.quantization.dense_types import numbers_of, to_float32
from aphrodite.quantization.packed import PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor

_PIECE_VALUES = 64 * 1024  # expanded at a time: what lies between the operations on them stays in a core's cache


def dequantize(raw: RawTensor) -> np.ndarray:
    """The tensor's values, float32 of `raw.shape`; always a new array."""
    if isinstance(raw, PackedTensor):
        return raw.expand()
    if raw.qtype.block_size == 1:
        return np.array(to_float32(numbers_of(raw), raw.qtype))
    blocks = np.ascontiguousarray(raw.data).reshape(-1, raw.qtype.block_bytes)
    values = np.empty((len(blocks), raw.qtype.block_size), np.float32)
    expand, step = _BLOCKS[raw.qtype], _PIECE_VALUES // raw.qtype.block_size
    for first in range(0, len(blocks), step):
        expand(blocks[first : first + step], values[first : first + step])
    return values.reshape(raw.shape)


def _fifth_bits(blocks: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit 4 of values 0–15 and 16–31, in place (0 or 16), uint8 `[blocks, 16]` each."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits[:, :16], bits[:, 16:]


def _q4_0(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = half(blocks, 0)
    low, high = nibbles(blocks[:, 2:])
    np.multiply(low.view(np.int8) - np.int8(8), scale, out=values[:, :16])
    np.multiply(high.view(np.int8) - np.int8(8), scale, out=values[:, 16:])


def _q4_1(blocks: np.ndarray, values: np.ndarray) -> None:
    low, high = nibbles(blocks[:, 4:])
    np.multiply(low, half(blocks, 0), out=values[:, :16])
    np.multiply(high, half(blocks, 0), out=values[:, 16:])
    values += half(blocks, 2)


def _q5_0(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = half(blocks, 0)
    low, high = nibbles(blocks[:, 6:])
    low_fifth, high_fifth = _fifth_bits(blocks, 2)
    np.multiply((low | low_fifth).view(np.int8) - np.int8(16), scale, out=values[:, :16])
    np.multiply((high | high_fifth).view(np.int8) - np.int8(16), scale, out=values[:, 16:])


def _q5_1(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = half(blocks, 0)
    low, high = nibbles(blocks[:, 8:])
    low_fifth, high_fifth = _fifth_bits(blocks, 4)
    np.multiply(low | low_fifth, scale, out=values[:, :16])
    np.multiply(high | high_fifth, scale, out=values[:, 16:])
    values += half(blocks, 2)


def _q8_0(blocks: np.ndarray, values: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), half(blocks, 0), out=values)


_BLOCKS: dict[QuantType, Callable[[np.ndarray, np.ndarray], None]] = {
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
    QuantType.Q2_K: kquants.q2_k,
    QuantType.Q3_K: kquants.q3_k,
    QuantType.Q4_K: kquants.q4_k,
    QuantType.Q5_K: kquants.q5_k,
    QuantType.Q6_K: kquants.q6_k,
    QuantType.Q8_K: kquants.q8_k,
    QuantType.TQ1_0: kquants.tq1_0,
    QuantType.TQ2_0: kquants.tq2_0,
    QuantType.IQ2_XXS: iquants.iq2_xxs,
    QuantType.IQ2_XS: iquants.iq2_xs,
    QuantType.IQ2_S: iquants.iq2_s,
    QuantType.IQ3_XXS: iquants.iq3_xxs,
    QuantType.IQ3_S: iquants.iq3_s,
    QuantType.IQ1_S: iquants.iq1_s,
    QuantType.IQ1_M: iquants.iq1_m,
    QuantType.IQ4_NL: iquants.iq4_nl,
    QuantType.IQ4_XS: iquants.iq4_xs,
    QuantType.MXFP4: iquants.mxfp4,
}
