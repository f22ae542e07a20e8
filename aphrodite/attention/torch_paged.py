"""Paged attention in torch ops: keys and values of a group are gathered into dense tensors, then attended.

Two back ends share everything but the last step. `TiledAttention` is bitwise batch-invariant;
`SdpaAttention` takes torch's fused attention, which is faster and is not.

Cost per decode step: the cached K and V are read once and written and read once more as a dense copy.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from aphrodite.attention.backend import AttentionShape, KVCache, QueryKeyTransform, RotaryTable, StepAttention
from aphrodite.attention.softcap import soft_cap
from aphrodite.attention.step_plan import MAX_QUERIES, AttentionGroup, StepPlanner
from aphrodite.kernels.dispatch import Declined
from aphrodite.runner.inputs import ForwardInputs

KEY_TILE = 256  # positions that the tiled back end multiplies at once
ROW_MULTIPLE = 16  # fewer rows make MKL switch to matrix-vector kernels


class TiledAttention:
    """Batch-invariant attention for float32 on the CPU.

    A sequence's result must not depend on who else is in the batch or how its prompt was cut. So every
    matrix product has the same inner shape (a key tile of fixed size at a fixed offset, rows padded to
    a multiple of 16), and partial sums of the tiles are added in the order of the positions: tiles that
    another sequence of the group needs and this one does not add exact zeros.
    """

    name = "torch tiled"

    def __init__(self, shape: AttentionShape, transform: QueryKeyTransform) -> None:
        self._shape = shape
        self._transform = transform
        self._tile = shape.block_size * max(1, KEY_TILE // shape.block_size)

    @staticmethod
    def decline(shape: AttentionShape) -> Declined | None:
        if shape.device.type != "cpu":
            return Declined(f"only for the CPU, not {shape.device.type}")
        if shape.dtype != torch.float32:
            return Declined(f"only for float32, not {shape.dtype}")
        return None

    def allocate(self, num_blocks: int) -> KVCache:
        return _allocate(self._shape, num_blocks)

    def begin_step(self, inputs: ForwardInputs, cache: KVCache) -> StepAttention:
        return _PagedStep(self._shape, self._transform, inputs, cache, self.plan_step(inputs), self.attend)

    def plan_step(self, inputs: ForwardInputs) -> StepPlanner:
        """The groups in which `attend` takes a step's sequences."""
        return StepPlanner(
            inputs,
            dtype=self._shape.dtype,
            block_size=self._shape.block_size,
            tile=self._tile,
            group=self._shape.group,
            query_multiple=ROW_MULTIPLE,
            row_multiple=ROW_MULTIPLE,
        )

    def verify(self) -> bool:
        """Whether this machine's batched products give a row the same bits in every shape that occurs."""
        shape = self._shape
        most_rows = -(-MAX_QUERIES * shape.group // ROW_MULTIPLE) * ROW_MULTIPLE
        generator = torch.Generator().manual_seed(0)
        batch = 4 * shape.num_kv_heads
        query = torch.randn((batch, most_rows, shape.head_dim), generator=generator)
        keys = torch.randn((batch, self._tile, shape.head_dim), generator=generator).transpose(1, 2)
        weights = torch.rand((batch, most_rows, self._tile), generator=generator)
        values = torch.randn((batch, self._tile, shape.head_dim), generator=generator)
        few = {ROW_MULTIPLE, 2 * ROW_MULTIPLE, ROW_MULTIPLE * shape.group, most_rows - ROW_MULTIPLE, most_rows}
        return all(
            torch.equal(torch.bmm(left[:size, :rows], right[:size]), torch.bmm(left, right)[:size, :rows])
            for left, right in ((query, keys), (weights, values))
            for size in {1, 2, shape.num_kv_heads, batch}
            for rows in few
            if 0 < rows <= most_rows
        )

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `GroupAttention`."""
        heads, batch, rows, dim = query.shape
        tiles = group.num_keys // self._tile
        tiled = (heads, batch, tiles, rows)
        queries = query[:, :, None].expand(heads, batch, tiles, rows, dim).reshape(-1, rows, dim)
        keys = keys.view(-1, self._tile, dim)
        values = values.view(-1, self._tile, values.shape[-1])

        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(self._shape.scale).view(*tiled, self._tile)
        if self._shape.softcap:
            scores = soft_cap(scores, self._shape.softcap)
        scores.add_(group.bias.view(batch, rows, tiles, self._tile).transpose(1, 2))
        peak = scores.amax(dim=(2, 4), keepdim=True)
        weights = scores.sub_(peak).exp_()
        sums = weights.sum(dim=-1, keepdim=True)
        parts = torch.bmm(weights.view(-1, rows, self._tile), values).view(*tiled, values.shape[-1])

        total, out = sums[:, :, 0], parts[:, :, 0]
        for tile in range(1, tiles):  # not sum(): its order of additions depends on the number of tiles
            total = total + sums[:, :, tile]
            out = out + parts[:, :, tile]
        return out / (total if sinks is None else total + torch.exp(sinks - peak[:, :, 0]))


class SdpaAttention:
    """Attention through `torch.nn.functional.scaled_dot_product_attention`, for any dtype and device.

    Not batch-invariant: torch picks tile sizes by the shape of the batch.
    """

    name = "torch sdpa"

    def __init__(self, shape: AttentionShape, transform: QueryKeyTransform) -> None:
        self._shape = shape
        self._transform = transform

    def allocate(self, num_blocks: int) -> KVCache:
        return _allocate(self._shape, num_blocks)

    def begin_step(self, inputs: ForwardInputs, cache: KVCache) -> StepAttention:
        return _PagedStep(self._shape, self._transform, inputs, cache, self.plan_step(inputs), self.attend)

    def plan_step(self, inputs: ForwardInputs) -> StepPlanner:
        """The groups in which `attend` takes a step's sequences."""
        block_size = self._shape.block_size
        return StepPlanner(
            inputs,
            dtype=self._shape.dtype,
            block_size=block_size,
            tile=block_size,
            group=self._shape.group,
            query_multiple=1,
            row_multiple=1,
        )

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `GroupAttention`."""
        if self._shape.softcap or sinks is not None:
            return self._attend_in_parts(query, keys, values, group, sinks)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=group.bias[:, None],
            scale=self._shape.scale,
        )
        return out.transpose(0, 1)

    def _attend_in_parts(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same with bounded scores or sinks, which torch's function does not know."""
        scores = (query @ keys.transpose(2, 3)).float().mul_(self._shape.scale)
        if self._shape.softcap:
            scores = soft_cap(scores, self._shape.softcap)
        scores = scores.add_(group.bias)
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
        return weights.to(values.dtype) @ values


class GroupAttention(Protocol):
    """Attention of one group."""

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query `[kv_heads, B, M, head_dim]`, keys and values `[kv_heads, B, K, head_dim]`; returns as query, in the
        size of the values. `sinks` `[kv_heads, 1, M, 1]` float32 are scores that take part and add no value."""


class _PagedStep:
    """One step over a cache laid out `[layers, kv_heads, blocks, block_size, head_dim]`.

    KV heads are outermost, so the gathered blocks of a head already are a dense matrix.
    """

    def __init__(
        self,
        shape: AttentionShape,
        transform: QueryKeyTransform,
        inputs: ForwardInputs,
        cache: KVCache,
        planner: StepPlanner,
        attend: GroupAttention,
    ) -> None:
        self._shape = shape
        self._transform = transform
        self._slots = inputs.slot_mapping
        self._positions = inputs.positions
        self._angles: dict[int, RotaryTable] = {}  # by the identity of the table that they are from
        self._query_scales = transform.scales_at(inputs.positions)
        self._cache = cache
        self._planner = planner
        self._attend = attend

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        shape = self._shape
        if self._query_scales is not None:
            qkv[:, : shape.num_heads * shape.head_dim].mul_(self._query_scales)
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
        rotated = shape.num_heads + shape.num_kv_heads
        query, key, value = heads[:, : shape.num_heads], heads[:, shape.num_heads : rotated], heads[:, rotated:]
        if self._transform.query_norms:
            query = self._norm(query, self._transform.query_norms[layer])
            key = self._norm(key, self._transform.key_norms[layer])
        cos, sin = self._angles_of(layer)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        num_tokens = self._slots.shape[0]
        keys.flatten(1, 2).index_copy_(1, self._slots, key[:num_tokens].transpose(0, 1))
        values.flatten(1, 2).index_copy_(1, self._slots, value[:num_tokens].transpose(0, 1))
        out = query.new_zeros(query.shape[0], shape.num_heads * shape.head_dim)
        for group in self._planner.groups(shape.windows[layer]):
            folded = fold_queries(query, group, shape.num_kv_heads)
            sinks = self._sinks(layer, folded.shape[2])
            attended = self._attend(folded, gather_slots(keys, group), gather_slots(values, group), group, sinks)
            out.index_copy_(0, group.query_rows[: group.num_queries], unfold_queries(attended, group, shape.num_heads))
        return out

    def _sinks(self, layer: int, rows: int) -> torch.Tensor | None:
        """A layer's sinks for folded queries, `[kv_heads, 1, rows, 1]`; those of rows of padding do not matter."""
        if not self._transform.sinks:
            return None
        of_groups = self._transform.sinks[layer].view(self._shape.num_kv_heads, -1)
        times = -(-rows // of_groups.shape[1])
        return of_groups.repeat(1, times)[:, None, :rows, None]

    def _angles_of(self, layer: int) -> RotaryTable:
        """Cosines and sines of this step's positions, `[rows, 1, rotated / 2]`; layers that turn alike share them."""
        cos, sin = self._transform.table(layer)
        if id(cos) not in self._angles:
            picked = (table.index_select(0, self._positions)[:, None] for table in (cos, sin))
            self._angles[id(cos)] = RotaryTable(*picked)
        return self._angles[id(cos)]

    def _norm(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = heads.to(weight.dtype)
        return F.rms_norm(wide, (self._shape.head_dim,), weight, self._transform.norm_eps).to(heads.dtype)


def gather_slots(cache: torch.Tensor, group: AttentionGroup) -> torch.Tensor:
    """`[kv_heads, B, K, dim]` of a layer's cache `[kv_heads, blocks, block_size, dim]`."""
    gathered = cache.flatten(1, 2).index_select(1, group.slots)
    return gathered.view(cache.shape[0], group.batch, group.num_keys, cache.shape[-1])


def fold_queries(query: torch.Tensor, group: AttentionGroup, kv_heads: int) -> torch.Tensor:
    """`[kv_heads, B, M, dim]` of `[rows, heads, dim]`: queries of the heads that share a KV head become rows."""
    _, heads, dim = query.shape
    picked = query.index_select(0, group.query_rows).view(group.batch, -1, kv_heads, heads // kv_heads, dim)
    folded = picked.permute(2, 0, 1, 3, 4).reshape(kv_heads, group.batch, -1, dim)
    missing = group.bias.shape[1] - folded.shape[2]
    return F.pad(folded, (0, 0, 0, missing)) if missing else folded


def unfold_queries(attended: torch.Tensor, group: AttentionGroup, heads: int) -> torch.Tensor:
    """`[num_queries, heads * dim]` of `[kv_heads, B, M, dim]`: the reverse of `fold_queries`, without padding."""
    kv_heads, batch, _, dim = attended.shape
    queries, shared = group.query_rows.shape[0] // batch, heads // kv_heads
    rows = attended[:, :, : queries * shared].reshape(kv_heads, batch, queries, shared, dim)
    return rows.permute(1, 2, 0, 3, 4).reshape(batch * queries, -1)[: group.num_queries]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + rotated / 2) of `[rows, heads, head_dim]` in float32; the rest passes through.

    Args:
        cos, sin: `[rows, 1, rotated / 2]` float32.
    """
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _allocate(shape: AttentionShape, num_blocks: int) -> KVCache:
    size = (shape.num_layers, shape.num_kv_heads, num_blocks, shape.block_size, shape.head_dim)
    return KVCache(
        torch.zeros(size, dtype=shape.dtype, device=shape.device),
        torch.zeros(size, dtype=shape.dtype, device=shape.device),
    )
