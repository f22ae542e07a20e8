"""ggml's K types and ternary types to float32: super-blocks of 256 values (block_q2_K … block_tq2_0 in ggml-common.h).

A K super-block holds a float16 scale d (and, for Q2_K, Q4_K and Q5_K, a float16 scale of minima), and of each group of
16 or 32 values an integer scale (and minimum). A value is d * scale * quant, less dmin * minimum. Each function takes
blocks, uint8 `[blocks, block_bytes]`, and writes float32 values `[blocks, 256]`.
"""

from __future__ import annotations

import numpy as np

from aphrodite.quantization.block_fields import half, nibbles, words

_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def q2_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """16 bytes of scales (low nibbles) and minima (high ones), 64 bytes of quants, d, dmin."""
    n = len(blocks)
    scale_codes, minimum_codes = nibbles(blocks[:, :16])
    scale = (half(blocks, 80) * scale_codes).reshape(n, 2, 4, 2, 1)
    quants = blocks[:, 16:80].reshape(n, 2, 2, 16)
    out = values.reshape(n, 2, 4, 2, 16)
    for plane in range(4):
        np.multiply(quants >> np.uint8(2 * plane) & np.uint8(3), scale[:, :, plane], out=out[:, :, plane])
    groups = values.reshape(n, 16, 16)
    groups -= (half(blocks, 82) * minimum_codes)[..., None]


def q3_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """32 bytes of third bits, 64 bytes of low pairs, 12 bytes of sixteen 6-bit scales, d."""
    n = len(blocks)
    low, high = nibbles(blocks[:, 96:104])
    pairs = (blocks[:, None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8) & np.uint8(3)).reshape(n, 16)
    codes = np.concatenate((low, high), axis=1) | pairs << np.uint8(4)
    scale = (half(blocks, 108) * (codes.view(np.int8) - np.int8(32))).reshape(n, 2, 4, 2, 1)
    quants = blocks[:, 32:96].reshape(n, 2, 2, 16)
    third_bits = blocks[:, :32].reshape(n, 2, 16)
    out = values.reshape(n, 2, 4, 2, 16)
    for half_block in range(2):
        for plane in range(4):
            third = (third_bits >> np.uint8(4 * half_block + plane) & np.uint8(1)) << np.uint8(2)
            low_bits = quants[:, half_block] >> np.uint8(2 * plane) & np.uint8(3)
            signed = (low_bits | third).view(np.int8) - np.int8(4)
            np.multiply(signed, scale[:, half_block, plane], out=out[:, half_block, plane])


def q4_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of quants."""
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    low, high = nibbles(blocks[:, 16:144].reshape(n, 4, 32))
    out = values.reshape(n, 4, 2, 32)
    np.multiply(low, scale[:, 0::2, None], out=out[:, :, 0])
    np.multiply(high, scale[:, 1::2, None], out=out[:, :, 1])
    groups = values.reshape(n, 8, 32)
    groups -= minimum[..., None]


def q5_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """d, dmin, 12 bytes of 6-bit scales and minima, 32 bytes of fifth bits, 128 bytes of quants."""
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    fifth_bits = blocks[:, 16:48]
    quants = nibbles(blocks[:, 48:176].reshape(n, 4, 32))
    out = values.reshape(n, 8, 32)
    for group in range(8):
        fifth = (fifth_bits >> np.uint8(group) & np.uint8(1)) << np.uint8(4)
        np.multiply(quants[group % 2][:, group // 2] | fifth, scale[:, group, None], out=out[:, group])
    out -= minimum[..., None]


def q6_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """128 bytes of low nibbles, 64 bytes of high pairs, sixteen int8 scales, d."""
    n = len(blocks)
    scale = (half(blocks, 208) * blocks[:, 192:208].view(np.int8)).reshape(n, 2, 4, 2, 1)
    quants = nibbles(blocks[:, :128].reshape(n, 2, 2, 2, 16))
    pairs = blocks[:, 128:192].reshape(n, 2, 2, 16)
    out = values.reshape(n, 2, 4, 2, 16)
    for plane in range(4):
        high = (pairs >> np.uint8(2 * plane) & np.uint8(3)) << np.uint8(4)
        signed = (quants[plane // 2][:, :, plane % 2] | high).view(np.int8) - np.int8(32)
        np.multiply(signed, scale[:, :, plane], out=out[:, :, plane])


def q8_k(blocks: np.ndarray, values: np.ndarray) -> None:
    """A float32 d, 256 int8 quants, sixteen int16 sums that only ggml's products need."""
    np.multiply(blocks[:, 4:260].view(np.int8), words(blocks, 0, 4, "<f4"), out=values)


def tq1_0(blocks: np.ndarray, values: np.ndarray) -> None:
    """Ternary digits, five a byte (48 bytes) and four a byte (4 bytes), then d.

    A byte is a number of base-3 digits as a fraction of 256: multiplied by 3^i (modulo 256), then by 3, its carry is
    digit i.
    """
    d, first = half(blocks, 52), 0
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        shifted = blocks[:, None, start:stop] * _POWERS_OF_3[:digits]
        trits = (shifted.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).astype(np.int8) - np.int8(1)
        count = digits * (stop - start)
        np.multiply(trits.reshape(len(blocks), count), d, out=values[:, first : first + count])
        first += count


def tq2_0(blocks: np.ndarray, values: np.ndarray) -> None:
    """Ternary digits, four a byte, then d."""
    n = len(blocks)
    d = half(blocks, 64)[..., None]
    quants = blocks[:, :64].reshape(n, 2, 32)
    out = values.reshape(n, 2, 4, 32)
    for plane in range(4):
        trits = (quants >> np.uint8(2 * plane) & np.uint8(3)).view(np.int8) - np.int8(1)
        np.multiply(trits, d, out=out[:, :, plane])


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of Q4_K and Q5_K: d * scale and dmin * minimum of the eight groups, float32 `[blocks, 8]` each.

    Of the twelve bytes from byte 4, four hold the scales of groups 0 to 3 in their low six bits, four the minima. The
    scales and minima of groups 4 to 7 have their low nibbles in the last four, their upper pairs above the others' six.
    """
    scales, minima, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    six, pair = np.uint8(0x3F), np.uint8(0x30)
    low_scales, low_minima = nibbles(low)
    scale = np.concatenate((scales & six, low_scales | scales >> np.uint8(2) & pair), axis=1)
    minimum = np.concatenate((minima & six, low_minima | minima >> np.uint8(2) & pair), axis=1)
    return half(blocks, 0) * scale, half(blocks, 2) * minimum
