"""A linear layer over packed weights on a GPU, whatever their layout: the general path beside `int4_gpu_linear`.

For up to 64 rows the planes are read as they are; for more, rows of the weight are expanded into one scratch matrix
that all layers share, and the vendor's library multiplies it. Matrices of several layouts (a Q6_K value projection
beside Q4_K queries and keys) are products of their own, whose results lie side by side.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from aphrodite.kernels.dispatch import Choice
from aphrodite.kernels.triton.activation import Activation
from aphrodite.kernels.triton.epilogue import Epilogue
from aphrodite.kernels.triton.half_rows import HalfRows, half_rows
from aphrodite.kernels.triton.launch import gluon_version_reason
from aphrodite.kernels.triton.norm import rms_norm
from aphrodite.kernels.triton.packed_gemm import PACKED_SKINNY_MAX_ROWS, expand_planes, packed_skinny
from aphrodite.kernels.triton.packed_gemv import PACKED_GEMV_MAX_ROWS, packed_gemv
from aphrodite.kernels.triton.packed_grid import is_grid
from aphrodite.layers.linear import RmsNorm, unfused
from aphrodite.layers.triton_linear import interleave_gate_up, unfused_pairs
from aphrodite.platforms import platform_of
from aphrodite.quantization.layouts import PackedLayout
from aphrodite.quantization.planes import Planes, planes_of

logger = logging.getLogger("aphrodite.kernels")
MMA_KINDS = ("integer", "table", "e4m3", "e5m2")
SCRATCH_BYTES = 256 << 20  # of rows that are expanded at a time


class PackedLinear:
    """Weights that are kept packed; `layouts` are stacked along their rows."""

    def __init__(
        self,
        layouts: Sequence[PackedLayout | Planes],
        bias: torch.Tensor | None,
        choice: Choice,
        *,
        dtype: torch.dtype,
        gated: bool = False,
    ) -> None:
        """
        Args:
            layouts: on the device; `decline_planes` has been asked of each. Not kept, unless it is in planes already.
            bias: `[out]` of `dtype`.
            dtype: of inputs and outputs.
            gated: the rows are gate, then up; they are kept interleaved where they have one layout.
        """
        self.pairs = gated and len(layouts) == 1
        self.parts = tuple(_planes(layout, interleaved=self.pairs) for layout in layouts)
        self.bias = interleave_gate_up(bias) if self.pairs and bias is not None else bias
        self.gated = gated
        self.choice = choice
        self.dtype = dtype
        self._out_features = sum(part.rows for part in self.parts)
        # Made now, for graphs keep its address and the memory plan has to see it.
        shared_scratch(self.parts[0].low.device, dtype)
        for part in self.parts:
            if dtype != torch.float32 and in_shared_tables(part):
                _make_tables(part, dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        packed = tuple(tensor for part in self.parts for tensor in part.tensors)
        return packed if self.bias is None else (*packed, self.bias)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) W^T + b) + residual of `x` `[T, in]`; the result takes residual's place, which must not overlap
        x."""
        if (activation is not None) != self.gated:
            raise ValueError("an activation goes with a gated weight, whose rows are interleaved, and with no other")
        return self._multiplied(x, norm, activation, residual)

    def unactivated(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """See `GpuLinear`."""
        return self._multiplied(x, None, None, None), int(self.pairs)

    def _multiplied(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None,
        activation: Activation | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        # Matrix units would round float32.
        most = PACKED_GEMV_MAX_ROWS if x.dtype == torch.float32 else PACKED_SKINNY_MAX_ROWS
        if not 0 < x.shape[0] <= most:
            if self.pairs or activation is None:
                return unfused_pairs(self._by_library, x, norm, activation, residual)
            return unfused(self._by_library, x, norm, activation, residual)
        if activation is not None and not self.pairs:
            return unfused(self._by_kernels, x, norm, activation, residual)
        return self._by_kernels(x, norm, activation, residual)

    def _by_kernels(
        self,
        x: torch.Tensor,
        norm: RmsNorm | None = None,
        activation: Activation | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A call for few rows; the activation is that of pairs."""
        few = x.shape[0] <= PACKED_GEMV_MAX_ROWS
        halves = None  # what products of points have as activations
        if norm is not None and not all(_takes_norm(part, few, x.dtype) for part in self.parts):
            x, norm = rms_norm(x, norm.weight, norm.eps), None
        width = self._out_features if activation is None else self._out_features // 2
        out = residual if residual is not None else torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
        first = 0
        for part in self.parts:
            last = first + part.rows
            target = out if activation is not None else out[:, first:last]
            bias = None if self.bias is None else self.bias[first:last]
            epilogue = Epilogue(bias, activation, None if residual is None else target)
            if few:
                multiply_few(_ordered(x, part), part, target, epilogue, norm)
            elif in_shared_tables(part):
                halves = halves or half_rows(x, norm)
                multiply_halves(halves, part, target, epilogue)
            else:
                multiply_rows(_ordered(x, part), part, target, epilogue)
            first = last
        return out

    def _by_library(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, some rows of the weight at a time."""
        out = torch.empty((x.shape[0], self._out_features), dtype=x.dtype, device=x.device)
        scratch = shared_scratch(x.device, x.dtype)
        first = 0
        for part in self.parts:
            values = _ordered(x, part)
            step = scratch.numel() // part.form.columns
            for begin in range(0, part.rows, step):
                rows = min(step, part.rows - begin)
                weight = scratch[: rows * part.form.columns].view(rows, part.form.columns)
                expand_planes(part, weight, begin)
                torch.mm(values, weight.t(), out=out[:, first + begin : first + begin + rows])
            first += part.rows
        return out if self.bias is None else out.add_(self.bias)


def multiply_few(
    x: torch.Tensor, weight: Planes, out: torch.Tensor, epilogue: Epilogue, norm: tuple[torch.Tensor, float] | None
) -> None:
    """act(norm(x) W^T + b) + residual into `out` for 1 or 2 rows; see `packed_gemv`."""
    if x.dtype != torch.float32 and in_shared_tables(weight):
        from aphrodite.kernels.triton.grid_row import grid_row  # Gluon is not in every Triton

        if grid_row(x, weight, out, epilogue, norm):
            return
    packed_gemv(x, weight, out, epilogue, norm)


def multiply_halves(x: HalfRows, weight: Planes, out: torch.Tensor, epilogue: Epilogue) -> None:
    """act(x W^T + b) + residual into `out` for 3 to 64 rows; the weight's points are `in_shared_tables`."""
    from aphrodite.kernels.triton.grid_mma import grid_mma  # Gluon is not in every Triton

    grid_mma(x, weight, out, epilogue)


def multiply_rows(x: torch.Tensor, weight: Planes, out: torch.Tensor, epilogue: Epilogue) -> None:
    """act(x W^T + b) + residual into `out` for 3 to 64 rows of a 16-bit type; see `packed_skinny`."""
    aligned = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    if aligned and weight.form.kind in MMA_KINDS and mma_reason(x.device) is None:
        from aphrodite.kernels.triton.packed_mma import packed_mma  # Gluon is not in every Triton

        packed_mma(x, weight, out, epilogue)
    else:
        packed_skinny(x, weight, out, epilogue)


def in_shared_tables(weight: Planes) -> bool:
    """Whether products of up to 64 rows in 16 bits take a weight's points from tables in shared memory."""
    kind, device = weight.form.kind, weight.low.device
    return is_grid(kind) and mma_reason(device) is None and _table_fits(kind, device)


@functools.cache
def _table_fits(kind: str, device: torch.device) -> bool:
    from aphrodite.kernels.triton.grid_gluon import card_of  # Gluon is not in every Triton
    from aphrodite.kernels.triton.grid_mma import grid_mma_cut

    card = card_of(device)
    fits = grid_mma_cut(1, 256, PACKED_SKINNY_MAX_ROWS, kind, card) is not None
    if not fits:
        logger.info("few rows times %s: not by Gluon's kernels, for blocks have %d bytes", kind, card.shared)
    return fits


def _make_tables(weight: Planes, dtype: torch.dtype) -> None:
    """Tables of points on the weight's device, where graphs that are captured find them."""
    from aphrodite.kernels.triton.grid_gluon import operand_table  # Gluon is not in every Triton

    for operand in {dtype, torch.float16}:
        operand_table(weight.form.kind, operand, weight.low.device)


def _takes_norm(weight: Planes, few: bool, dtype: torch.dtype) -> bool:
    """Whether the kernel that `_by_kernels` chooses has the norm of its activations in it, or before it."""
    if weight.permutation is not None:
        return False
    if dtype != torch.float32 and in_shared_tables(weight):
        # `grid_row` holds a row times the norm's weight in 16 bits: float16 may overflow, until the row is divided.
        return not few or dtype != torch.float16
    return few


@functools.cache
def mma_reason(device: torch.device) -> str | None:
    """Why `packed_mma`, `grid_row` and `grid_mma` do not run on `device`, which is logged; None if they do."""
    reason = gluon_version_reason()
    if reason is None and (
        device.type != "cuda" or platform_of(device).kind != "cuda" or platform_of(device).capability[0] < 8
    ):
        reason = "they are written for NVIDIA's cards from Ampere on"
    if reason is not None:
        logger.info("few rows times packed weights: not by Gluon's kernels, for %s", reason)
    return reason


@functools.cache
def shared_scratch(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What all packed layers of `device` expand into: one is enough, for their kernels follow one another."""
    return torch.empty(SCRATCH_BYTES // dtype.itemsize, dtype=dtype, device=device)


def interleaved_layout(layout: PackedLayout) -> PackedLayout:
    """A (gate, up) matrix with its rows as pairs: g0, u0, g1, u1, ..."""
    rows = torch.arange(layout.shape[0], device=layout.tensors[0].device)
    return layout.take_rows(interleave_gate_up(rows))


def _planes(layout: PackedLayout | Planes, *, interleaved: bool) -> Planes:
    if isinstance(layout, Planes):
        return layout
    return planes_of(interleaved_layout(layout) if interleaved else layout)


def _ordered(x: torch.Tensor, weight: Planes) -> torch.Tensor:
    """`x` in the order of the weight's columns."""
    return x if weight.permutation is None else x.index_select(1, weight.permutation)
