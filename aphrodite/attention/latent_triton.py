"""Latent attention by Triton kernels, on NVIDIA and AMD cards.

A layer's step is: one kernel that turns queries, normalises the latent and writes the cache; products that take queries
to the latent; sequences with one query row by split decode attention and short ones by tiles, both over the cache as it
is (absorbed); products that take attended latents to values. Long prompts have keys and values expanded instead, head
by head where memory is short. Who goes where is decided on the host, by what costs fewer operations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from aphrodite.attention.backend import KVCache
from aphrodite.attention.latent import EXPANDED_BYTES, GROUP_POSITIONS, LatentShape, LatentTransform
from aphrodite.attention.triton_paged import join_parts, padded_size
from aphrodite.kernels.dispatch import Declined
from aphrodite.kernels.triton.decode_attention import DecodePlan, plan_decode
from aphrodite.kernels.triton.heads_product import MOST_ROWS, heads_product
from aphrodite.kernels.triton.latent_cache import gather_latents, latent_to_cache
from aphrodite.kernels.triton.latent_decode import latent_decode, latent_decode_config
from aphrodite.kernels.triton.latent_prefill import (
    absorbed_attention,
    absorbed_config,
    expanded_attention,
    expanded_config,
)
from aphrodite.kernels.triton.paged import card_of, multiprocessors
from aphrodite.kernels.triton.ragged_attention import TileTable, tile_table
from aphrodite.models.spec import MlaSpec
from aphrodite.runner.inputs import DeviceInputs, HostLengths

MAX_RANK = 512
MAX_TURNING = 64
MAX_HEAD = 256  # of the part that does not turn, and of values


class ExpandedGroup(NamedTuple):
    """Sequences whose keys and values are expanded together.

    Attributes:
        tiles: `[n, TILE_FIELDS]` int32 of the query rows.
        sequences: `[s, GATHER_FIELDS]` int32: index, first row of the context among those of the group.
        positions: of all their contexts.
        longest: of their contexts.
    """

    tiles: np.ndarray
    sequences: np.ndarray
    positions: int
    longest: int


class LatentWork(NamedTuple):
    """What the host knows of a step that is not only decoding.

    Attributes:
        lengths: of the step.
        absorbed: tiles of the sequences with several query rows that are not expanded.
        spans: [first, last) token rows that are absorbed, those of decoding sequences included.
        groups: what is expanded.
        key_start: `[R]` int32, first row of each sequence's context within its group.
    """

    lengths: HostLengths
    absorbed: TileTable
    spans: tuple[tuple[int, int], ...]
    groups: tuple[ExpandedGroup, ...]
    key_start: np.ndarray

    def parts(self) -> list[np.ndarray]:
        """What the device needs of it, in the order of `_LatentStep`."""
        groups = [part for group in self.groups for part in (group.tiles, group.sequences)]
        return [*self.absorbed, self.key_start, *groups]


class TritonLatentAttention:
    """Latent attention over a cache `[layers, num_blocks, block_size, latent_dim]`.

    Not batch-invariant: how a context is split depends on the batch.
    """

    name = "triton latent"

    def __init__(self, shape: LatentShape, transform: LatentTransform) -> None:
        """Args:
        shape: what to serve; see `decline`.
        transform: of queries, latents and values.
        """
        self.shape = shape
        self.transform = transform
        card = card_of(shape.device)
        fp8 = shape.cache_dtype == torch.float8_e4m3fn
        self.decode_config = latent_decode_config(shape.num_heads, shape.dtype, card, fp8_cache=fp8)
        self.absorbed_config = absorbed_config(shape.dtype, card, fp8_cache=fp8)
        widest = max(shape.mla.qk_nope_head_dim, shape.mla.v_head_dim)
        self.expanded_config = expanded_config(shape.dtype, card, widest)
        rows = self.absorbed_config.rows
        self.absorbed_heads = next(n for n in range(min(rows, shape.num_heads), 0, -1) if shape.num_heads % n == 0)
        self.programs = multiprocessors(shape.device)
        self._staged: LatentWork | None = None

    @staticmethod
    def decline(shape: LatentShape) -> Declined | None:
        mla = shape.mla
        if shape.device.type != "cuda":
            return Declined(f"only for CUDA and HIP devices, not {shape.device.type}")
        if mla.kv_lora_rank > MAX_RANK or mla.qk_rope_head_dim > MAX_TURNING or mla.latent_dim % 8:
            return Declined(
                f"latents of up to {MAX_RANK} + {MAX_TURNING} values, a multiple of 8,"
                f" not {mla.kv_lora_rank} + {mla.qk_rope_head_dim}"
            )
        if max(mla.qk_nope_head_dim, mla.v_head_dim) > MAX_HEAD:
            return Declined(f"heads of up to {MAX_HEAD} values, not {mla.qk_nope_head_dim} and {mla.v_head_dim}")
        if shape.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Declined(f"only for bfloat16, float16 and float32, not {shape.dtype}")
        if shape.cache_dtype not in (shape.dtype, torch.float8_e4m3fn):
            return Declined(f"a cache of {shape.dtype} or float8_e4m3fn, not {shape.cache_dtype}")
        if shape.dtype == torch.float32 and shape.cache_dtype != torch.float32:
            return Declined("no float8 cache under float32, which is there to be exact")
        if shape.dtype == torch.float32 and card_of(shape.device) == "hip":
            return Declined("latents in float32 do not fit an AMD card's shared memory; use bfloat16")
        return None

    def allocate(self, num_blocks: int) -> KVCache:
        return self.shape.allocate(num_blocks)

    def stage_step(self, lengths: HostLengths) -> np.ndarray:
        """What the kernels of a step need from the host, `[n]` int32; `begin_step` of the same step is to follow.

        Each part begins at a multiple of 16 bytes: kernels are compiled anew for pointers less aligned.
        """
        self._staged = self._divide(lengths)
        return join_parts(self._staged.parts())

    def begin_step(self, inputs: DeviceInputs, cache: KVCache) -> _LatentStep:
        """Prepare a step; without `lengths` nothing here or in the step waits for the device or reads the host.

        Kernels of the step read `inputs` before their predecessors have ended: between the kernel that writes these
        tensors and the first layer must lie one that is not launched as a dependent.
        """
        work = None
        if inputs.lengths is not None:
            work = self._staged
            if work is None or not all(map(np.array_equal, work.lengths, inputs.lengths)):
                raise RuntimeError("begin_step was not preceded by stage_step of the same step")
        return _LatentStep(self, inputs, cache, work)

    def _divide(self, lengths: HostLengths) -> LatentWork:
        shape = self.shape
        query, context = lengths.query.astype(np.int64), lengths.context.astype(np.int64)
        expanded = expands(query, context, shape.mla)
        absorbed = tile_table(
            lengths.query,
            lengths.context,
            self.absorbed_config,
            group=self.absorbed_heads,
            kv_heads=shape.num_heads // self.absorbed_heads,
            programs=self.programs,
            first_rows=np.where(expanded, query, 0),
        )
        key_start = np.zeros(len(query), np.int32)
        groups = []
        for members in _grouped(np.flatnonzero(expanded), context):
            counts = context[members]
            key_start[members] = np.cumsum(counts) - counts
            mine = np.isin(np.arange(len(query)), members)
            tiles, _ = tile_table(
                lengths.query,
                lengths.context,
                self.expanded_config,
                group=1,
                kv_heads=1,
                programs=1,
                first_rows=np.where(mine, 0, query),
            )
            sequences = np.stack((members, key_start[members]), axis=1).astype(np.int32)
            groups.append(ExpandedGroup(tiles, sequences, int(counts.sum()), int(counts.max())))
        return LatentWork(lengths, absorbed, _spans(~expanded, query), tuple(groups), key_start)


def expands(query: np.ndarray, context: np.ndarray, mla: MlaSpec) -> np.ndarray:
    """`[R]` bool: whether expanding keys and values takes fewer operations of a head than absorbing queries.

    Args:
        query, context: `[R]` int64, query rows of each sequence and its positions in the cache after the step.
    """
    pairs = query * context - query * (query - 1) // 2  # visible
    absorbed = pairs * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
    expanded = pairs * (mla.head_dim + mla.v_head_dim)
    moving = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)  # of a query row, or of a position
    result: np.ndarray = (query > 1) & (expanded + context * moving < absorbed + query * moving)
    return result


def _grouped(sequences: np.ndarray, context: np.ndarray) -> list[np.ndarray]:
    """Consecutive sequences whose contexts are GROUP_POSITIONS together at most, or single ones."""
    groups: list[list[int]] = []
    size = 0
    for sequence in sequences.tolist():
        if not groups or size + context[sequence] > GROUP_POSITIONS:
            groups.append([])
            size = 0
        groups[-1].append(sequence)
        size += int(context[sequence])
    return [np.asarray(group, np.int64) for group in groups]


def _spans(chosen: np.ndarray, query: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Token rows of runs of chosen sequences."""
    ends = np.cumsum(query)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    runs = edges.reshape(-1, 2).tolist()
    return tuple((int(ends[first] - query[first]), int(ends[last - 1])) for first, last in runs)


