"""The fields of GGUF blocks as tensors: codes of up to eight bits, and what scales and shifts them.

Layouts are those of ggml-common.h (see `dequantize.py`, `kquants.py`). Nothing is multiplied or rounded: a field keeps
its bits, only 6-bit scales take a byte each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.quantization import codebooks
from aphrodite.quantization.types import QuantType


class BlockFields(NamedTuple):
    """Fields of n blocks; per group of inputs unless said otherwise.

    A value is scale * (code - zero) - offset, where scale = super_scale * scales and offset = super_offset * offsets;
    factors that a type does not have count as 1, and with a table of numbers code means table[code].
    """

    codes: torch.Tensor  # [n, block] uint8
    scales: torch.Tensor  # [n, groups], int8 where there is a super_scale; of Q2_K (scale, offset) nibbles
    super_scale: torch.Tensor | None = None  # [n, 1] float16
    offsets: torch.Tensor | None = None  # [n, groups] float16, int8 where there is a super_offset
    super_offset: torch.Tensor | None = None  # [n, 1] float16


class BlockForm(NamedTuple):
    """What the fields of a type are."""

    unpack: Callable[[torch.Tensor], BlockFields]  # of blocks, uint8 [n, block_bytes]
    low_bits: int  # of a code, in the first plane
    high_bits: int  # the rest
    group_size: int
    halves: tuple[int, ...] = (0,)  # bytes at which its float16 factors begin: of the scale, then of the offset
    zero: int = 0
    table: np.ndarray | None = None  # [16] float32


def _halves(blocks: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return blocks[:, start:stop].contiguous().view(torch.float16)


def _split_nibbles(quants: torch.Tensor) -> torch.Tensor:
    """Low nibbles of each run of bytes `[..., bytes]`, then the high ones: `[..., 2, bytes]`."""
    return torch.stack((quants & 15, quants >> 4), dim=-2)


def _q4_0(blocks: torch.Tensor) -> BlockFields:
    return BlockFields(_split_nibbles(blocks[:, 2:]).flatten(1), _halves(blocks, 0, 2))


def _q4_1(blocks: torch.Tensor) -> BlockFields:
    minima = _halves(blocks, 2, 4).neg()
    return BlockFields(_split_nibbles(blocks[:, 4:]).flatten(1), _halves(blocks, 0, 2), offsets=minima)


def _fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Bit 4 of 32 values, in its place."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (blocks[:, start : start + 4, None] >> shifts & 1).flatten(1) << 4


def _q5_0(blocks: torch.Tensor) -> BlockFields:
    codes = _split_nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks, 2)
    return BlockFields(codes, _halves(blocks, 0, 2))


def _q5_1(blocks: torch.Tensor) -> BlockFields:
    codes = _split_nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks, 4)
    return BlockFields(codes, _halves(blocks, 0, 2), offsets=_halves(blocks, 2, 4).neg())


def _q8_0(blocks: torch.Tensor) -> BlockFields:
    return BlockFields(blocks[:, 2:] ^ 128, _halves(blocks, 0, 2))


def _q2_k(blocks: torch.Tensor) -> BlockFields:
    return BlockFields(
        _pairs(blocks[:, 16:80]),
        blocks[:, :16].view(torch.int8),
        _halves(blocks, 80, 82),
        None,
        _halves(blocks, 82, 84),
    )


def _q3_k(blocks: torch.Tensor) -> BlockFields:
    low, high = blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    upper = (blocks[:, None, 104:108] >> shifts[:, None] & 3).flatten(1) << 4
    scales = (torch.cat((low, high), dim=1) | upper).view(torch.int8) - 32
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    third = (blocks[:, None, :32] >> bits[:, None] & 1).flatten(1) << 2
    return BlockFields(_pairs(blocks[:, 32:96]) | third, scales, _halves(blocks, 108, 110))


def _q4_k(blocks: torch.Tensor) -> BlockFields:
    scales, minima = _scales_and_minima(blocks)
    codes = _split_nibbles(blocks[:, 16:144].unflatten(1, (4, 32))).flatten(1)
    return BlockFields(codes, scales, _halves(blocks, 0, 2), minima, _halves(blocks, 2, 4))


def _q5_k(blocks: torch.Tensor) -> BlockFields:
    scales, minima = _scales_and_minima(blocks)
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = (blocks[:, None, 16:48] >> bits[:, None] & 1).flatten(1) << 4
    codes = _split_nibbles(blocks[:, 48:176].unflatten(1, (4, 32))).flatten(1) | fifth
    return BlockFields(codes, scales, _halves(blocks, 0, 2), minima, _halves(blocks, 2, 4))


def _q6_k(blocks: torch.Tensor) -> BlockFields:
    low = _split_nibbles(blocks[:, :128].unflatten(1, (2, 64))).flatten(1)
    codes = low | _pairs(blocks[:, 128:192]) << 4
    return BlockFields(codes, blocks[:, 192:208].contiguous().view(torch.int8), _halves(blocks, 208, 210))


def _iq4_xs(blocks: torch.Tensor) -> BlockFields:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    upper = (blocks[:, 2:4, None] >> shifts & 3).flatten(1) << 4
    lower = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    codes = _split_nibbles(blocks[:, 8:136].unflatten(1, (8, 16))).flatten(1)
    return BlockFields(codes, (lower | upper).view(torch.int8) - 32, _halves(blocks, 0, 2))


def _mxfp4(blocks: torch.Tensor) -> BlockFields:
    # Powers of two fit bfloat16; 2^-128 and 2^-127, half of which the doubled codebook takes, as subnormal numbers.
    exponent = blocks[:, :1].to(torch.int16)
    bits = torch.where(exponent < 2, 32 << exponent.clamp(max=1), exponent - 1 << 7)
    return BlockFields(_split_nibbles(blocks[:, 1:]).flatten(1), bits.view(torch.bfloat16))


def _tq2_0(blocks: torch.Tensor) -> BlockFields:
    return BlockFields(_pairs(blocks[:, :64]), _halves(blocks, 64, 66))


def _pairs(quants: torch.Tensor) -> torch.Tensor:
    """Two bits of 256 values: of each 32 bytes the lowest pairs, then the next."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=quants.device)
    planes: torch.Tensor = quants.unflatten(1, (2, 1, 32)) >> shifts[:, None] & 3
    return planes.flatten(1)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 6-bit scales and minima of Q4_K and Q5_K, int8 `[n, 8]` each (see `kquants.py`)."""
    scales, minima, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((scales & 63, low & 15 | scales >> 2 & 48), dim=1)
    minimum = torch.cat((minima & 63, low >> 4 | minima >> 2 & 48), dim=1)
    return scale.view(torch.int8), minimum.view(torch.int8)


BLOCK_FORMS = {
    QuantType.Q4_0: BlockForm(_q4_0, 4, 0, 32, zero=8),
    QuantType.Q4_1: BlockForm(_q4_1, 4, 0, 32, halves=(0, 2)),
    QuantType.Q5_0: BlockForm(_q5_0, 4, 1, 32, zero=16),
    QuantType.Q5_1: BlockForm(_q5_1, 4, 1, 32, halves=(0, 2)),
    QuantType.Q8_0: BlockForm(_q8_0, 8, 0, 32, zero=128),
    QuantType.Q2_K: BlockForm(_q2_k, 2, 0, 16, halves=(80, 82)),
    QuantType.Q3_K: BlockForm(_q3_k, 2, 1, 16, halves=(108,), zero=4),
    QuantType.Q4_K: BlockForm(_q4_k, 4, 0, 32, halves=(0, 2)),
    QuantType.Q5_K: BlockForm(_q5_k, 4, 1, 32, halves=(0, 2)),
    QuantType.Q6_K: BlockForm(_q6_k, 4, 2, 16, halves=(208,), zero=32),
    QuantType.IQ4_NL: BlockForm(_q4_0, 4, 0, 32, table=codebooks.IQ4_VALUES),
    QuantType.IQ4_XS: BlockForm(_iq4_xs, 4, 0, 32, table=codebooks.IQ4_VALUES),
    QuantType.MXFP4: BlockForm(_mxfp4, 4, 0, 32, halves=(), table=codebooks.MXFP4_VALUES),
    QuantType.TQ2_0: BlockForm(_tq2_0, 2, 0, 256, halves=(64,), zero=1),
}
"""The types whose values are codes of their own. Those that name points of a grid are in `grid_fields.py`."""
