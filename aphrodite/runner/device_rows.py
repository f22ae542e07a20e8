"""Rows on an accelerator: token ids and block tables live in device tensors, a step carries only differences.

The host keeps a mirror of the block tables, because where K and V of a token go follows from the plan alone.
It never knows the newest token: that is read on the device, where the sampler of the step before wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.core.plan import NO_ADAPTER, RowStart, RowStep, StepPlan
from aphrodite.kernels.triton.lora import adapter_tiles, tile_count
from aphrodite.kernels.triton.step_inputs import gather_tokens, scatter
from aphrodite.runner.inputs import DeviceInputs, HostLengths, StepSize
from aphrodite.runner.transfers import Transfers

DECODE_SECTIONS = 8  # int32 values of a row in the inputs of a decode step
_UNCHANGED = (np.zeros(0, dtype=np.int32),) * 3


class StagedStep(NamedTuple):
    """A step's inputs on the device, and where its sampled tokens go.

    `sample_rows` and `sample_positions` `[S]` int32: of each entry of `logits_index` that samples.
    """

    inputs: DeviceInputs
    sample_rows: torch.Tensor
    sample_positions: torch.Tensor


class PaddedStep(NamedTuple):
    """The inputs of a padded step that is not only decoding, at fixed addresses.

    Attributes:
        packed: `[n]` int32, all sections as they come from the host.
        staged: views of them.
        token_rows: `[tokens]` int32, each token's row.
        changes: of block tables: row, column, block, as many as `_take_changes` may bring.
    """

    packed: torch.Tensor
    staged: StagedStep
    token_rows: torch.Tensor
    changes: Sequence[torch.Tensor]


class DeviceRows:
    """Tables of up to `num_rows` requests, and the inputs made from them.

    Attributes:
        num_rows: the spare row, which padding reads and writes, has this number.
        token_ids: `[num_rows + 1, max_model_len + 1]` int32; the extra column takes the token sampled at the
            last position of a full context.
        num_prompt: `[num_rows + 1]` int32, prompt lengths.
        block_tables: `[num_rows + 1, max_blocks]` int32.

    Args:
        num_adapters: slots for adapters.
    """

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, transfers: Transfers, *, num_adapters: int = 0
    ) -> None:
        device = transfers.device
        self.num_rows = num_rows
        self.max_model_len = max_model_len
        self.block_size = block_size
        self._transfers = transfers
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = torch.zeros(num_rows + 1, max_model_len + 1, dtype=torch.int32, device=device)
        self.num_prompt = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self._mirror = np.zeros((num_rows + 1, max_blocks), dtype=np.int32)
        self._block_counts = [0] * (num_rows + 1)
        # Changes of block tables that the device has not been told: (row, entries it had, blocks) each.
        self._changes: list[tuple[int, int, list[int]]] = []
        # A decode step's sections: slots (int64), rows, positions, context lengths, and as many changes of block tables
        # (row, column, block).
        self._decode = torch.zeros(DECODE_SECTIONS * _aligned(num_rows), dtype=torch.int32, device=device)
        self._decode_inputs: dict[int, StagedStep] = {}
        self._padded: dict[StepSize, PaddedStep] = {}
        self._counting = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._nothing = torch.zeros(0, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._num_adapters = num_adapters
        self._adapter_slots = np.full(num_rows + 1, NO_ADAPTER, dtype=np.int32)
        self._tiles: dict[int, torch.Tensor] = {}  # of captured steps with adapters, by their tokens

    def apply(self, plan: StepPlan) -> None:
        """Take over what the plan changes: new prompts and block tables."""
        for start in plan.starts:
            self._start(start)
        if self._changes:  # a step failed before it told the device
            self._take_changes(most=-1)
        for row, _, _, blocks, reset, *_ in plan.steps:
            if reset:
                self._block_counts[row] = 0
            if blocks:
                used = self._block_counts[row]
                self._mirror[row, used : used + len(blocks)] = blocks
                self._block_counts[row] = used + len(blocks)
                self._changes.append((row, used, blocks))

    def _take_changes(self, most: int) -> tuple[np.ndarray, ...]:
        """Row, column and block `[n]` of the changes that the device has not been told.

        Where there are more than `most`, it is told now, and n is 0.
        """
        changes, self._changes = self._changes, []
        if not changes:
            return _UNCHANGED
        lengths = [len(blocks) for _, _, blocks in changes]
        rows = np.repeat(np.array([row for row, _, _ in changes], dtype=np.int32), lengths)
        firsts = np.array([used for _, used, _ in changes], dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        columns = np.arange(ends[-1], dtype=np.int32) + np.repeat(firsts - (ends - lengths), lengths)
        blocks = np.fromiter(chain.from_iterable(blocks for _, _, blocks in changes), np.int32, ends[-1])
        if len(rows) <= most:
            return rows, columns, blocks
        scatter(self.block_tables, *self._copy_sections([rows, columns, blocks]))
        return _UNCHANGED

    def stage_decode(self, steps: Sequence[RowStep], bucket: int) -> StagedStep:
        """Copy the inputs of `steps`, one token each, to where `decode_inputs(bucket)` finds them."""
        count, width = len(steps), _aligned(bucket)
        packed = np.zeros(DECODE_SECTIONS * width, dtype=np.int32)
        slots = packed[: 2 * width].view(np.int64)
        sections = packed[2 * width :].reshape(-1, width)
        rows, positions = sections[0, :count], sections[1, :count]
        rows[:] = [step[0] for step in steps]
        positions[:] = [step[1] for step in steps]
        sections[0, count:] = self.num_rows
        np.add(positions, 1, out=sections[2, :count])
        slots[:count] = self._slots(rows, positions)
        slots[count:] = -1
        changed = self._take_changes(most=bucket) if steps else _UNCHANGED
        sections[3] = self.num_rows
        for section, values in zip(sections[3:], changed, strict=True):
            section[: len(values)] = values
        self._transfers.to_device(packed, self._decode[: len(packed)])
        return self.decode_inputs(bucket)

    def decode_inputs(self, bucket: int) -> StagedStep:
        """Views at fixed addresses of a decode step's inputs; `load_decode_step` has to come before they are read."""
        if bucket not in self._decode_inputs:
            self._decode_inputs[bucket] = self._decode_views(bucket)
        return self._decode_inputs[bucket]

    def _decode_views(self, bucket: int) -> StagedStep:
        rows, positions, context_lens, *_ = self._decode_sections(bucket)
        inputs = DeviceInputs(
            token_ids=self._tokens[:bucket],
            positions=positions,
            slot_mapping=self._decode[: 2 * bucket].view(torch.int64),
            query_start=self._counting[: bucket + 1],
            context_lens=context_lens,
            rows=rows,
            block_tables=self.block_tables,
            logits_index=self._counting[:bucket],
            lengths=None,
            attention_table=self._nothing,
        )
        return StagedStep(inputs, rows, context_lens)

    def _decode_sections(self, bucket: int) -> list[torch.Tensor]:
        """`[bucket]` int32 each: what comes behind the slots."""
        width = _aligned(bucket)
        sections = self._decode[2 * width : DECODE_SECTIONS * width].view(-1, width)
        return list(sections[:, :bucket])

    def load_decode_step(self, bucket: int) -> None:
        """Update block tables and read the newest token of every row: kernels, so that a graph may hold it."""
        inputs = self.decode_inputs(bucket).inputs
        scatter(self.block_tables, *self._decode_sections(bucket)[3:])
        gather_tokens(inputs.token_ids, self.token_ids, inputs.rows, inputs.positions)

    def stage_ragged(
        self, steps: Sequence[RowStep], logits_index: np.ndarray, sampling: Sequence[int], attention_table: np.ndarray
    ) -> StagedStep:
        """The inputs of any step.

        Args:
            logits_index: `[L]` int32, token rows whose logits are wanted.
            sampling: numbers of the steps that sample.
            attention_table: `[n]` int32, what the attention back end staged for the step.
        """
        ragged = self._ragged_sections(steps)
        rows, lengths = ragged.rows, ragged.lengths
        sections = [
            ragged.slots,
            ragged.token_rows,
            ragged.positions,
            rows,
            lengths.context,
            ragged.query_start,
            logits_index,
            rows[sampling],
            lengths.context[sampling],
            attention_table,
            *self._take_changes(most=self.block_tables.numel()),
        ]
        device = self._copy_sections(sections)
        if len(sections[-1]):
            scatter(self.block_tables, *device[-3:])
        tokens = torch.empty(len(ragged.positions), dtype=torch.int32, device=self.token_ids.device)
        gather_tokens(tokens, self.token_ids, device[1], device[2])
        inputs = DeviceInputs(
            token_ids=tokens,
            positions=device[2],
            slot_mapping=device[0].view(torch.int64),
            query_start=device[5],
            context_lens=device[4],
            rows=device[3],
            block_tables=self.block_tables,
            logits_index=device[6],
            lengths=lengths,
            attention_table=device[9],
        )
        return StagedStep(inputs, device[7], device[8])

    def stage_padded(
        self,
        steps: Sequence[RowStep],
        size: StepSize,
        logits_index: np.ndarray,
        sampling: Sequence[int],
        attention_table: np.ndarray,
    ) -> None:
        """Copy a step's inputs to where `padded_step` finds them; arguments as for `stage_ragged`."""
        ragged = self._ragged_sections(steps)
        rows, contexts = ragged.rows, ragged.lengths.context
        total = len(ragged.positions)
        spare = self.num_rows
        changed = self._take_changes(most=_table_changes(size)) if steps else _UNCHANGED
        sections = [
            (ragged.slots, -1),
            (ragged.token_rows, spare),
            (ragged.positions, 0),
            (rows, spare),
            (contexts, 0),
            (ragged.query_start, total),
            (logits_index, 0),
            (rows[sampling], spare),
            (contexts[sampling], 0),
            *zip(changed, (spare, 0, 0), strict=True),
            (attention_table, 0),
        ]
        widths = _padded_widths(size, len(attention_table))
        packed = np.empty(sum(widths), dtype=np.int32)
        used = 0
        for (values, filler), width in zip(sections, widths, strict=True):
            packed[used : used + len(values)] = values
            packed[used + len(values) : used + width] = filler
            used += width
        self._transfers.to_device(packed, self.padded_step(size, len(attention_table)).packed)

    def padded_step(self, size: StepSize, table_length: int) -> PaddedStep:
        """The inputs of padded steps of a size, made when it is first asked for."""
        size = size._replace(adapters=False)
        if size not in self._padded:
            widths = _padded_widths(size, table_length)
            packed = torch.zeros(sum(widths), dtype=torch.int32, device=self._decode.device)
            slots, token_rows, positions, rows, contexts, query_start, logits_index, *rest = packed.split(widths)
            sample_rows, sample_positions, *changes, attention_table = rest
            tokens, sequences = size[:2]
            inputs = DeviceInputs(
                token_ids=torch.zeros(tokens, dtype=torch.int32, device=packed.device),
                positions=positions[:tokens],
                slot_mapping=slots.view(torch.int64)[:tokens],
                query_start=query_start[: sequences + 1],
                context_lens=contexts[:sequences],
                rows=rows[:sequences],
                block_tables=self.block_tables,
                logits_index=logits_index[:sequences],
                lengths=None,
                attention_table=attention_table,
                padded=size,
            )
            staged = StagedStep(inputs, sample_rows[:sequences], sample_positions[:sequences])
            self._padded[size] = PaddedStep(packed, staged, token_rows[:tokens], changes)
        return self._padded[size]

    def load_padded_step(self, step: PaddedStep) -> None:
        """What `load_decode_step` does, for a padded step."""
        scatter(self.block_tables, *step.changes)
        gather_tokens(step.staged.inputs.token_ids, self.token_ids, step.token_rows, step.staged.inputs.positions)

    def has_adapters(self, steps: Sequence[RowStep]) -> bool:
        """Whether one of `steps` is computed with an adapter."""
        return self._num_adapters > 0 and any(self._adapter_slots[step.row] != NO_ADAPTER for step in steps)

    def stage_adapters(self, steps: Sequence[RowStep], size: StepSize | None = None) -> torch.Tensor:
        """The token rows of each adapter, on the device: for a captured step where `adapter_tiles(size)` finds them."""
        counts = [step.count for step in steps]
        slots = np.repeat(self._adapter_slots[[step.row for step in steps]], counts) if steps else _UNCHANGED[0]
        tiles = adapter_tiles(slots, sum(counts) if size is None else size.tokens, self._num_adapters)
        return self._transfers.to_device(tiles, None if size is None else self.adapter_tiles(size))

    def adapter_tiles(self, size: StepSize) -> torch.Tensor:
        """`[tiles, 1 + tile]` int32 at a fixed address."""
        if size.tokens not in self._tiles:
            tile, count = tile_count(size.tokens, self._num_adapters)
            self._tiles[size.tokens] = torch.full((count, 1 + tile), -1, dtype=torch.int32, device=self._tokens.device)
        return self._tiles[size.tokens]

    def append(self, staged: StagedStep, token_ids: torch.Tensor) -> None:
        """Write the sampled `token_ids` `[S]` int32 behind their rows' tokens: a kernel, as `load_decode_step`."""
        self.write(staged.sample_rows, staged.sample_positions, token_ids)

    def write(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Write `token_ids` `[N]` int32 at `positions` of `rows`, int32 on the device."""
        scatter(self.token_ids, rows, positions, token_ids)

    def _copy_sections(self, sections: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """int32 arrays on the device, by one copy."""
        starts = np.cumsum([0] + [_aligned(len(section)) for section in sections])
        packed = np.empty(starts[-1], dtype=np.int32)
        for start, section in zip(starts, sections, strict=False):
            packed[start : start + len(section)] = section
        device = self._transfers.to_device(packed)
        return [device[start : start + len(section)] for start, section in zip(starts, sections, strict=False)]

    def _start(self, start: RowStart) -> None:
        prompt = np.array(start.prompt_token_ids, dtype=np.int32)
        self._transfers.to_device(prompt, self.token_ids[start.row, : len(prompt)])
        self.num_prompt[start.row].fill_(len(prompt))  # an assignment would wait for the device
        self._block_counts[start.row] = 0
        self._adapter_slots[start.row] = start.adapter_slot

    def _ragged_sections(self, steps: Sequence[RowStep]) -> _RaggedSections:
        rows = np.array([step.row for step in steps], dtype=np.int32)
        starts = np.array([step.start for step in steps], dtype=np.int32)
        lengths = ragged_lengths(steps)
        query_start = np.zeros(len(steps) + 1, dtype=np.int32)
        np.cumsum(lengths.query, out=query_start[1:])
        token_rows = np.repeat(rows, lengths.query)
        positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], lengths.query)
        slots = self._slots(token_rows, positions).view(np.int32)
        return _RaggedSections(lengths, rows, query_start, token_rows, positions, slots)

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`[N]` int64: where K and V of the tokens go."""
        blocks: np.ndarray = self._mirror[rows, positions // self.block_size].astype(np.int64)
        slots: np.ndarray = blocks * self.block_size + positions % self.block_size
        return slots


class _RaggedSections(NamedTuple):
    """What a step of any kind reads, on the host; int32."""

    lengths: HostLengths
    rows: np.ndarray  # [R]
    query_start: np.ndarray  # [R + 1]
    token_rows: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    slots: np.ndarray  # [2 * T], pairs that are int64


def _table_changes(size: StepSize) -> int:
    """Entries of block tables that come with a padded step: about a block for every sequence, and those of prompts."""
    return _aligned(size.sequences + size.tokens // 16)


def _padded_widths(size: StepSize, table_length: int) -> list[int]:
    """Room for each section of a padded step, in the order of `stage_padded`."""
    tokens, sequences, changes = _aligned(size.tokens), _aligned(size.sequences), _table_changes(size)
    starts = _aligned(size.sequences + 1)
    return [2 * tokens, tokens, tokens, sequences, sequences, starts, *[sequences] * 3, *[changes] * 3, table_length]


def _aligned(count: int) -> int:
    """`count` int32 values rounded up to 16 bytes: Triton compiles kernels anew for pointers less aligned."""
    return -(-count // 4) * 4


def ragged_lengths(steps: Sequence[RowStep]) -> HostLengths:
    """Tokens that each of `steps` computes, and the context that it has then."""
    query = np.array([step.count for step in steps], dtype=np.int32)
    return HostLengths(query, query + np.array([step.start for step in steps], dtype=np.int32))
