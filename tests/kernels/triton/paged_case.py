"""A step over a scattered paged cache, for the attention kernels' tests on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aphrodite.kernels import reference


@dataclass(frozen=True)
class PagedStep:
    """Ragged queries over a cache that holds their keys and values; blocks and table rows in random order.

    qkv `[T, (heads + 2 * kv_heads) * head_dim]`; keys and values `[blocks, kv_heads, block_size, head_dim]`;
    whatever no sequence owns in the cache is NaN.
    """

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    rows: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    heads: int

    @property
    def scale(self) -> float:
        return float(self.keys.shape[-1] ** -0.5)

    @property
    def queries(self) -> torch.Tensor:
        head_dim = self.keys.shape[-1]
        return self.qkv[:, : self.heads * head_dim].view(-1, self.heads, head_dim)

    def expected(
        self, window: int | None = None, softcap: float = 0.0, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T, heads * head_dim]` float64 of the reference; zeros for sequences without context."""
        host = self.cpu()
        live = host.context_lens > 0
        counts = host.query_start.diff()
        real = torch.repeat_interleave(live, counts.long())
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), counts[live].cumsum(0).int()))
        out = torch.zeros(host.queries.shape, dtype=torch.float64)
        out[real] = reference.paged_attention(
            host.queries[real].double(),
            host.keys.transpose(1, 2).double(),
            host.values.transpose(1, 2).double(),
            starts,
            host.context_lens[live],
            host.block_tables[host.rows[live].long()],
            scale=self.scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.cpu().double(),
        )
        return out.flatten(1)

    def cpu(self) -> PagedStep:
        return PagedStep(**{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()})


def make_step(
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    block_size: int = 16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PagedStep:
    """A step of sequences of (query rows, context); context 0 is padding, whose slots are -1."""
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = kv_dtype or dtype
    blocks_of = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(blocks_of) + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    num_rows = len(lengths) + 2
    rows = torch.randperm(num_rows, generator=generator)[: len(lengths)].int()
    tables = torch.full((num_rows, max(blocks_of) + 2), num_blocks - 1, dtype=torch.int32)
    owned = torch.zeros(num_blocks * block_size, dtype=torch.bool)
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for row, count, (queries, context) in zip(rows.tolist(), blocks_of, lengths, strict=True):
        mine = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
        tables[row, :count] = mine.int()
        where = torch.arange(context)
        slot = mine[where // block_size] * block_size + where % block_size if context else where
        owned[slot] = True
        positions += range(context - queries, context) if context else [0] * queries
        slots += slot[context - queries :].tolist() if context else [-1] * queries
        starts.append(starts[-1] + queries)
    qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * head_dim, generator=generator)
    cache = torch.randn(2, num_blocks, block_size, kv_heads, head_dim, generator=generator)
    cache.flatten(1, 2)[:, ~owned] = float("nan")
    keys, values = cache.transpose(2, 3).to(kv_dtype).to(device).unbind(0)
    return PagedStep(
        qkv.to(dtype).to(device),
        keys.contiguous(),
        values.contiguous(),
        tables.to(device),
        rows.to(device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor([context for _, context in lengths], dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        torch.tensor(slots, dtype=torch.int64, device=device),
        heads,
    )
