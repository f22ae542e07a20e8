"""Paged attention by Triton kernels, on NVIDIA and AMD cards.

A layer's step is: one kernel that norms and rotates queries and keys and writes the cache; then sequences with one
query row by split decode attention, sequences with more by tiles, and long prompts that start at position 0 by torch's
fused attention, which is faster there, if their shape keeps coming. Who goes where is decided on the host from lengths
that it knows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from aphrodite.attention.backend import AttentionShape, KVCache, QueryKeyTransform
from aphrodite.kernels.dispatch import Declined
from aphrodite.kernels.triton.decode_attention import (
    DecodeConfig,
    DecodePlan,
    decode_attention,
    decode_config,
    plan_decode,
)
from aphrodite.kernels.triton.paged import card_of, multiprocessors
from aphrodite.kernels.triton.ragged_attention import (
    MERGE_FIELDS,
    TILE_FIELDS,
    RaggedConfig,
    TableCapacity,
    TileTable,
    pad_table,
    ragged_attention,
    ragged_config,
    table_capacity,
    tile_table,
)
from aphrodite.kernels.triton.rotary import rotary_to_cache
from aphrodite.platforms import platform_of
from aphrodite.runner.inputs import DeviceInputs, HostLengths, StepSize

MAX_HEAD_DIM = 256
DENSE_TOKENS = (
    2048  # from which on a call of torch's attention is worth the host's time for it, in one prompt or several
)
DENSE_MIN = 512  # of each prompt
DENSE_MULTIPLE = 256  # and how many of them, so that there are not many different shapes
DENSE_AFTER = 3  # steps with a shape, from which on torch's attention serves it
DENSE_SHAPES = 64  # that torch's attention may serve at all
DENSE_CANDIDATES = 1024  # whose steps are counted
TABLE_ALIGNMENT = 4  # int32 values


class DenseRun(NamedTuple):
    """Prompts of equal length, one after the other, whose first `rows` tokens torch attends to."""

    first_token: int
    prompts: int
    length: int
    rows: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """What cuDNN makes a plan for: sizes and strides. Where one prompt ends does not matter then."""
        return self.prompts, self.length if self.prompts > 1 else self.rows, self.rows


class DenseShapes:
    """The shapes that torch's attention serves.

    cuDNN plans each new shape for some 60 ms on the host, during which every chat stands still. A shape is therefore
    only planned once it has come DENSE_AFTER times, at most one a step, and DENSE_SHAPES in all; this package's kernel
    serves the others.
    """

    def __init__(self) -> None:
        self._planned: set[tuple[int, int, int]] = set()
        self._steps: dict[tuple[int, int, int], int] = {}  # least recently seen first

    def admit(self, runs: Sequence[DenseRun]) -> list[bool]:
        """Which of a step's runs torch's attention serves; counts their shapes."""
        served = [run.shape in self._planned for run in runs]
        for shape in {run.shape for run in runs} - self._planned:
            self._steps[shape] = self._steps.pop(shape, 0) + 1
        while len(self._steps) > DENSE_CANDIDATES:
            del self._steps[next(iter(self._steps))]
        if len(self._planned) < DENSE_SHAPES:
            ready = [run.shape for run in runs if self._steps.get(run.shape, 0) >= DENSE_AFTER]
            if ready:
                self._planned.add(ready[0])
                del self._steps[ready[0]]
                served = [run.shape in self._planned for run in runs]
        return served


class Work(NamedTuple):
    """How the sequences with several query rows are divided, for layers of one window."""

    dense: tuple[DenseRun, ...]
    table: TileTable


class StagedStep(NamedTuple):
    """What `stage_step` decided, by window in the order of the back end's."""

    lengths: HostLengths
    works: tuple[Work, ...]


