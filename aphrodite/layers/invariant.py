"""Matrix products whose rows do not depend on how many there are.

A BLAS picks kernels, and even splits the inner dimension over threads, by the shape of the whole
product; so the same row gets other bits in another batch. Here every product has one of few row counts,
which were found, on the machine and on the weight's shape, to give every row the same bits at every
position. Rows are cut into blocks of these sizes, the last one padded.

Cost: a single row costs as much as the smallest block (16 rows: about twice the time where reading the
weight dominates); 256 rows and more cost what the library's product costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from aphrodite.kernels.dispatch import Declined

ROW_MULTIPLE = 16  # the smallest block; fewer rows make MKL switch to matrix-vector kernels
_LARGEST = 256  # a multiple of every smaller block
_SMALLER = (64, ROW_MULTIPLE)


class RowBlocks(NamedTuple):
    """Block sizes that may be mixed, largest first, and whether position within a block was found harmless."""

    sizes: tuple[int, ...]
    verified: bool


_known: dict[tuple[int, int, int], RowBlocks] = {}


def decline_invariant(dtype: torch.dtype, device: torch.device) -> Declined | None:
    """Why rows are not kept independent of the batch; None if they are."""
    if device.type != "cpu":
        return Declined(f"only for the CPU, not {device.type}")
    if dtype != torch.float32:
        return Declined(f"only for float32, not {dtype}")
    return None


def row_blocks(weight: torch.Tensor) -> RowBlocks:
    """What holds for products with `weight` `[out, in]` at the current number of threads; measured once a shape."""
    key = (weight.shape[0], weight.shape[1], torch.get_num_threads())
    if key not in _known:
        _known[key] = _measure(weight)
    return _known[key]


def invariant_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` `[T, in]` times the transposed `weight` `[out, in]`: `[T, out]`, each row as if it were alone."""
    sizes = row_blocks(weight).sizes
    parts = []
    at, rows = 0, x.shape[0]
    for size in sizes:
        while rows - at >= size:
            parts.append(F.linear(x[at : at + size], weight))
            at += size
    if at < rows:
        padded = F.pad(x[at:], (0, 0, 0, sizes[-1] - (rows - at)))
        parts.append(F.linear(padded, weight)[: rows - at])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _measure(weight: torch.Tensor) -> RowBlocks:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_LARGEST, weight.shape[1]), generator=generator)
    order = torch.randperm(_LARGEST, generator=generator)
    expected = F.linear(x, weight)
    shuffled = F.linear(x[order], weight)
    # Row by row: a head's 256 rows are large, and a third copy of them would show in the peak memory.
    verified = all(torch.equal(row, expected[at]) for row, at in zip(shuffled, order.tolist(), strict=True))
    del shuffled
    alike = [size for size in _SMALLER if _equal_in_blocks(x, weight, size, expected)]
    return RowBlocks((_LARGEST, *alike), verified)


def _equal_in_blocks(x: torch.Tensor, weight: torch.Tensor, size: int, expected: torch.Tensor) -> bool:
    return all(
        torch.equal(F.linear(x[at : at + size], weight), expected[at : at + size]) for at in range(0, _LARGEST, size)
    )
