"""The fast path on GPUs: rows' plans as records in a table on the device, sampled by kernels/triton/sampling.py.

A row whose plan has something that the kernels do not do (`encode` says what) goes through the torch stages; the choice
depends on its plan alone. Nothing here waits for the device, and `run` can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from aphrodite.kernels.cpu.sampling import NativeSampling
from aphrodite.kernels.dispatch import log_once
from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.logprobs import MAX_TOP, top_logprobs
from aphrodite.kernels.triton.sampling import Launches, Outputs, SamplingKernels
from aphrodite.sampling.breakers import Breakers
from aphrodite.sampling.followers import TokenFollower, mask_logits
from aphrodite.sampling.fused import Choices, HostChoices
from aphrodite.sampling.logprobs import LogprobTensors, gather_logprobs
from aphrodite.sampling.plan import SamplingPlan
from aphrodite.sampling.stages.base import SamplerInfo
from aphrodite.sampling.triton_plan import Declined, Op, RowProgram, encode


class TritonSampler:
    """Rows that the device samples by itself.

    Attributes:
        rows: those that take this path.
        wanted: of these, how many top log-probabilities each wants, where it wants any.
        native: None; there is no native library on this path.
        launch_levels: all that `stage` can say.
    """

    launch_levels = tuple(Launches)

    def __init__(self, info: SamplerInfo) -> None:
        self.native: NativeSampling | None = None
        self.rows: set[int] = set()
        self.wanted: dict[int, int] = {}
        self.kernels = SamplingKernels(info.num_rows, info.vocab_size, info.token_ids)
        self._device = info.device
        self._vocab, self._positions = info.vocab_size, info.token_ids.shape[1] + 2
        self._num_prompt: dict[int, int] = {}
        self._records = np.zeros((info.num_rows, r.RECORD.value), np.int32)
        self._memory: dict[int, list[torch.Tensor]] = {}  # what each row's record points to
        self._programs: dict[int, RowProgram] = {}
        self._launches: dict[int, Launches] = {}
        self._barred: dict[int, torch.Tensor] = {}
        self._processed: set[int] = set()
        self._followers: dict[int, tuple[TokenFollower, ...]] = {}
        self._breakers: WeakKeyDictionary[Breakers, torch.Tensor] = WeakKeyDictionary()

    def start(self, row: int, plan: SamplingPlan, seed: int, num_prompt: int) -> bool:
        """Take the row if the kernels can do its whole plan, and say whether."""
        program = encode(plan, self._vocab)
        if isinstance(program, Declined):
            log_once(logging.INFO, f"a request is sampled by torch operations, slower: {program.reason}")
            return False
        self.rows.add(row)
        self._programs[row], self._num_prompt[row] = program, num_prompt
        if plan.followers:
            self._followers[row] = plan.followers
        self._launches[row] = _launches_of(program, plan.greedy)
        if plan.logprobs is not None:
            self.wanted[row] = plan.logprobs
            if plan.processed_logprobs:
                self._processed.add(row)
        record = self._records[row]
        record[:] = 0
        record[r.ACTIVE.value], record[r.GREEDY.value] = 1, plan.greedy
        record[r.SEED_LOW.value : r.SEED_HIGH.value + 1] = np.array([seed], np.uint64).view(np.int32)
        record[r.NUM_PROMPT.value], record[r.BARRED_AT.value] = num_prompt, -1
        record[r.FLAGS.value] = program.flags
        record[r.EDITS.value : r.ALL.value + 1] = program.edits, program.num_ops, len(program.ops)
        memory = self._memory[row] = list[torch.Tensor]()
        self._point(record, r.BIAS.value, self._keep(memory, np.array(program.amounts, np.float32)))
        for number, op in enumerate(program.ops):
            begin = r.HEADER.value + number * r.OP_WORDS.value
            self._write_op(record[begin : begin + r.OP_WORDS.value], op, memory)
        self._mark(row, program)
        self._count(row, num_prompt)
        self._send(row)
        return True

    def end(self, row: int) -> None:
        """The row's request is gone and the row is free."""
        self.rows.remove(row)
        self.wanted.pop(row, None)
        self._processed.discard(row)
        self._barred.pop(row, None)
        self._followers.pop(row, None)
        program = self._programs.pop(row)
        del self._num_prompt[row], self._launches[row]
        self._memory.pop(row, None)  # steps in flight come first on the stream on which it would be used again
        if program.marks or program.only_allowed:
            self.kernels.marks[row].zero_()
        self._records[row] = 0
        self._send(row)

    def rewind(self, row: int, position: int) -> None:
        """Forget the row's tokens at `position` and after it; its history is right before that."""
        self._count(row, position)

    def _count(self, row: int, position: int) -> None:
        """Count the row's tokens before `position`, if its penalties look at them."""
        if not self._programs[row].flags & r.COUNTS.value:
            return
        num_prompt = self._num_prompt[row]
        history = self.kernels.history[row, :position].long()
        counts = self.kernels.counts[row].zero_()
        counts.index_fill_(0, history[:num_prompt], r.IN_PROMPT.value)
        counts.index_add_(0, history[num_prompt:], torch.ones_like(history[num_prompt:], dtype=torch.int32))

    def choices(self, count: int) -> HostChoices:
        """New memory for the choices of `count` rows, which may be on their way to the host for a while."""
        return HostChoices.of(Choices.empty(count, self._device))

    def stage(self, rows: Sequence[int], positions: Sequence[int], barred: Mapping[int, Set[int]]) -> Launches:
        """Set which tokens each row may not choose at its position, and say what `run` has to launch for these rows."""
        launches = max(map(self._launches.__getitem__, rows), default=Launches.GREEDY)
        if not barred and not self._barred:
            return launches
        for row, position in zip(rows, positions, strict=True):
            if row in barred or row in self._barred:
                self._bar(row, position, barred.get(row, ()))
                launches = Launches.MARKED
        return launches

    def _bar(self, row: int, position: int, token_ids: Iterable[int]) -> None:
        """Never choose `token_ids` for the row at `position`; it replaces what was barred for the row before."""
        record, barred = self._records[row], np.array(sorted(token_ids), np.int32)
        if barred.size:
            self._barred[row] = self._upload(barred)
            self._point(record, r.BARRED.value, self._barred[row].data_ptr())
            record[r.FLAGS.value] |= r.MARKED.value | r.HISTORY.value
        elif self._barred.pop(row, None) is None:
            return
        else:
            record[r.FLAGS.value] = self._programs[row].flags
        record[r.BARRED_COUNT.value], record[r.BARRED_AT.value] = len(barred), position
        self._send(row)

    def run(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        ok: torch.Tensor,
        exhausted: torch.Tensor,
        launches: Hashable,
    ) -> None:
        """Sample B rows (`SamplingKernels.run`). Rows of the other path and padding get token 0, not ok."""
        outputs = Outputs(token_ids, ok, exhausted)
        self.kernels.run(logits, rows, positions, outputs, cast("Launches", launches))

    def sample(
        self,
        logits: torch.Tensor,
        entries: Sequence[int] | None,
        rows: Sequence[int],
        positions: Sequence[int],
        barred: Mapping[int, Set[int]],
        choices: HostChoices,
    ) -> tuple[LogprobTensors | None, dict[int, int]]:
        """Sample `entries` (None: all) of `logits` [L, vocab]; the rest is as in `FusedSampler.sample`."""
        launches = self.stage(rows, positions, barred)
        # Both at multiples of 16 bytes: Triton compiles kernels anew for pointers less aligned.
        places = np.zeros((2, -(-len(rows) // 4) * 4), np.int32)
        places[:, : len(rows)] = rows, positions
        row_numbers, row_positions = self._upload(places)[:, : len(rows)]
        index = None if entries is None else self._upload(np.array(entries, np.int64))
        part = logits if index is None else logits[index]
        chosen = choices.tensors if index is None else Choices.empty(len(rows), self._device)
        numbers = list(range(len(rows)) if entries is None else entries)
        wanted = {number: self.wanted[row] for number, row in zip(numbers, rows, strict=True) if row in self.wanted}
        processed = torch.empty_like(part, dtype=torch.float32) if not self._processed.isdisjoint(rows) else None
        allowed = self._allowed(part, rows, keep=bool(wanted))
        self.kernels.run(allowed, row_numbers, row_positions, Outputs(*chosen), launches, processed)
        if index is not None:
            for whole, some in zip(choices.tensors, chosen, strict=True):
                whole[index] = some
        if not wanted:
            return None, wanted
        return self._logprobs(part, processed, rows, chosen.token_ids, max(wanted.values())), wanted

    def _allowed(self, logits: torch.Tensor, rows: Sequence[int], *, keep: bool) -> torch.Tensor:
        """What the rows' grammars and budgets leave of `logits` [R, vocab], which with `keep` stay as they are."""
        if not self._followers:
            return logits
        words: dict[int, npt.NDArray[np.int32]] = {}
        for number, row in enumerate(rows):
            masks = [one.words for one in self._followers.get(row, ())]
            known = [mask for mask in masks if mask is not None]
            if known:
                words[number] = np.bitwise_and.reduce(known)
        if not words:
            return logits
        index = self._upload(np.array(list(words), np.int64))
        allowed = logits.clone() if keep else logits
        allowed[index] = mask_logits(logits[index], list(words.values()))
        return allowed

    def _logprobs(
        self, logits: torch.Tensor, processed: torch.Tensor | None, rows: Sequence[int], chosen: torch.Tensor, k: int
    ) -> LogprobTensors:
        """Of the rows that want any; k is the longest list of them."""
        asking = [number for number, row in enumerate(rows) if row in self.wanted]
        entries = self._upload(np.array(asking, np.int64))
        token_ids = chosen[entries].long()
        if processed is not None:
            last = self._upload(np.array([rows[number] in self._processed for number in asking]))
            logits = torch.where(last[:, None], processed[entries], logits[entries].float())
            entries = torch.arange(len(asking), device=self._device)
        return self.logprobs(logits, entries, token_ids, k)

    def logprobs(self, logits: torch.Tensor, entries: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobTensors:
        """`gather_logprobs` of the rows `entries` [W] of `logits`, on the device; `token_ids` [W] int64."""
        k = min(k, logits.shape[-1])
        if k > MAX_TOP:
            return gather_logprobs(logits[entries].float(), token_ids, k)
        return LogprobTensors(token_ids, *top_logprobs(logits, entries, token_ids, k))

    def _mark(self, row: int, program: RowProgram) -> None:
        """Write the marks that last as long as the request."""
        if program.only_allowed:
            self.kernels.marks[row].fill_(r.BANNED.value)
        if program.marks:
            tokens = self._upload(np.array(list(program.marks), np.int64))
            self.kernels.marks[row].index_copy_(0, tokens, self._upload(np.array([*program.marks.values()], np.int32)))

    def _write_op(self, words: npt.NDArray[np.int32], op: Op, memory: list[torch.Tensor]) -> None:
        words[r.CODE.value], words[r.COUNT.value] = op.code, op.length
        words[r.FIRST.value], words[r.SECOND.value] = op.first, op.second
        values = np.array(op.values, np.float32).view(np.int32)
        words[r.VALUES.value : r.VALUES.value + len(values)] = values
        data = np.zeros(self._positions, np.float32) if op.numbers else op.data
        if data is not None:
            self._point(words, r.POINTER.value, self._keep(memory, data))
        if op.breakers is not None:
            table = self._breaker_table(op.breakers)
            memory.append(table)
            heads, tails = len(op.breakers.arrays.heads), len(op.breakers.arrays.tail_start) - 1
            words[r.VALUES.value] = op.window
            self._point(words, r.VALUES.value + 2, table.data_ptr())
            words[r.VALUES.value + 4 : r.VALUES.value + 6] = heads, tails

    def _breaker_table(self, breakers: Breakers) -> torch.Tensor:
        """What `_unbroken` of kernels/triton/sampling_history.py reads."""
        if breakers not in self._breakers:
            flags, heads, first_tail, tail_start, tail_tokens = breakers.arrays
            words = np.zeros(self._vocab, np.int32)
            words[: len(flags)] = flags[: self._vocab] & 1
            words[heads] |= np.arange(1, len(heads) + 1, dtype=np.int32) << 1
            self._breakers[breakers] = self._upload(np.concatenate([words, first_tail, tail_start, tail_tokens]))
        return self._breakers[breakers]

    def _point(self, record: npt.NDArray[np.int32], word: int, address: int) -> None:
        record[word : word + 2] = np.array([address], np.int64).view(np.int32)

    def _keep(self, memory: list[torch.Tensor], values: npt.NDArray[Any]) -> int:
        memory.append(self._upload(values))
        return memory[-1].data_ptr()

    def _send(self, row: int) -> None:
        self.kernels.records[row].copy_(self._upload(self._records[row]))

    def _upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """A copy on the device, in the order of the stream."""
        tensor = torch.from_numpy(values.copy())
        if self._device.type == "cpu":  # the interpreter's
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _launches_of(program: RowProgram, greedy: bool) -> Launches:
    if program.flags & r.HISTORY.value:
        return Launches.MARKED
    if program.edits < program.num_ops:
        return Launches.LISTED
    return Launches.GREEDY if greedy else Launches.WHOLE
