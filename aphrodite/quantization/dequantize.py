"""Checkpoint tensors to float32, exactly as ggml defines each block layout (ggml-quants.c, ggml-common.h).

A block holds 32 values: a float16 scale d, for the `_1` types a float16 minimum m, for 5-bit types the
fifth bits as one 32-bit word, then the quants. Of 4-bit quants, byte j holds value j in its low half and
value j + 16 in its high half. Arithmetic is float32, one rounding an operation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aphrodite.quantization.types import QuantType, RawTensor


def dequantize(raw: RawTensor) -> np.ndarray:
    """The tensor's values, float32 of `raw.shape`; always a new array."""
    if raw.qtype.block_size == 1:
        return _dense(raw).reshape(raw.shape)
    blocks = np.ascontiguousarray(raw.data).reshape(-1, raw.qtype.block_bytes)
    values = np.empty((len(blocks), raw.qtype.block_size), np.float32)
    _BLOCKS[raw.qtype](blocks, values)
    return values.reshape(raw.shape)


def _dense(raw: RawTensor) -> np.ndarray:
    data = np.ascontiguousarray(raw.data)
    if raw.qtype is QuantType.BF16:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    dense: np.ndarray = data.view("<f2" if raw.qtype is QuantType.F16 else "<f4").astype(np.float32)
    return dense


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 `[blocks, 1]`."""
    column: np.ndarray = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)
    return column


def _low_and_high(quants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return quants & np.uint8(0x0F), quants >> np.uint8(4)


def _fifth_bits(blocks: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Bit 4 of values 0–15 and 16–31, in place (0 or 16), uint8 `[blocks, 16]` each."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits[:, :16], bits[:, 16:]


def _q4_0(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = _float16(blocks, 0)
    low, high = _low_and_high(blocks[:, 2:])
    np.multiply(low.view(np.int8) - np.int8(8), scale, out=values[:, :16])
    np.multiply(high.view(np.int8) - np.int8(8), scale, out=values[:, 16:])


def _q4_1(blocks: np.ndarray, values: np.ndarray) -> None:
    low, high = _low_and_high(blocks[:, 4:])
    np.multiply(low, _float16(blocks, 0), out=values[:, :16])
    np.multiply(high, _float16(blocks, 0), out=values[:, 16:])
    values += _float16(blocks, 2)


def _q5_0(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = _float16(blocks, 0)
    low, high = _low_and_high(blocks[:, 6:])
    low_fifth, high_fifth = _fifth_bits(blocks, 2)
    np.multiply((low | low_fifth).view(np.int8) - np.int8(16), scale, out=values[:, :16])
    np.multiply((high | high_fifth).view(np.int8) - np.int8(16), scale, out=values[:, 16:])


def _q5_1(blocks: np.ndarray, values: np.ndarray) -> None:
    scale = _float16(blocks, 0)
    low, high = _low_and_high(blocks[:, 8:])
    low_fifth, high_fifth = _fifth_bits(blocks, 4)
    np.multiply(low | low_fifth, scale, out=values[:, :16])
    np.multiply(high | high_fifth, scale, out=values[:, 16:])
    values += _float16(blocks, 2)


def _q8_0(blocks: np.ndarray, values: np.ndarray) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _float16(blocks, 0), out=values)


_BLOCKS: dict[QuantType, Callable[[np.ndarray, np.ndarray], None]] = {
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
}