class TritonAttention:
    """Attention over a cache `[layers, num_blocks, kv_heads, block_size, head_dim]`, in kernels of its own.

    Not batch-invariant: how a context is split depends on the batch.
    """

    name = "triton paged"

    def __init__(self, shape: AttentionShape, transform: QueryKeyTransform) -> None:
        """Args:
        shape: what to serve; see `decline`.
        transform: of queries and keys.
        """
        self.shape = shape
        self.transform = transform
        card = card_of(shape.device)
        self._card = card
        self.ragged_config = ragged_config(
            shape.head_dim, shape.dtype, card, fp8_cache=shape.cache_dtype == torch.float8_e4m3fn
        )
        self.windows = tuple(dict.fromkeys(shape.windows))
        has_cudnn = shape.device.type == "cuda" and platform_of(shape.device).has_cudnn_attention
        dense = has_cudnn and shape.dtype in (torch.bfloat16, torch.float16) and shape.softcap == 0.0
        dense = dense and not transform.sinks  # which torch's attention does not know
        self._dense_shapes = DenseShapes() if dense else None
        self._programs = multiprocessors(shape.device)
        self._staged: StagedStep | None = None

    @staticmethod
    def decline(shape: AttentionShape) -> Declined | None:
        if shape.device.type != "cuda":
            return Declined(f"only for CUDA and HIP devices, not {shape.device.type}")
        if shape.head_dim > MAX_HEAD_DIM or shape.head_dim % 8 or shape.head_dim < 16:
            return Declined(f"heads of 16 to {MAX_HEAD_DIM} dimensions in steps of 8, not {shape.head_dim}")
        if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Declined(f"only for bfloat16, float16 and float32, not {shape.dtype}")
        if shape.cache_dtype not in (shape.dtype, torch.float8_e4m3fn):
            return Declined(f"a cache of {shape.dtype} or float8_e4m3fn, not {shape.cache_dtype}")
        if shape.cache_dtype == torch.float8_e4m3fn and shape.dtype == torch.float32:
            return Declined("no float8 cache under float32, which is there to be exact")
        return None

    def allocate(self, num_blocks: int) -> KVCache:
        shape = self.shape
        size = (shape.num_layers, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        return KVCache(
            torch.zeros(size, dtype=shape.cache_dtype, device=shape.device),
            torch.zeros(size, dtype=shape.cache_dtype, device=shape.device),
        )

    def stage_step(self, lengths: HostLengths) -> np.ndarray:
        """What the kernels of a step need from the host, `[n]` int32: each window's tiles and merges.

        Each part begins at a multiple of 16 bytes: kernels are compiled anew for pointers less aligned. `begin_step` of
        the same step is to follow.
        """
        works = tuple(self._divide(lengths, window) for window in self.windows)
        self._staged = StagedStep(lengths, works)
        return join_parts([part for work in works for part in work.table])

    def stage_padded(self, lengths: HostLengths, size: StepSize) -> np.ndarray | None:
        """The same for a step that is captured with room for `size`: always as long, see `padded_table_length`.

        None where the step needs more room than that.
        """
        capacity = self._capacity(size)
        parts: list[np.ndarray] = []
        for window in self.windows:
            table = pad_table(self._divided(lengths, window, ()).table, capacity)
            if table is None:
                return None
            parts += table
        return join_parts(parts)

    def padded_table_length(self, size: StepSize) -> int:
        """int32 values that `stage_padded` returns."""
        return len(self.windows) * sum(padded_size(rows * fields) for rows, fields in self.table_shapes(size))

    def padded_slots(self, size: StepSize) -> int:
        """Partial results of a step that is captured with room for `size`."""
        return self._capacity(size).slots

    def table_shapes(self, size: StepSize) -> list[tuple[int, int]]:
        """Of tiles and merges in such a step."""
        capacity = self._capacity(size)
        return [(capacity.tiles, TILE_FIELDS), (capacity.merges, MERGE_FIELDS)]

    def _capacity(self, size: StepSize) -> TableCapacity:
        shape = self.shape
        return table_capacity(
            size.tokens,
            size.sequences,
            self.ragged_config,
            group=shape.group,
            kv_heads=shape.num_kv_heads,
            programs=self._programs,
        )

    def begin_step(self, inputs: DeviceInputs, cache: KVCache) -> _TritonStep:
        """Prepare a step; without `lengths` nothing here or in the step waits for the device or reads the host.

        Kernels of the step read `inputs` before their predecessors have ended: between the kernel that writes these
        tensors and the first layer must lie one that is not launched as a dependent.
        """
        works: tuple[Work, ...] = ()
        if inputs.lengths is not None:
            staged = self._staged
            if staged is None or not all(map(np.array_equal, staged.lengths, inputs.lengths)):
                raise RuntimeError("begin_step was not preceded by stage_step of the same step")
            works = staged.works
        return _TritonStep(self, inputs, cache, works)

    def decode_config(self, sequences: int) -> DecodeConfig:
        """Launch parameters of decode attention for a batch."""
        return decode_config(self.shape.head_dim, self.shape.dtype, self._card, sequences)

    def _divide(self, lengths: HostLengths, window: int | None) -> Work:
        runs = dense_runs(lengths, window) if self._dense_shapes is not None else []
        if self._dense_shapes is not None and runs:
            admitted = self._dense_shapes.admit(runs)
            runs = [run for run, served in zip(runs, admitted, strict=True) if served]
        return self._divided(lengths, window, runs)

    def _divided(self, lengths: HostLengths, window: int | None, runs: Sequence[DenseRun]) -> Work:
        shape = self.shape
        return divide_rows(
            lengths,
            window,
            runs,
            self.ragged_config,
            group=shape.group,
            kv_heads=shape.num_kv_heads,
            programs=self._programs,
        )


def padded_size(count: int) -> int:
    """int32 values that a part of `count` takes in the table that `join_parts` makes."""
    return count + -count % TABLE_ALIGNMENT


def join_parts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One after the other, each from a multiple of 16 bytes on."""
    return np.concatenate([np.pad(part.ravel(), (0, -part.size % TABLE_ALIGNMENT)) for part in parts])


def dense_runs(lengths: HostLengths, window: int | None) -> list[DenseRun]:
    """The prompts that torch's attention could serve: long ones from position 0 on, up to where a window begins."""
    query = lengths.query.astype(np.int64)
    alike = query if window is None else np.minimum(query, window)
    fresh = (query == lengths.context) & (query >= DENSE_MIN)
    rows = np.where(fresh, alike // DENSE_MULTIPLE * DENSE_MULTIPLE, 0)
    starts = np.cumsum(query) - query
    runs: list[DenseRun] = []
    for index in np.flatnonzero(rows):
        run = DenseRun(int(starts[index]), 1, int(query[index]), int(rows[index]))
        last = runs[-1] if runs else None
        if last and last[2:] == run[2:] and last.first_token + last.prompts * last.length == run.first_token:
            runs[-1] = last._replace(prompts=last.prompts + 1)
        else:
            runs.append(run)
    return [run for run in runs if run.prompts * run.rows >= DENSE_TOKENS]


def divide_rows(
    lengths: HostLengths,
    window: int | None,
    runs: Sequence[DenseRun],
    config: RaggedConfig,
    *,
    group: int,
    kv_heads: int,
    programs: int,
) -> Work:
    """How the query rows of a step are served where a sequence has more than one.

    Args:
        lengths: of the step.
        window: of the layer.
        runs: what torch's attention serves.
        config: of the kernel that serves the rest.
        group, kv_heads, programs: see `tile_table`.
    """
    starts = np.cumsum(lengths.query) - lengths.query
    first_rows = np.zeros(len(starts), dtype=np.int64)
    for run in runs:
        first = int(np.searchsorted(starts, run.first_token))
        first_rows[first : first + run.prompts] = run.rows
    table = tile_table(
        lengths.query,
        lengths.context,
        config,
        group=group,
        kv_heads=kv_heads,
        programs=programs,
        window=window,
        first_rows=first_rows,
    )
    return Work(tuple(runs), table)


class _TritonStep:
    """One step's attention; see `StepAttention`."""

    def __init__(self, backend: TritonAttention, inputs: DeviceInputs, cache: KVCache, works: tuple[Work, ...]) -> None:
        self._backend = backend
        self._inputs = inputs
        self._cache = cache
        self._query_scales = backend.transform.scales_at(inputs.positions)
        self._plans: dict[int | None, DecodePlan] = {}
        if inputs.lengths is None or (inputs.lengths.query == 1).any():
            for window in backend.windows:
                self._plans[window] = plan_decode(
                    query_start=inputs.query_start,
                    context_lens=inputs.context_lens,
                    rows=inputs.rows,
                    num_kv_heads=backend.shape.num_kv_heads,
                    window=window,
                    config=backend.decode_config(inputs.context_lens.shape[0]),
                )
        self._dense = {window: work.dense for window, work in zip(backend.windows, works, strict=bool(works))}
        self._slots: int | None = None
        shapes: list[list[tuple[int, ...]]] = [[part.shape for part in work.table] for work in works]
        if inputs.padded is not None:
            self._slots = backend.padded_slots(inputs.padded)
            shapes = [list(backend.table_shapes(inputs.padded))] * len(backend.windows)
        self._tables: dict[int | None, TileTable] = {}
        used = 0
        for window, parts in zip(backend.windows, shapes, strict=bool(shapes)):
            table = []
            for rows, fields in parts:
                table.append(inputs.attention_table[used : used + rows * fields].view(rows, fields))
                used += padded_size(rows * fields)
            self._tables[window] = TileTable(*table)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        backend, inputs = self._backend, self._inputs
        shape, transform = backend.shape, backend.transform
        angles = transform.table(layer)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        window = shape.windows[layer]
        sinks = transform.sinks[layer] if transform.sinks else None
        dense = self._dense.get(window, ())
        if self._query_scales is not None:
            qkv[: self._query_scales.shape[0], : shape.num_heads * shape.head_dim].mul_(self._query_scales)
        rotary_to_cache(
            qkv,
            keys,
            values,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            cos=angles.cos,
            sin=angles.sin,
            num_heads=shape.num_heads,
            query_norm=transform.query_norms[layer] if transform.query_norms else None,
            key_norm=transform.key_norms[layer] if transform.key_norms else None,
            norm_eps=transform.norm_eps,
            keep_keys=bool(dense),
        )
        if len(dense) == 1 and dense[0].prompts * dense[0].rows == qkv.shape[0]:
            return attend_dense(qkv, dense[0], shape).reshape(qkv.shape[0], -1)
        make = torch.empty if inputs.padded is None else torch.zeros  # nothing writes the rows of padding
        out = make((qkv.shape[0], shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        tokens = inputs.slot_mapping.shape[0]
        if tokens < qkv.shape[0]:
            out[tokens:].zero_()
        for run in dense:
            target = out[run.first_token : run.first_token + run.prompts * run.length].view(
                run.prompts, run.length, shape.num_heads, shape.head_dim
            )
            target[:, : run.rows].copy_(attend_dense(qkv, run, shape))
        table = self._tables.get(window)
        if table is not None:
            ragged_attention(
                qkv,
                keys,
                values,
                out,
                table=table,
                query_start=inputs.query_start,
                context_lens=inputs.context_lens,
                rows=inputs.rows,
                block_tables=inputs.block_tables,
                num_heads=shape.num_heads,
                scale=shape.scale,
                config=backend.ragged_config,
                window=window,
                softcap=backend.shape.softcap,
                sinks=sinks,
                slots=self._slots,
            )
        plan = self._plans.get(window)
        if plan is not None:
            decode_attention(
                qkv,
                keys,
                values,
                out,
                plan=plan,
                block_tables=inputs.block_tables,
                num_heads=shape.num_heads,
                scale=shape.scale,
                softcap=backend.shape.softcap,
                sinks=sinks,
            )
        return out


def attend_dense(qkv: torch.Tensor, run: DenseRun, shape: AttentionShape) -> torch.Tensor:
    """Causal attention among the first `rows` tokens of each prompt by torch, straight from the step's q, k and v.

    Args:
        qkv: `[>= T, (heads + 2 * kv_heads) * head_dim]`, queries and keys transformed.
        run: whom to attend to.
        shape: of the heads.

    Returns:
        `[prompts, rows, heads, head_dim]`.
    """
    prompts, length, rows = run.shape
    tokens = slice(run.first_token, run.first_token + prompts * length)
    heads = qkv[tokens].view(prompts, length, -1, shape.head_dim)[:, :rows].transpose(1, 2)
    query, key, value = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    if cudnn_serves(shape):
        # By its own name: choosing it through torch's context manager takes longer than launching it.
        attended: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, None, False, 0.0, True, False, scale=shape.scale
        )[0]
    else:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=shape.scale, enable_gqa=shape.group > 1
            )
    return attended.transpose(1, 2)


@functools.cache
def cudnn_serves(shape: AttentionShape) -> bool:
    """Whether torch would let cuDNN attend with heads of this shape; otherwise its flash attention does."""
    size = (1, shape.num_heads + 2 * shape.num_kv_heads, DENSE_MULTIPLE, shape.head_dim)
    heads = torch.empty(size, dtype=shape.dtype, device=shape.device)
    query, key, value = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    return bool(can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, shape.group > 1)))
