"""GGUF blocks that name points of a grid, as the numbers that GPU kernels read (`kernels/triton/packed_grid.py`).

IQ1, IQ2 and IQ3 give eight columns the number of a point, or of two, and signs or a shift (`iquants.py`); TQ1_0's
eight ternary digits are the number of one of 3^8 points. A word stands for eight columns, four words for a run of 32.
All that a run is made of lies in a few numbers, with the bits that it has in the file.

Signs are stored so that kernels come to them in few operations. Those of IQ2 and IQ3_XXS take turns, column 0, 4, 1,
5, ...: a multiplication then brings the four of a register to its bytes. Where the file has seven signs, of which the
eighth makes an even number negative, each stored bit is the parity of the signs so far, and a sign the difference of
two neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch

from aphrodite.quantization import codebooks
from aphrodite.quantization.types import QuantType

GridKind = Literal["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0"]


class GridFields(NamedTuple):
    """Fields of n blocks of 256 values; of each of their 8 runs unless said otherwise.

    A value is d * unit * (2 s + 1) * (coordinate + shift), with the sign, for a stored scale s.
    """

    low: torch.Tensor  # [n, 8] int64 or int32: numbers of points, of IQ2 signs above them
    high: torch.Tensor | None  # [n, 8] int32: signs; int16, uint8: upper bits of numbers and shifts
    scales: torch.Tensor | None  # [n, 8] int16, uint8: s of a run or its halves; of TQ1_0 [n, 1] int32: top bits
    super_scale: torch.Tensor  # [n, 1] float16, d


class GridForm(NamedTuple):
    """How a type is read."""

    kind: GridKind
    unpack: Callable[[torch.Tensor], GridFields]  # of blocks, uint8 [n, block_bytes]
    group_size: int
    halves: tuple[int, ...]  # bytes at which d begins; none where it is scattered


def _numbers(blocks: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as little-endian numbers, `[n, numbers]`."""
    return blocks[:, start:stop].clone(memory_format=torch.contiguous_format).view(dtype)


