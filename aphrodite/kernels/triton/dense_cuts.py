"""How the products of `dense_wgmma` are cut, and where they serve."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from aphrodite.kernels.triton.int4_linear import gluon_reason
from aphrodite.kernels.triton.launch import ceil_div


class DenseConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        parts: sums of a block, each of `part` activation rows.
        part: 64, or 128 with 8 warps, which then have 64 rows each four.
        columns: weight rows of a tile, a power of two from 32 to 256.
        splits: of the inputs among blocks, 1 or an even number.
        stages: chunks in flight.
        chunk: inputs of a chunk, 64 or 128.
        warps: of a block, 4 or 8.
    """

    parts: int
    part: int
    columns: int
    splits: int
    stages: int
    chunk: int
    warps: int


SHARED_BYTES = 224 << 10  # of a block, for the ring; Hopper has 227 KiB
PROCESSORS = 132  # of an H100


@functools.cache
def dense_config(out_features: int, in_features: int, rows: int) -> DenseConfig:
    """The cut for a weight `[out, in]`: as many columns as keep the card busy, for tiles fetch all activations."""
    parts, part = (1, 64) if rows <= 64 else (1, 128) if rows <= 128 else (3, 64) if rows <= 192 else (2, 128)
    columns = 256 if out_features >= 96 * 256 and parts * part <= 192 else 128 if out_features >= 2048 else 64
    chunks = ceil_div(in_features, 64)
    splits = 1
    while splits < 4 and 2 * splits * ceil_div(out_features, columns) <= PROCESSORS and chunks >= 16 * splits:
        splits *= 2
    stages = min(SHARED_BYTES // (128 * (parts * part + columns)), 8)
    return DenseConfig(parts, part, columns, splits, stages, 64, 8)


# Shapes `(out, in)` that the kernel multiplies faster than what else there is, each with the most rows of a cut; as
# measured on an H100.
MEASURED: dict[tuple[int, int], tuple[tuple[int, DenseConfig | None], ...]] = {}


@functools.cache
def measured_cut(out_features: int, in_features: int, rows: int) -> DenseConfig | None:
    """The cut with which the kernel wins for a weight `[out, in]`; None where another serves."""
    cuts = MEASURED.get((out_features, in_features), ())
    return next((cut for most, cut in cuts if rows <= most), None)


def dense_supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel runs on this card, and the copy engine can address rows: multiples of 16 bytes."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    shapes = weight.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0
    return aligned and shapes and weight.itemsize == 2 and gluon_reason(x.device) is None
