"""How one step's ragged queries are cut into rectangular groups for batched torch attention.

Sequences that decode (one query) are batched with others of similar context; longer query runs are cut
into chunks of their own, so that early queries do not pay for late keys. Keys of a group are a whole
number of tiles that begin at a multiple of the tile size: a query then meets its keys in the same tiles
however the step was composed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aphrodite.runner.inputs import ForwardInputs

MAX_QUERIES = 128  # of one prefill group; bounds the score matrix
MAX_KEYS = 65_536  # of one decode group, summed over its sequences; bounds the gathered copy


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """B sequences with Q queries each (padded), and the K key positions that any of them sees.

    A query row's `group` heads that share a KV head are folded into the rows: M = Q * group, query-major.
    """

    query_rows: torch.Tensor  # [B * Q] int64 token rows; padding repeats the last one
    num_queries: int  # real ones among them, in front
    slots: torch.Tensor  # [B * K] int64 cache slots; beyond the context, that of the latest position
    bias: torch.Tensor  # [B, M, K]: 0 where this query row sees the key, -inf where it does not
    batch: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive queries of one sequence."""

    sequence: int
    row: int
    position: int
    count: int
    first_tile: int
    tiles: int


class StepPlanner:
    """Groups of one step by window; each is made when the first layer that needs it asks.

    Reads the lengths on the host, which on an accelerator waits for the device once a step.
    """

    def __init__(
        self,
        inputs: ForwardInputs,
        *,
        dtype: torch.dtype,
        block_size: int,
        tile: int,
        group: int,
        query_multiple: int,
        row_multiple: int,
    ) -> None:
        """Args:
        dtype: of the bias, which is added to scores.
        block_size: positions of a cache block.
        tile: positions of a key tile, a multiple of `block_size`.
        group: query heads per KV head.
        query_multiple: queries of a prefill group are padded to a multiple of this.
        row_multiple: M is padded to a multiple of this.
        """
        self._inputs = inputs
        self._dtype = dtype
        self._block_size = block_size
        self._tile = tile
        self._group = group
        self._query_multiple = query_multiple
        self._row_multiple = row_multiple
        self._starts: list[int] = inputs.query_start.tolist()
        self._contexts: list[int] = inputs.context_lens.tolist()
        self._by_window: dict[int | None, list[AttentionGroup]] = {}

    def groups(self, window: int | None) -> list[AttentionGroup]:
        """The step's groups for layers of this window."""
        if window not in self._by_window:
            self._by_window[window] = [self._build(runs, window) for runs in self._batches(window)]
        return self._by_window[window]

    def _batches(self, window: int | None) -> list[list[_Run]]:
        batches: list[list[_Run]] = []
        decodes: dict[int, list[_Run]] = {}
        for sequence, context in enumerate(self._contexts):
            first, last = self._starts[sequence], self._starts[sequence + 1]
            for row in range(first, last, MAX_QUERIES):
                count = min(MAX_QUERIES, last - row)
                run = self._run(sequence, row, context - (last - row), count, window)
                if last - first > 1:
                    batches.append([run])
                else:
                    decodes.setdefault(run.tiles.bit_length(), []).append(run)
        for runs in decodes.values():
            keys_each = max(run.tiles for run in runs) * self._tile
            size = max(1, MAX_KEYS // keys_each)
            batches.extend(runs[at : at + size] for at in range(0, len(runs), size))
        return batches

    def _run(self, sequence: int, row: int, position: int, count: int, window: int | None) -> _Run:
        oldest = 0 if window is None else max(0, position - window + 1)
        first_tile = oldest // self._tile
        tiles = (position + count - 1) // self._tile - first_tile + 1
        return _Run(sequence, row, position, count, first_tile, tiles)

    def _build(self, runs: list[_Run], window: int | None) -> AttentionGroup:
        device = self._inputs.block_tables.device
        queries = runs[0].count
        if queries > 1:
            queries = -(-queries // self._query_multiple) * self._query_multiple
        num_keys = max(run.tiles for run in runs) * self._tile

        # [fields, B]: one transfer to the device for all that varies by sequence.
        fields = [(run.sequence, run.row, run.position, run.count, run.first_tile * self._tile) for run in runs]
        sequence, row, position, count, oldest = torch.tensor(fields, dtype=torch.int64).to(device).unbind(1)
        step = torch.minimum(torch.arange(queries, device=device), count[:, None] - 1)  # [B, Q], padding repeats
        keys = oldest[:, None] + torch.arange(num_keys, device=device)  # [B, K]
        query_positions = (position[:, None] + step)[:, :, None]
        hidden = keys[:, None, :] > query_positions
        if window is not None:
            hidden |= keys[:, None, :] <= query_positions - window
        bias = torch.zeros(hidden.shape, dtype=self._dtype, device=device).masked_fill_(hidden, float("-inf"))
        bias = bias.repeat_interleave(self._group, dim=1)
        missing = -bias.shape[1] % self._row_multiple
        if missing:
            bias = torch.cat((bias, bias[:, -1:].expand(-1, missing, -1)), dim=1)
        return AttentionGroup(
            query_rows=(row[:, None] + step).flatten(),
            num_queries=sum(run.count for run in runs),
            slots=self._cache_slots(sequence, torch.minimum(keys, (position + count - 1)[:, None])),
            bias=bias,
            batch=len(runs),
            num_keys=num_keys,
        )

    def _cache_slots(self, sequence: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Slots of `positions` `[B, K]`, flat.

        No position lies beyond its sequence's context: what the cache holds there may be another
        request's, and a NaN of it would survive a weight of zero.
        """
        blocks = self._inputs.block_tables[sequence].gather(1, positions // self._block_size).long()
        return (blocks * self._block_size + positions % self._block_size).flatten()
