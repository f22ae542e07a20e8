"""The fast path: whole plans in one native call for all their rows (on GPUs: `triton_fused.py`).

A stage that names a `native` operation is one step of its row's program; the library runs the program on the
few candidates that are left once a stage has truncated, and takes the same draw as the stages would. A plan
with a stage that has none goes through the torch stages; the choice never depends on the rest of the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu import sampling as native_sampling
from aphrodite.kernels.cpu.sampler_ops import NativeStep
from aphrodite.sampling.logprobs import LogprobTensors
from aphrodite.sampling.plan import SamplingPlan
from aphrodite.sampling.stages.base import SamplerInfo

logger = logging.getLogger(__name__)


class Choices(NamedTuple):
    """What was chosen for L rows; `Sampled` says what it means."""

    token_ids: torch.Tensor  # [L] int32
    ok: torch.Tensor  # [L] bool
    exhausted: torch.Tensor  # [L] bool

    @staticmethod
    def empty(count: int, device: torch.device) -> Choices:
        # Each at a multiple of 16 bytes: Triton compiles kernels anew for pointers less aligned.
        flags = torch.zeros(2, -(-count // 16) * 16, dtype=torch.bool, device=device)
        return Choices(torch.zeros(count, dtype=torch.int32, device=device), flags[0, :count], flags[1, :count])


class HostChoices(NamedTuple):
    """Choices as torch sees them and, where they are in the host's memory, as numpy does."""

    tensors: Choices
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    addresses: tuple[int, int, int]

    @staticmethod
    def of(choices: Choices) -> HostChoices:
        token_ids, ok, exhausted = choices
        on_host = token_ids.device.type == "cpu"
        arrays = (token_ids.numpy(), ok.numpy(), exhausted.numpy()) if on_host else None
        return HostChoices(choices, arrays, (token_ids.data_ptr(), ok.data_ptr(), exhausted.data_ptr()))


class FastPath(Protocol):
    """Samples the rows whose whole plan it knows.

    Attributes:
        rows: those that take this path.
        wanted: of these, how many top log-probabilities each wants, where it wants any.
        native: the library that samples here, which stages may call too, if it is one.
    """

    rows: set[int]
    wanted: dict[int, int]
    native: native_sampling.NativeSampling | None

    def start(self, row: int, plan: SamplingPlan, seed: int, num_prompt: int) -> bool:
        """Take the row if every stage of its plan, whose tensors are on the CPU, is known here; says whether."""

    def end(self, row: int) -> None:
        """The row's request is gone and the row is free."""

    def rewind(self, row: int, position: int) -> None:
        """Forget the row's tokens at `position` and after it; the row's history is right before that."""

    def choices(self, count: int) -> HostChoices:
        """Where the choices of `count` rows may go, until the next call."""

    def sample(
        self,
        logits: torch.Tensor,
        entries: Sequence[int] | None,
        rows: Sequence[int],
        positions: Sequence[int],
        barred: Mapping[int, Set[int]],
        choices: HostChoices,
    ) -> tuple[LogprobTensors | None, dict[int, int]]:
        """Sample `entries` (None: all) of `logits` [L, vocab], whose rows are `rows`.

        Args:
            barred: tokens that a row may not choose now.
            choices: written at `entries`.

        Returns:
            Log-probabilities of the entries that want any, and the number of top tokens that each wants.
        """


@runtime_checkable
class DeviceSampler(FastPath, Protocol):
    """A fast path that an accelerator runs without the host, so that a graph can hold it.

    Attributes:
        launch_levels: all that `stage` can say, each doing what the ones before it do, too.
    """

    launch_levels: Sequence[Hashable]

    def stage(self, rows: Sequence[int], positions: Sequence[int], barred: Mapping[int, Set[int]]) -> Hashable:
        """Set which tokens each row may not choose at its position, and say what `run` has to launch for these rows."""

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
        """What `Sampler.run` says."""

    def logprobs(self, logits: torch.Tensor, entries: torch.Tensor, token_ids: torch.Tensor, k: int) -> LogprobTensors:
        """`gather_logprobs` of the rows `entries` [W] of `logits`, without waiting; `token_ids` [W] int64."""


def open_fast_path(info: SamplerInfo) -> FastPath | None:
    """The fast path for the device, or None with the reason in the log."""
    if info.device.type != "cuda":
        return FusedSampler.open(info)
    try:
        from aphrodite.sampling.triton_fused import TritonSampler
    except ImportError as error:
        logger.warning("sampling runs as torch operations, not in Triton kernels: %s", error)
        return None
    return TritonSampler(info)


