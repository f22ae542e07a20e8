"""ggml's codebook types to float32 (block_iq2_xxs … block_mxfp4 in ggml-common.h).

IQ1 to IQ3 name points of a grid (`codebooks.py`) by their number, give each coordinate a sign (IQ1: shift all of a
group by an eighth), and scale groups of 16 or 32 values; IQ4 and MXFP4 name one value of sixteen. Each function takes
blocks, uint8 `[blocks, block_bytes]`, and writes float32 values `[blocks, block_size]`.
"""

from __future__ import annotations

import numpy as np

from aphrodite.quantization import codebooks
from aphrodite.quantization.block_fields import half, interleaved_nibbles, nibbles, words

_SIGN_SHIFTS = np.array([0, 7, 14, 21], np.uint32)
_IQ1_SHIFT = np.float32(0.125)


def iq2_xxs(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, then for each 32 values four bytes of points and a word of 4 x 7 bits of signs and 4 bits of scale."""
    pairs = words(blocks, 2, 66, "<u4").reshape(len(blocks), 8, 2)
    points = np.ascontiguousarray(pairs[..., 0]).view(np.uint8)
    scale = half(blocks, 0) * (np.float32(0.5) + _top_nibble(pairs[..., 1])) * np.float32(0.25)
    _signed_points(codebooks.iq2_xxs_grid(), points, _packed_signs(pairs[..., 1]), scale, values)


def iq2_xs(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 32 words of 9 bits of point and 7 bits of signs, sixteen 4-bit scales."""
    codes = words(blocks, 2, 66, "<u2")
    scale = half(blocks, 0) * (np.float32(0.5) + interleaved_nibbles(blocks[:, 66:74])) * np.float32(0.25)
    signs = codebooks.even_signs()[codes >> np.uint16(9)]
    _signed_points(codebooks.iq2_xs_grid(), codes & np.uint16(511), signs, scale, values)


def iq2_s(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 32 bytes of points, 32 of signs, 8 of the points' ninth and tenth bits, sixteen 4-bit scales."""
    high = blocks[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
    points = _with_high_bits(blocks[:, 2:34], high)
    scale = half(blocks, 0) * (np.float32(0.5) + interleaved_nibbles(blocks[:, 74:82])) * np.float32(0.25)
    _signed_points(codebooks.iq2_s_grid(), points, codebooks.signs()[blocks[:, 34:66]], scale, values)


def iq3_xxs(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 64 bytes of points, for each 32 values a word of 4 x 7 bits of signs and 4 bits of scale."""
    packed = words(blocks, 66, 98, "<u4")
    scale = half(blocks, 0) * (np.float32(0.5) + _top_nibble(packed)) * np.float32(0.5)
    _signed_points(codebooks.iq3_xxs_grid(), blocks[:, 2:66], _packed_signs(packed), scale, values)


def iq3_s(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 64 bytes of points, 8 of the points' ninth bits, 32 of signs, eight 4-bit scales."""
    points = _with_high_bits(blocks[:, 2:66], np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little"))
    scale = half(blocks, 0) * (np.uint8(1) + np.uint8(2) * interleaved_nibbles(blocks[:, 106:110]))
    _signed_points(codebooks.iq3_s_grid(), points, codebooks.signs()[blocks[:, 74:106]], scale, values)


def iq1_s(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 32 bytes of points, eight words of 4 x 3 upper bits of points, 3 bits of scale and the sign of the shift."""
    n = len(blocks)
    high = words(blocks, 34, 50, "<u2")
    points = _with_high_bits(blocks[:, 2:34], high[..., None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7))
    scale = half(blocks, 0) * (np.uint16(2) * (high >> np.uint16(12) & np.uint16(7)) + np.uint16(1))
    shift = np.where(high & np.uint16(0x8000), -_IQ1_SHIFT, _IQ1_SHIFT)
    out = values.reshape(n, 8, 32)
    np.add(codebooks.iq1_grid()[points].reshape(n, 8, 32), shift[..., None], out=out)
    out *= scale[..., None]


def iq1_m(blocks: np.ndarray, values: np.ndarray) -> None:
    """32 bytes of points, 32 nibbles of 3 upper bits of a point and the sign of its shift, four words of 4 x 3 bits of
    scale; the words' top nibbles are d."""
    n = len(blocks)
    packed = words(blocks, 48, 56, "<u2")
    bits = np.bitwise_or.reduce((packed & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16), axis=1)
    d = bits.view("<f2").astype(np.float32)[:, None]
    codes = (packed[..., None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)).reshape(n, 16)
    scale = d * (np.uint16(2) * codes + np.uint16(1))
    high = interleaved_nibbles(blocks[:, 32:48])
    points = _with_high_bits(blocks[:, :32], high & np.uint8(7))
    shift = np.where(high & np.uint8(8), -_IQ1_SHIFT, _IQ1_SHIFT)
    shifted = values.reshape(n, 32, 8)
    np.add(codebooks.iq1_grid()[points], shift[..., None], out=shifted)
    groups = values.reshape(n, 16, 16)
    groups *= scale[..., None]


def iq4_nl(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, 16 bytes: low nibbles are values 0 to 15, high ones 16 to 31."""
    d = half(blocks, 0)
    for first, codes in zip((0, 16), nibbles(blocks[:, 2:]), strict=True):
        np.multiply(codebooks.IQ4_VALUES[codes], d, out=values[:, first : first + 16])


def iq4_xs(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, a word of the upper pairs and four bytes of the low nibbles of eight 6-bit scales, 128 bytes of quants."""
    n = len(blocks)
    pairs = words(blocks, 2, 4, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    codes = interleaved_nibbles(blocks[:, 4:8]) | pairs.astype(np.uint8) << np.uint8(4)
    scale = half(blocks, 0) * (codes.view(np.int8) - np.int8(32))
    out = values.reshape(n, 8, 2, 16)
    for index, quants in enumerate(nibbles(blocks[:, 8:136].reshape(n, 8, 16))):
        np.multiply(codebooks.IQ4_VALUES[quants], scale[..., None], out=out[:, :, index])


def mxfp4(blocks: np.ndarray, values: np.ndarray) -> None:
    """A power of two (e8m0), 16 bytes of e2m1: low nibbles are values 0 to 15, high ones 16 to 31."""
    exponent = blocks[:, :1].astype(np.uint32)
    # Half of 2^(e - 127), for the codebook is doubled; the two smallest are subnormal.
    normal = np.maximum(exponent, np.uint32(1)) - np.uint32(1) << np.uint32(23)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, normal)
    d = bits.view(np.float32)
    for first, codes in zip((0, 16), nibbles(blocks[:, 1:]), strict=True):
        np.multiply(codebooks.MXFP4_VALUES[codes], d, out=values[:, first : first + 16])


def _top_nibble(packed: np.ndarray) -> np.ndarray:
    scale: np.ndarray = (packed >> np.uint32(28)).astype(np.float32)
    return scale


def _packed_signs(packed: np.ndarray) -> np.ndarray:
    """Of words `[blocks, 8]`: four times 7 bits each, float32 `[blocks, 8, 4, 8]`."""
    signs: np.ndarray = codebooks.even_signs()[packed[..., None] >> _SIGN_SHIFTS & np.uint32(0x7F)]
    return signs


def _with_high_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Numbers of points from their low bytes `[blocks, points]` and their upper bits, in the same order."""
    numbers: np.ndarray = low | high.reshape(low.shape).astype(np.uint16) << np.uint16(8)
    return numbers


def _signed_points(
    grid: np.ndarray, points: np.ndarray, signs: np.ndarray, scale: np.ndarray, values: np.ndarray
) -> None:
    """Writes scale * sign * coordinate, for `scale` `[blocks, groups]`; groups are of equal size."""
    np.multiply(grid[points].reshape(values.shape), signs.reshape(values.shape), out=values)
    groups = values.reshape(*scale.shape, -1)
    groups *= scale[..., None]
