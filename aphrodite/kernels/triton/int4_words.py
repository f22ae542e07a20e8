"""4-bit weights in the order in which matrix units want them: the layout that all int4 kernels read.

A weight `[out, in]` is cut into strips of 16 rows and chunks of 128 inputs. A chunk of a strip is 1 KiB: 16 rows x 16
words of 32 bits. Word `4 t + j` of a row holds the inputs `32 j + 8 e + 2 t + b` (e = 0..3, b = 0..1) of the chunk:
nibble e where b = 0, nibble e + 4 where b = 1. So `word >> 4 e & 0x000F000F` is a pair of neighbours, and what lane
(g, t) of a warp finds in one 16-byte load is its share of the A operand of mma.m16n8k16 and wgmma.m64nNk16 (PTX ISA,
"Matrix Fragments"): rows g and g + 8, inputs 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of every 16. A strip's chunks follow one
another in memory.

Scale and zero of a group are one word: a float32 whose low byte, below the 15 bits of fraction that are kept (so
float16 and bfloat16 scales are exact), is the zero, an integer.

The rows of a gated weight are (gate, up) pairs: the first 8 rows of a strip are gates, the other 8 their ups, so one
thread has both sums of a pair. It costs 0.5 bytes a value and 4 a group: 0.53125 in groups of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STRIP = 16  # rows
CHUNK = 128  # inputs
# What kernels multiply scales by that they round to float16: those of small weights are below its normal numbers.
RAISED = 64.0
# Bytes of codes that are packed at once: intermediate values take some twelve times as much.
PIECE_BYTES = 16 << 20


class Int4Words(NamedTuple):
    """A packed weight. Rows are padded to whole strips and inputs to whole chunks, with scales of 0.

    Attributes:
        words: `[strips, chunks, 16, 16]` int32.
        scales: `[strips, groups, 16]` int32, scale and zero.
        out_features, in_features: without padding.
        group_size: inputs that share a scale: 32, 64, or a multiple of 128.
        paired: the rows are (gate, up) pairs.
        fits_half: scales times `RAISED` can be float16 without loss to speak of.
    """

    words: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    paired: bool
    fits_half: bool

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words, self.scales)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def unsupported_group(group_size: int, in_features: int) -> str | None:
    """Why groups of this size cannot be packed; None if they can."""
    if group_size in (32, 64) or group_size % CHUNK == 0 or group_size == in_features:
        return None
    return f"groups of {group_size} are none of 32, 64, a multiple of 128, the whole row"


def whole_splits(chunks: int, splits: int) -> int:
    """`splits` or fewer, so that each has a chunk at least."""
    while splits > 1 and (splits - 1) * -(-chunks // splits) >= chunks:
        splits -= 1
    return splits


def pack_int4(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_size: int, *, paired: bool = False
) -> Int4Words:
    """Pack (code - zero) * scale on the device of `codes`, piece by piece.

    Args:
        codes: `[out, in / 2]` uint8; the low nibble is the even column's.
        scales: `[out, groups]` of a floating type.
        zeros: `[out, groups]` uint8, 0..127.
        group_size: inputs of a group; `unsupported_group` has been asked.
        paired: the rows are all gates, then all ups.
    """
    out_features, in_features = codes.shape[0], 2 * codes.shape[1]
    order = _strip_rows(out_features, paired, codes.device)
    strips = order.shape[0]
    chunks = -(-in_features // CHUNK)
    group_size = chunks * CHUNK if group_size == in_features else group_size
    words = torch.empty((strips, chunks, STRIP, 16), dtype=torch.int32, device=codes.device)
    piece = max(PIECE_BYTES // (STRIP * max(codes.shape[1], 1)), 1)
    for start in range(0, strips, piece):
        words[start : start + piece] = _pack_words(codes, order[start : start + piece], chunks)
    groups = -(-chunks * CHUNK // group_size)
    scale = _by_strip(scales.float(), order, groups)
    rounded = (scale.view(torch.int32) + 0x80) & ~0xFF
    zero = _by_strip(zeros.to(torch.int32), order, groups)
    largest = float(rounded.view(torch.float32).abs().max())
    fits_half = 2.0**-16 <= largest < 16.0
    return Int4Words(words, rounded | zero, out_features, in_features, group_size, paired, fits_half)


def _strip_rows(out_features: int, paired: bool, device: torch.device) -> torch.Tensor:
    """`[strips, 16]` int64: the row that lies in each place, -1 for padding."""
    if not paired:
        rows = torch.arange(-(-out_features // STRIP) * STRIP, device=device)
        return torch.where(rows < out_features, rows, -1).view(-1, STRIP)
    half = out_features // 2
    gates = torch.arange(-(-half // 8) * 8, device=device).view(-1, 8)
    order = torch.cat((gates, gates + half), dim=1)
    return torch.where(torch.cat((gates, gates), dim=1) < half, order, -1)


def _pack_words(codes: torch.Tensor, order: torch.Tensor, chunks: int) -> torch.Tensor:
    """`[strips, chunks, 16, 16]` int32 of the rows `order` `[strips, 16]` of `codes` `[out, in / 2]`."""
    taken = codes[order.clamp(min=0)]
    taken.masked_fill_((order < 0)[..., None], 0)
    taken = torch.nn.functional.pad(taken, (0, chunks * CHUNK // 2 - codes.shape[1]))
    # Byte 16 j + 4 e + t of a chunk holds both values of (j, e, t).
    parts = taken.view(*order.shape, chunks, 4, 4, 4).to(torch.int32)
    pairs = (parts & 15) | (parts >> 4) << 16
    words = pairs[..., 0, :] | pairs[..., 1, :] << 4 | pairs[..., 2, :] << 8 | pairs[..., 3, :] << 12
    return words.permute(0, 2, 1, 4, 3).reshape(order.shape[0], chunks, STRIP, 16)


def _by_strip(values: torch.Tensor, order: torch.Tensor, groups: int) -> torch.Tensor:
    """`[strips, groups, 16]` of `values` `[out, groups or fewer]`, zeros for padding."""
    taken = values[order.clamp(min=0)]
    taken.masked_fill_((order < 0)[..., None], 0)
    return torch.nn.functional.pad(taken, (0, groups - values.shape[1])).transpose(1, 2).contiguous()


def unpack_int4(weight: Int4Words) -> torch.Tensor:
    """The definition of the layout: float64 `[out, in]`; the rows of a paired weight are g0, u0, g1, u1, ..."""
    strips, chunks = weight.words.shape[:2]
    words = weight.words.view(strips, chunks, STRIP, 4, 4)  # t, j
    shifts = torch.tensor([[4 * e + 16 * b for b in range(2)] for e in range(4)], device=words.device)
    nibbles = (words[..., None, None] >> shifts) & 15  # [..., t, j, e, b]
    codes = nibbles.permute(0, 2, 1, 4, 5, 3, 6).reshape(strips, STRIP, chunks * CHUNK)
    group = torch.arange(chunks * CHUNK, device=words.device) // weight.group_size
    scale = (weight.scales & ~0xFF).view(torch.float32).transpose(1, 2)[..., group].double()
    zero = (weight.scales & 0xFF).transpose(1, 2)[..., group]
    values = (codes - zero).double() * scale
    if weight.paired:
        values = values.view(strips, 2, 8, -1).transpose(1, 2)
    return values.reshape(strips * STRIP, -1)[: weight.out_features, : weight.in_features]