class FusedSampler:
    """Programs of the rows that the native library samples, and the call that does it: a `FastPath`."""

    def __init__(self, native: native_sampling.NativeSampling, info: SamplerInfo) -> None:
        self.native: native_sampling.NativeSampling | None = native
        self._library = native
        self.rows: set[int] = set()
        self.wanted: dict[int, int] = {}
        self._table = np.zeros(info.num_rows, native_sampling.ROW)
        self._programs: dict[int, native_sampling.Program] = {}
        self._everybody = np.arange(info.num_rows, dtype=np.int32)
        self._everybody_address = self._everybody.ctypes.data
        self._rows = np.zeros(info.num_rows, np.int32)
        self._positions = np.zeros(info.num_rows, np.int32)
        self._row_views = self._rows.data, self._positions.data
        self._choices: dict[int, HostChoices] = {}  # by the number of rows
        self._history = info.token_ids  # kept alive; the batch holds its address
        self._batch = native_sampling.Batch(
            vocab=info.vocab_size,
            rows=self._rows.ctypes.data,
            positions=self._positions.ctypes.data,
            table=self._table.ctypes.data,
            history=info.token_ids.data_ptr(),
            history_stride=info.token_ids.stride(0),
        )

    @staticmethod
    def open(info: SamplerInfo) -> FusedSampler | None:
        """The native library's, or None with the reason in the log."""
        native = native_sampling.load() if info.device.type == "cpu" else None
        if native is None:
            reason = library.unavailable_reason() if info.device.type == "cpu" else f"it has none for {info.device}"
            logger.info("sampling runs as torch operations, not in the native library: %s", reason)
            return None
        return FusedSampler(native, info)

    def start(self, row: int, plan: SamplingPlan, seed: int, num_prompt: int) -> bool:
        """Take the row if every stage of its plan has a native operation, and say whether."""
        steps: list[NativeStep] = []
        for step in plan.steps.values():
            native_steps = step.stage.native_steps(step.values, step.prepared)
            if native_steps is None:
                return False
            steps.extend(native_steps)
        program = self._programs[row] = native_sampling.Program(steps, self._history.shape[1] + 1)
        self.rows.add(row)
        if plan.logprobs is not None:
            self.wanted[row] = plan.logprobs
        self._table[row] = (
            seed,
            program.ops.ctypes.data,
            0,
            len(program.ops),
            0,
            plan.greedy,
            num_prompt,
            -1 if plan.logprobs is None else plan.logprobs,
            plan.processed_logprobs,
        )
        return True

    def end(self, row: int) -> None:
        self.rows.remove(row)
        self.wanted.pop(row, None)
        del self._programs[row]

    def rewind(self, row: int, position: int) -> None:
        """Nothing: the library reads the history anew at every token."""

    def choices(self, count: int) -> HostChoices:
        """Where the choices of `count` rows may go; the same memory every time."""
        found = self._choices.get(count)
        if found is None:
            found = self._choices[count] = HostChoices.of(Choices.empty(count, torch.device("cpu")))
        return found

    def sample(
        self,
        logits: torch.Tensor,
        entries: Sequence[int] | None,
        rows: Sequence[int],
        positions: Sequence[int],
        barred: Mapping[int, Set[int]],
        choices: HostChoices,
    ) -> tuple[LogprobTensors | None, dict[int, int]]:
        """Sample `entries` (None: all) of `logits` [L, vocab], whose rows are `rows`.

        Args:
            barred: tokens that a row may not choose now.
            choices: written at `entries`.

        Returns:
            Log-probabilities of the entries that want any, and the number of top tokens that each wants.
        """
        count = len(rows)
        # Number by number: after a forward pass that is faster than the first calls of numpy; see `runner/rows.py`.
        row_numbers, row_positions = self._row_views
        for place, row in enumerate(rows):
            row_numbers[place] = row
            row_positions[place] = positions[place]
        places = None if entries is None else np.array(entries, np.int32)
        batch = self._batch
        batch.logits, batch.stride, batch.count = logits.data_ptr(), logits.stride(0), count
        batch.entries = self._everybody_address if places is None else places.ctypes.data
        batch.token_ids, batch.ok, batch.exhausted = choices.addresses
        wanted = self._wanted_by(entries, rows) if self.wanted else {}
        outputs = self._logprob_outputs(len(logits), max(wanted.values())) if wanted else None
        masks = self._bar(barred) if barred else {}
        self._library.sample(batch)
        for row in masks:
            self._table[row]["barred_count"] = 0
        if outputs is None:
            return None, wanted
        if len(wanted) == len(logits):
            return LogprobTensors(choices.tensors.token_ids.long(), *outputs), wanted
        index = torch.tensor(list(wanted))
        return LogprobTensors(choices.tensors.token_ids[index].long(), *(output[index] for output in outputs)), wanted

    def _wanted_by(self, entries: Sequence[int] | None, rows: Sequence[int]) -> dict[int, int]:
        numbers = range(len(rows)) if entries is None else entries
        return {entry: self.wanted[row] for entry, row in zip(numbers, rows, strict=True) if row in self.wanted}

    def _logprob_outputs(self, num_entries: int, top: int) -> list[torch.Tensor]:
        """Tensors of all entries for the library to write to."""
        top = self._batch.top = min(top, self._batch.vocab)
        outputs = [
            torch.empty(num_entries, dtype=torch.float32),
            torch.empty(num_entries, dtype=torch.int32),
            torch.empty(num_entries, top, dtype=torch.int32),
            torch.empty(num_entries, top, dtype=torch.float32),
        ]
        batch = self._batch
        batch.logprobs, batch.ranks, batch.top_ids, batch.top_logprobs = (output.data_ptr() for output in outputs)
        return outputs

    def _bar(self, barred: Mapping[int, Set[int]]) -> dict[int, np.ndarray]:
        """Point the rows at their barred tokens; the result is what has to live until they are sampled."""
        masks = {row: np.array(sorted(token_ids), np.int32) for row, token_ids in barred.items()}
        for row, mask in masks.items():
            self._table[row]["barred"], self._table[row]["barred_count"] = mask.ctypes.data, len(mask)
        return masks