class _LatentStep:
    """One step's attention; see `StepAttention` and the step's input in attention/latent.py."""

    def __init__(
        self, backend: TritonLatentAttention, inputs: DeviceInputs, cache: KVCache, work: LatentWork | None
    ) -> None:
        self._backend = backend
        self._inputs = inputs
        self._cache = cache
        self._groups = () if work is None else work.groups
        tokens = inputs.slot_mapping.shape[0]
        self._spans = ((0, tokens),) if work is None else work.spans
        self._query_scales = backend.transform.scales_at(inputs.positions[:tokens])
        self._plan: DecodePlan | None = None
        if inputs.lengths is None or (inputs.lengths.query == 1).any():
            config = backend.decode_config
            self._plan = plan_decode(
                query_start=inputs.query_start,
                context_lens=inputs.context_lens,
                rows=inputs.rows,
                num_kv_heads=1,
                window=None,
                config=config.decode,
                target=config.target(backend.shape.num_heads, inputs.context_lens.shape[0], backend.programs),
            )
        parts: list[torch.Tensor] = []
        used = 0
        for part in () if work is None else work.parts():
            parts.append(inputs.attention_table[used : used + part.size].view(part.shape))
            used += padded_size(part.size)
        self._absorbed = TileTable(*parts[:2]) if parts else None
        self._key_start = parts[2] if parts else inputs.context_lens[:0]
        self._expanded = list(zip(parts[3::2], parts[4::2], strict=True))

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        backend, inputs = self._backend, self._inputs
        shape, mla, transform = backend.shape, backend.shape.mla, backend.transform
        cache = self._cache.keys[layer]
        if self._query_scales is not None:
            qkv[: self._query_scales.shape[0], : shape.num_heads * mla.head_dim].mul_(self._query_scales)
        latent_to_cache(
            qkv,
            cache,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            cos=transform.cos,
            sin=transform.sin,
            norm=transform.norms[layer],
            norm_eps=transform.norm_eps,
            num_heads=shape.num_heads,
            head_dim=mla.head_dim,
        )
        rows, tokens = qkv.shape[0], inputs.slot_mapping.shape[0]
        out = torch.empty((rows, shape.num_heads, mla.v_head_dim), dtype=qkv.dtype, device=qkv.device)
        if tokens < rows:
            out[tokens:].zero_()
        if self._spans:
            self._attend_absorbed(layer, qkv, cache, out)
        for group, (tiles, sequences) in zip(self._groups, self._expanded, strict=True):
            self._attend_expanded(layer, qkv, cache, out, group, tiles, sequences)
        return out.view(rows, -1)

    def _attend_absorbed(self, layer: int, qkv: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> None:
        backend, inputs = self._backend, self._inputs
        shape, mla = backend.shape, backend.shape.mla
        queries = qkv[:, : shape.num_heads * mla.head_dim].view(-1, shape.num_heads, mla.head_dim)
        latents = torch.empty((2, qkv.shape[0], shape.num_heads, mla.kv_lora_rank), dtype=qkv.dtype, device=qkv.device)
        absorbed, attended = latents
        key_up, value_up = backend.transform.key_up[layer], backend.transform.value_up[layer]
        for first, last in self._spans:
            _heads_product(queries[first:last, :, : mla.qk_nope_head_dim], key_up, absorbed[first:last])
        if self._absorbed is not None:
            absorbed_attention(
                absorbed,
                qkv,
                cache,
                attended,
                table=self._absorbed,
                query_start=inputs.query_start,
                context_lens=inputs.context_lens,
                rows=inputs.rows,
                block_tables=inputs.block_tables,
                head_dim=mla.head_dim,
                scale=shape.scale,
                config=backend.absorbed_config,
                heads=backend.absorbed_heads,
            )
        if self._plan is not None:
            latent_decode(
                absorbed,
                qkv,
                cache,
                attended,
                plan=self._plan,
                block_tables=inputs.block_tables,
                head_dim=mla.head_dim,
                scale=shape.scale,
                config=backend.decode_config,
            )
        for first, last in self._spans:
            _heads_product(attended[first:last], value_up, out[first:last])

    def _attend_expanded(
        self,
        layer: int,
        qkv: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        group: ExpandedGroup,
        tiles: torch.Tensor,
        sequences: torch.Tensor,
    ) -> None:
        backend, inputs = self._backend, self._inputs
        shape, mla, transform = backend.shape, backend.shape.mla, backend.transform
        gathered = torch.empty((group.positions, mla.latent_dim), dtype=qkv.dtype, device=qkv.device)
        gather_latents(
            cache,
            gathered,
            sequences=sequences,
            longest=group.longest,
            context_lens=inputs.context_lens,
            rows=inputs.rows,
            block_tables=inputs.block_tables,
        )
        latents = gathered[:, : mla.kv_lora_rank]
        each = group.positions * (mla.qk_nope_head_dim + mla.v_head_dim) * qkv.itemsize
        at_once = max(1, EXPANDED_BYTES // each)
        for first in range(0, shape.num_heads, at_once):
            heads = slice(first, min(first + at_once, shape.num_heads))
            count = heads.stop - first
            expanded_attention(
                qkv,
                torch.bmm(latents.expand(count, -1, -1), transform.key_up[layer][heads]),
                gathered[:, mla.kv_lora_rank :],
                torch.bmm(latents.expand(count, -1, -1), transform.value_up[layer][heads].transpose(1, 2)),
                out,
                first_head=first,
                tiles=tiles,
                key_start=self._key_start,
                query_start=inputs.query_start,
                context_lens=inputs.context_lens,
                head_dim=mla.head_dim,
                scale=shape.scale,
                config=backend.expanded_config,
            )


def _heads_product(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """`out` `[n, heads, o]` = each head of `x` `[n, heads, i]` times the transpose of its own of `weights`
    `[heads, o, i]`, without copies of any."""
    if x.shape[0] <= MOST_ROWS:
        heads_product(x, weights, out)
        return
    torch.bmm(x.transpose(0, 1), weights.transpose(1, 2), out=out.transpose(0, 1))
