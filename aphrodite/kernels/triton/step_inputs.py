"""What a step needs of the rows' tables before the decoder, and writes to them after the sampler.

Cost: a few KiB for any batch; these kernels are all latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import ceil_div, direct_launch

_BLOCK = 256


@direct_launch
@triton.jit(do_not_specialize=["count"])
def _gather_tokens_kernel(tokens_ptr, table_ptr, rows_ptr, positions_ptr, count, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    row = tl.load(rows_ptr + at, mask, other=0).to(tl.int64)
    position = tl.load(positions_ptr + at, mask, other=0)
    tl.store(tokens_ptr + at, tl.load(table_ptr + row * stride + position, mask), mask)


@direct_launch
@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(table_ptr, rows_ptr, columns_ptr, values_ptr, count, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    row = tl.load(rows_ptr + at, mask, other=0).to(tl.int64)
    column = tl.load(columns_ptr + at, mask, other=0)
    tl.store(table_ptr + row * stride + column, tl.load(values_ptr + at, mask), mask)


def gather_tokens(out: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """out[i] = table[rows[i], positions[i]].

    Args:
        out: `[N]` int32, written.
        table: `[num_rows, columns]` int32, columns contiguous.
        rows, positions: `[N]` int32.
    """
    count = out.shape[0]
    grid = (ceil_div(count, _BLOCK),)
    _gather_tokens_kernel[grid](out, table, rows, positions, count, table.stride(0), BLOCK=_BLOCK)


def scatter(table: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """table[rows[i], columns[i]] = values[i]; places that occur twice must be given the same value.

    Args:
        table: `[num_rows, columns]` int32, columns contiguous, written.
        rows, columns, values: `[N]` int32.
    """
    count = values.shape[0]
    grid = (ceil_div(count, _BLOCK),)
    _scatter_kernel[grid](table, rows, columns, values, count, table.stride(0), BLOCK=_BLOCK)
