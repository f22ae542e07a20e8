"""How the products of `dense_wgmma` are cut, and where they serve."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from aphrodite.kernels.triton.int4_linear import gluon_reason

logger = logging.getLogger("aphrodite.kernels")


class DenseConfig(NamedTuple):
    """How the product is cut.

    Attributes:
        parts: sums of a block, each of `part` activation rows.
        part: 64, or 128 with 8 warps, which then have 64 rows each four.
        columns: weight rows of a tile, a power of two from 32 to 256.
        stages: chunks in flight.
        chunk: inputs of a chunk, 64 or 128.
        warps: of a block, 4 or 8.
        rotated: tiles begin with different chunks.
    """

    parts: int
    part: int
    columns: int
    stages: int
    chunk: int
    warps: int
    rotated: bool = False


SHARED_BYTES = 224 << 10  # of a block, for the ring; Hopper has 227 KiB
FEW_ROWS = 32  # up to which other kernels serve
NARROW = DenseConfig(1, 64, 64, 7, 128, 4)
WIDE = DenseConfig(1, 64, 128, 4, 128, 8)

# For shapes `(out, in)` and more than 64 rows: cuts that were faster than what else there is on an H100, each with the
# most rows that it is for.
MEASURED: dict[tuple[int, int], tuple[tuple[int, DenseConfig], ...]] = {
    (6144, 4096): ((128, DenseConfig(2, 64, 64, 8, 64, 4)),),
    (28672, 4096): (
        (128, DenseConfig(1, 128, 128, 3, 128, 8, rotated=True)),
        (192, DenseConfig(3, 64, 256, 4, 64, 8, rotated=True)),
        (256, DenseConfig(2, 128, 128, 4, 64, 8, rotated=True)),
    ),
    (4096, 14336): ((128, DenseConfig(1, 128, 32, 5, 128, 8)),),
    (128256, 4096): ((128, DenseConfig(1, 128, 128, 7, 64, 8)),),
}


@functools.cache
def dense_cut(out_features: int, in_features: int, rows: int) -> DenseConfig | None:
    """The cut with which the kernel is the fastest for a weight `[out, in]`; None where another serves.

    Up to 64 rows weights of other models are taken to behave as those of 8B, which were measured.
    """
    if rows <= FEW_ROWS:
        return None
    if rows <= 64:
        if min(out_features, in_features) < 4096:  # tiles too few, or ended before their ring pays
            return None
        return WIDE if out_features >= 1 << 14 else NARROW
    cuts = MEASURED.get((out_features, in_features), ())
    return next((cut for most, cut in cuts if rows <= most), None)


def dense_supports(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel runs on this card, and the copy engine can address rows: multiples of 16 bytes."""
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    shapes = weight.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0
    return aligned and shapes and weight.itemsize == 2 and dense_reason(x.device) is None


@functools.cache
def dense_reason(device: torch.device) -> str | None:
    """Why `dense_wgmma` does not run on `device`, which is logged; None if it does."""
    reason = gluon_reason(device)
    if reason is not None:
        logger.info("dense products of more than %d rows: not by Gluon's kernel, for %s", FEW_ROWS, reason)
    return reason
