"""Random blocks of the GGUF types that the gguf package cannot quantize into, with fields that make sense."""

from __future__ import annotations

import numpy as np

from aphrodite.quantization.types import QuantType, RawTensor

# Byte of the float16 d, byte of the float16 dmin, of a type's block. IQ1_M has the nibbles of d above its scales.
UNITS = {
    QuantType.Q2_K: (80, 82),
    QuantType.Q3_K: (108, None),
    QuantType.Q4_K: (0, 2),
    QuantType.Q5_K: (0, 2),
    QuantType.Q6_K: (208, None),
    QuantType.IQ4_NL: (0, None),
    QuantType.IQ4_XS: (0, None),
    QuantType.TQ1_0: (52, None),
    QuantType.TQ2_0: (64, None),
    QuantType.IQ1_S: (0, None),
    QuantType.IQ2_XXS: (0, None),
    QuantType.IQ2_XS: (0, None),
    QuantType.IQ2_S: (0, None),
    QuantType.IQ3_XXS: (0, None),
    QuantType.IQ3_S: (0, None),
}
IQ1_M_UNIT = (49, 51, 53, 55)  # bytes whose high nibbles are d, the lowest first
# Root mean square of a value over d, where scales and quants are uniformly random and minima balance them.
_SPREAD = {
    QuantType.Q2_K: 9.8,
    QuantType.Q3_K: 42.3,
    QuantType.Q4_K: 168.0,
    QuantType.Q5_K: 336.0,
    QuantType.Q6_K: 1365.0,
    QuantType.IQ4_NL: 69.0,
    QuantType.IQ4_XS: 1274.0,
    QuantType.TQ1_0: 0.82,
    QuantType.TQ2_0: 1.22,
    QuantType.IQ1_S: 7.2,
    QuantType.IQ1_M: 7.2,
    QuantType.IQ2_XXS: 53.0,
    QuantType.IQ2_XS: 56.0,
    QuantType.IQ2_S: 56.0,
    QuantType.IQ3_XXS: 142.0,
    QuantType.IQ3_S: 140.0,
}
# The mean of a quant.
_CENTER = {QuantType.Q2_K: 1.5, QuantType.Q4_K: 7.5, QuantType.Q5_K: 15.5}
GRIDS = tuple(qtype for qtype in _SPREAD if qtype.name.startswith(("IQ1", "IQ2", "IQ3")))
MADE = (*UNITS, QuantType.IQ1_M, QuantType.MXFP4)


def random_blocks(
    qtype: QuantType, shape: tuple[int, int], deviation: float, *, balanced: bool = True, seed: int = 0, name: str = "w"
) -> RawTensor:
    """A matrix of random bytes whose values spread by about `deviation`.

    `balanced` gives every minimum its scale's code, so that values lie about zero as those of a model do; without it
    all codes are random.
    """
    generator = np.random.default_rng(seed)
    rows, columns = shape
    blocks = generator.integers(0, 256, (rows * columns // qtype.block_size, qtype.block_bytes), np.uint8)
    if qtype is QuantType.MXFP4:
        exponent = 128 + round(np.log2(deviation / 5.5))
        blocks[:, 0] = generator.integers(exponent - 1, exponent + 2, len(blocks))
    else:
        unit = deviation / _SPREAD[qtype] * generator.uniform(0.7, 1.3, len(blocks))
        low = unit.astype("<f2").astype(np.float32) * _CENTER.get(qtype, 0.0)
        set_units(qtype, blocks, unit, low)
        if balanced and qtype in _CENTER:
            _balance(qtype, blocks)
    return RawTensor(name, shape, qtype, blocks.reshape(rows, -1))


def set_units(qtype: QuantType, blocks: np.ndarray, d: np.ndarray | float, dmin: np.ndarray | float) -> None:
    """Writes the blocks' d and, where the type has one, dmin."""
    if qtype is QuantType.IQ1_M:
        bits = np.broadcast_to(np.asarray(d, np.float16), len(blocks)).copy().view(np.uint16)
        for index, byte in enumerate(IQ1_M_UNIT):
            blocks[:, byte] = blocks[:, byte] & 15 | (bits >> 4 * index & 15).astype(np.uint8) << 4
        return
    for place, value in zip(UNITS[qtype], (d, dmin), strict=True):
        if place is not None:
            halves = np.broadcast_to(np.asarray(value, "<f2"), len(blocks))
            blocks[:, place : place + 2] = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 2)


def _balance(qtype: QuantType, blocks: np.ndarray) -> None:
    """Minima get the codes of their scales."""
    if qtype is QuantType.Q2_K:
        blocks[:, :16] = blocks[:, :16] & 15 | blocks[:, :16] << 4
    else:
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = blocks[:, 12:16] & 15 | blocks[:, 12:16] << 4
