"""Random blocks of the GGUF types that the gguf package cannot quantize into, with fields that make sense."""

from __future__ import annotations

import numpy as np

from aphrodite.quantization.types import QuantType, RawTensor

# Byte of the float16 d, byte of the float16 dmin, of a type's block.
UNITS = {
    QuantType.Q2_K: (80, 82),
    QuantType.Q3_K: (108, None),
    QuantType.Q4_K: (0, 2),
    QuantType.Q5_K: (0, 2),
    QuantType.Q6_K: (208, None),
    QuantType.IQ4_NL: (0, None),
    QuantType.IQ4_XS: (0, None),
}
# Root mean square of a value over d, where scales and quants are uniformly random and minima balance them.
_SPREAD = {
    QuantType.Q2_K: 9.8,
    QuantType.Q3_K: 42.3,
    QuantType.Q4_K: 168.0,
    QuantType.Q5_K: 336.0,
    QuantType.Q6_K: 1365.0,
    QuantType.IQ4_NL: 69.0,
    QuantType.IQ4_XS: 1274.0,
}
# The mean of a quant.
_CENTER = {QuantType.Q2_K: 1.5, QuantType.Q4_K: 7.5, QuantType.Q5_K: 15.5}
MADE = (*UNITS, QuantType.MXFP4)


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
        d, dmin = UNITS[qtype]
        unit = deviation / _SPREAD[qtype] * generator.uniform(0.7, 1.3, len(blocks))
        blocks[:, d : d + 2] = unit.astype("<f2").view(np.uint8).reshape(-1, 2)
        if dmin is not None:
            low = unit.astype("<f2").astype(np.float32) * _CENTER[qtype]
            blocks[:, dmin : dmin + 2] = low.astype("<f2").view(np.uint8).reshape(-1, 2)
            if balanced:
                _balance(qtype, blocks)
    return RawTensor(name, shape, qtype, blocks.reshape(rows, -1))


def _balance(qtype: QuantType, blocks: np.ndarray) -> None:
    """Minima get the codes of their scales."""
    if qtype is QuantType.Q2_K:
        blocks[:, :16] = blocks[:, :16] & 15 | blocks[:, :16] << 4
    else:
        blocks[:, 8:12] = blocks[:, 4:8]
        blocks[:, 12:16] = blocks[:, 12:16] & 15 | blocks[:, 12:16] << 4