def _taking_turns(signs: torch.Tensor) -> torch.Tensor:
    """Bits 0 to 3 at even places, 4 to 7 at odd ones; int64."""
    placed = torch.zeros_like(signs, dtype=torch.int64)
    for column in range(8):
        placed |= (signs.long() >> column & 1) << (2 * (column % 4) + column // 4)
    return placed


def _as_parities(signs: torch.Tensor) -> torch.Tensor:
    """Of seven signs in a number the parities so far, in the order of `_taking_turns`; int64."""
    # Seven signs in turns are bits 0 to 6, the eighth is the last there, too.
    found = _taking_turns(signs)
    for shift in (1, 2, 4):
        found = found ^ found << shift
    return found & 127


def _joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers of the last dimension, `bits` bits each, the first one lowest: int64."""
    return (parts.long() << torch.arange(0, bits * parts.shape[-1], bits, device=parts.device)).sum(dim=-1)


def _sevens(packed: torch.Tensor) -> torch.Tensor:
    """Of words with four times seven signs and a scale `[n, 8]` the same with parities: int64."""
    places = torch.arange(0, 28, 7, dtype=torch.int32, device=packed.device)
    parities = _as_parities(packed[..., None] >> places & 127)
    return _joined(parities, 7) | (packed.long() >> 28 & 15) << 28


def _iq2_xxs(blocks: torch.Tensor) -> GridFields:
    pairs = _numbers(blocks, 2, 66, torch.int32).unflatten(1, (8, 2))
    low = pairs[..., 0].long() & 0xFFFFFFFF | _sevens(pairs[..., 1]) << 32
    return GridFields(low, None, None, _numbers(blocks, 0, 2, torch.float16))


def _iq2_xs(blocks: torch.Tensor) -> GridFields:
    codes = _numbers(blocks, 2, 66, torch.int16).int()
    words = codes & 511 | _as_parities(codes >> 9 & 127) << 9
    low = _joined(words.unflatten(1, (8, 4)), 16)
    return GridFields(low, None, blocks[:, 66:74], _numbers(blocks, 0, 2, torch.float16))


def _iq2_s(blocks: torch.Tensor) -> GridFields:
    signs = _joined(_taking_turns(blocks[:, 34:66]).unflatten(1, (8, 4)), 8)
    low = _joined(blocks[:, 2:34].unflatten(1, (8, 4)), 8) | signs << 32
    return GridFields(low, blocks[:, 66:74], blocks[:, 74:82], _numbers(blocks, 0, 2, torch.float16))


def _iq3_xxs(blocks: torch.Tensor) -> GridFields:
    signs = _sevens(_numbers(blocks, 66, 98, torch.int32)).to(torch.int32)
    return GridFields(_numbers(blocks, 2, 66, torch.int64), signs, None, _numbers(blocks, 0, 2, torch.float16))


def _iq3_s(blocks: torch.Tensor) -> GridFields:
    scales = torch.stack((blocks[:, 106:110] & 15, blocks[:, 106:110] >> 4), dim=-1).flatten(1)
    return GridFields(
        _numbers(blocks, 2, 66, torch.int64),
        _numbers(blocks, 74, 106, torch.int32),
        blocks[:, 66:74] | scales.to(torch.int16) << 8,
        _numbers(blocks, 0, 2, torch.float16),
    )


def _iq1_s(blocks: torch.Tensor) -> GridFields:
    low, high = _numbers(blocks, 2, 34, torch.int32), _numbers(blocks, 34, 50, torch.int16)
    return GridFields(low, high, None, _numbers(blocks, 0, 2, torch.float16))


def _iq1_m(blocks: torch.Tensor) -> GridFields:
    packed = _numbers(blocks, 48, 56, torch.int16).int() & 0xFFFF
    d = _joined(packed >> 12, 4).to(torch.int16)[:, None].view(torch.float16)
    first = packed[..., None] >> torch.tensor([0, 6], dtype=torch.int32, device=blocks.device)
    scales = (first & 7 | (first >> 3 & 7) << 4).to(torch.uint8).flatten(1)
    return GridFields(_numbers(blocks, 0, 32, torch.int32), _numbers(blocks, 32, 48, torch.int16), scales, d)


def _tq1_0(blocks: torch.Tensor) -> GridFields:
    digits = []
    for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = torch.tensor([3**place for place in range(count)], dtype=torch.int32, device=blocks.device)
        shifted = blocks[:, None, start:stop].int() * powers[:, None] & 255
        digits.append((shifted * 3 >> 8).flatten(1))
    places = torch.tensor([3**place for place in range(8)], dtype=torch.int32, device=blocks.device)
    numbers = (torch.cat(digits, dim=1).unflatten(1, (8, 4, 8)) * places).sum(dim=-1)
    return GridFields(
        _joined(numbers & 255, 8).to(torch.int32),
        _joined(numbers >> 8 & 15, 4).to(torch.int16),
        _joined((numbers >> 12).flatten(1), 1).to(torch.int32)[:, None],
        _numbers(blocks, 52, 54, torch.float16),
    )


GRID_FORMS = {
    QuantType.IQ1_S: GridForm("iq1_s", _iq1_s, 32, (0,)),
    QuantType.IQ1_M: GridForm("iq1_m", _iq1_m, 16, ()),
    QuantType.IQ2_XXS: GridForm("iq2_xxs", _iq2_xxs, 32, (0,)),
    QuantType.IQ2_XS: GridForm("iq2_xs", _iq2_xs, 16, (0,)),
    QuantType.IQ2_S: GridForm("iq2_s", _iq2_s, 16, (0,)),
    QuantType.IQ3_XXS: GridForm("iq3_xxs", _iq3_xxs, 32, (0,)),
    QuantType.IQ3_S: GridForm("iq3_s", _iq3_s, 32, (0,)),
    QuantType.TQ1_0: GridForm("tq1_0", _tq1_0, 256, (52,)),
}
"""The types whose values are points of a grid."""


@functools.cache
def grid_table(kind: GridKind, device: torch.device) -> torch.Tensor:
    """The points' coordinates as kernels take them, `[points]`; one for all matrices of `device`.

    Eight coordinates of IQ2 are an int64, four of IQ3_XXS an int32: a byte each, 192 more than the coordinate. Those of
    the others are nibbles: eight of IQ1 and TQ1_0 an int32, 8 more than four times the coordinate; four of IQ3_S an
    int16, 7.5 more than half of it.
    """
    if kind in ("iq1_s", "iq1_m"):
        return _packed(4 * codebooks.iq1_grid() + 8, 4, device)
    if kind == "tq1_0":
        numbers = np.arange(3**8)[:, None] // 3 ** np.arange(8) % 3
        return _packed(4 * (numbers + 1), 4, device)
    if kind == "iq3_s":
        return _packed((codebooks.iq3_s_grid() + 15) / 2, 4, device)
    if kind == "iq3_xxs":
        return _packed(codebooks.iq3_xxs_grid() + 192, 8, device)
    grids = {"iq2_xxs": codebooks.iq2_xxs_grid, "iq2_xs": codebooks.iq2_xs_grid, "iq2_s": codebooks.iq2_s_grid}
    return _packed(grids[kind]() + 192, 8, device)


def _packed(codes: np.ndarray, bits: int, device: torch.device) -> torch.Tensor:
    """A number of `bits` bits a code for each row of codes, the first one lowest."""
    words = (codes.astype(np.uint64) << (bits * np.arange(codes.shape[1], dtype=np.uint64))).sum(
        axis=1, dtype=np.uint64
    )
    size = bits * codes.shape[1] // 8
    return torch.from_numpy(words.astype(f"<u{size}").view(f"<i{size}").copy()).to(device)
