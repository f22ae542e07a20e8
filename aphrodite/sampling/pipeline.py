"""The sampler: rows of logits in, one token a row out, everything on the device.

Common plans run in the native library where there is one (`fused.py`), all others as torch operations,
stage by stage: rows are grouped by stage, so a row without a stage pays nothing for it and no row's
values touch another row. A stage that may leave nothing of a row is undone where it does. Which way a
row goes depends on its own plan alone.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.core.plan import TokenLogprobs, TokenTrace
from aphrodite.errors import RequestFailedError
from aphrodite.kernels.cpu.sampling import NativeSampling
from aphrodite.sampling.draw import draw
from aphrodite.sampling.followers import TokenFollower
from aphrodite.sampling.fused import Choices, DeviceSampler, FastPath, HostChoices, open_fast_path
from aphrodite.sampling.grammar import compiler_of
from aphrodite.sampling.logprobs import LogprobTensors, gather_logprobs, join_logprobs
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.plan import SamplingPlan, compile_plan
from aphrodite.sampling.random import signed_seed
from aphrodite.sampling.stages.base import RowInfo, RowState, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.registry import all_stages
from aphrodite.sampling.trace import StageTracer, TraceTensors
from aphrodite.sampling.vocabulary import Vocabulary


class Sampled(NamedTuple):
    """What `Sampler.sample` chose for L rows.

    Attributes:
        token_ids: [L] int32. Where `ok` is False it is 0: safe to feed on, never to be shown.
        ok: [L] bool. False: the row's logits held NaN or +inf, or nothing that may be chosen.
        exhausted: [L] bool. True where the latter is why: bans, allowed ids and the like leave no token.
        logprobs: for the entries that want them, in the order of `wanted`.
        wanted: entries that want log-probabilities, with the number of top tokens.
        traces: of the entries that want one.
        arrays: the first three once more, where they are in the host's memory.
    """

    token_ids: torch.Tensor
    ok: torch.Tensor
    exhausted: torch.Tensor
    logprobs: LogprobTensors | None
    wanted: dict[int, int]
    traces: dict[int, TraceTensors]
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def lists(self) -> tuple[list[int], list[bool], list[bool]]:
        """`token_ids`, `ok` and `exhausted` as plain data; waits for the device."""
        token_ids, ok, exhausted = self[:3] if self.arrays is None else self.arrays
        return token_ids.tolist(), ok.tolist(), exhausted.tolist()

    def logprobs_of(self, entry: int) -> TokenLogprobs | None:
        """Plain data of one entry; waits for the device. Of no meaning where `ok` is False."""
        if self.logprobs is None or entry not in self.wanted:
            return None
        return self.logprobs.entry(list(self.wanted).index(entry), self.wanted[entry])

    def trace_of(self, entry: int) -> TokenTrace | None:
        """Plain data of one entry; waits for the device. Of no meaning where `ok` is False."""
        return self.traces[entry].entry() if entry in self.traces else None


class Sampler:
    """Chooses tokens for up to `num_rows` requests, each of which owns one row.

    Args:
        token_ids: [num_rows, max_model_len] int32, the runner's history of every row, prompt first. The
            runner writes chosen tokens there before the next `sample`.
        num_prompt: [num_rows], the runner's prompt lengths.
        native: whether the native library, or the kernels for GPUs, may be used.
        vocabulary: for stages whose parameters are texts.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        token_ids: torch.Tensor,
        num_prompt: torch.Tensor,
        device: torch.device,
        *,
        native: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        info = SamplerInfo(num_rows, vocab_size, device, token_ids, num_prompt)
        self._fused: FastPath | None = open_fast_path(info) if native else None
        # The same where an accelerator runs it alone: whether it does is too slow a question for every step.
        self._device_sampler = self._fused if isinstance(self._fused, DeviceSampler) else None
        self._info = info._replace(native=self._fused is not None and self._fused.native is not None)
        self._vocabulary = vocabulary
        # A tokenizer may name tokens that the model has no logits for.
        self._eos_token_ids = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._plans: dict[int, SamplingPlan] = {}
        self._num_prompt: dict[int, int] = {}  # on the host, for asking a device would wait for it
        self._states: dict[str, RowState | None] = {}
        self._followers: dict[int, tuple[TokenFollower, ...]] = {}  # only rows with any
        self._fused_rows: Set[int] = frozenset() if self._fused is None else self._fused.rows
        self._barred: dict[int, dict[int, set[int]]] = {}  # row -> position -> token ids; only rows with any
        self._seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._columns = _columns(all_stages())
        width = max(columns.stop for columns in self._columns.values())
        self._values = torch.zeros(num_rows, width, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def start(self, row: int, params: SamplingParams, seed: int, prompt_token_ids: Sequence[int]) -> None:
        """A request with valid `params` takes a free row; `seed` is an unsigned 64-bit number."""
        if row in self._plans:
            raise ValueError(f"row {row} is taken")
        self._num_prompt[row] = len(prompt_token_ids)
        shared, host = self._info, torch.device("cpu")
        info = RowInfo(shared.vocab_size, self._eos_token_ids, len(prompt_token_ids), host, self._vocabulary)
        plan = self._start_plan(row, params, info)
        if self._fused is not None and not plan.trace and self._fused.start(row, plan, seed, len(prompt_token_ids)):
            return
        if shared.device != host:
            plan = self._start_plan(row, params, info._replace(device=shared.device))
        self._seeds[row] = signed_seed(seed)
        for name, step in plan.steps.items():
            if step.values:
                self._values[row, self._columns[name]] = torch.tensor(step.values)
            if name not in self._states:
                self._states[name] = step.stage.new_state(self._info)
            state = self._states[name]
            if state is not None:
                state.start(row, prompt_token_ids)

    def _start_plan(self, row: int, params: SamplingParams, info: RowInfo) -> SamplingPlan:
        plan = self._plans[row] = compile_plan(params, info)
        if plan.followers:
            self._followers[row] = plan.followers
        return plan

    def prepare(self, params: SamplingParams) -> None:
        """Make what is slow to make of `params` and kept: their grammar. From any thread.

        Raises:
            InvalidRequestError: the grammar cannot be used.
        """
        if params.grammar is not None:
            compiler_of(self._vocabulary).compile(params.grammar)

    @torch.inference_mode()
    def end(self, row: int) -> None:
        """The row's request is gone and the row is free, which it may have been before."""
        plan = self._plans.pop(row, None)
        if plan is None:  # its start failed
            return
        self._num_prompt.pop(row, None)
        self._barred.pop(row, None)
        self._followers.pop(row, None)
        if self._fused is not None and row in self._fused_rows:
            self._fused.end(row)
            return
        for name in plan.steps:
            state = self._states.get(name)
            if state is not None:
                state.end(row)

    @torch.inference_mode()
    def rewind(self, row: int, position: int) -> None:
        """Forget the row's tokens at `position` and after it, whether they were chosen or barred there.

        The next token sampled for the row goes to `position` or before. Tokens barred at `position` itself
        stay barred, so that choices which failed one after the other do not come back.

        Raises:
            ValueError: `position` lies inside the prompt.
        """
        num_prompt = self._num_prompt[row]
        if position < num_prompt:
            raise ValueError(f"row {row} cannot go back to position {position} of its prompt of {num_prompt} tokens")
        barred = self._barred.get(row, {})
        for later in [barred_at for barred_at in barred if barred_at > position]:
            del barred[later]
        for follower in self._followers.get(row, ()):
            follower.rewind(position)
        if self._fused is not None and row in self._fused_rows:
            self._fused.rewind(row, position)
            return
        for name in self._plans[row].steps:
            state = self._states[name]
            if state is not None:
                state.rewind(row, position)

    def bar(self, row: int, position: int, token_ids: Sequence[int]) -> None:
        """Never choose `token_ids` for the row at `position`, in addition to those barred there already.

        A hard mask over the model's logits, before all stages. It ends with the request, and when the row is
        rewound to an earlier position, where another text begins.
        """
        self._barred.setdefault(row, {}).setdefault(position, set()).update(token_ids)

    def unbar(self, row: int, position: int) -> None:
        """Let the tokens barred for the row at `position` be chosen again."""
        self._barred.get(row, {}).pop(position, None)

    def follows(self, rows: Iterable[int]) -> bool:
        """Whether some of these rows have grammars or budgets, so that `tell` has to be called for their tokens."""
        return bool(self._followers) and not self._followers.keys().isdisjoint(rows)

    def waits(self, rows: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether `tell` has to be called for all tokens before these positions before they can be sampled."""
        if not self._followers:
            return False
        pairs = zip(rows, positions, strict=True)
        return any(one.waits(position) for row, position in pairs for one in self._followers.get(row, ()))

    def tell(self, rows: Iterable[int], positions: Iterable[int], token_ids: Iterable[int]) -> None:
        """Which tokens stand where. Rows without a grammar or a budget, and tokens told before, are passed over."""
        for row, position, token_id in zip(rows, positions, token_ids, strict=True):
            for follower in self._followers.get(row, ()):
                follower.tell(position, token_id)

    def completed_at(self, row: int, position: int) -> bool:
        """Whether the token at `position`, which was told, completed what the row's grammar describes."""
        return any(follower.completed_at(position) for follower in self._followers.get(row, ()))

    def failure(self, row: int) -> str | None:
        """Why the row's grammar allows nothing, if that is so."""
        return next((one.failure for one in self._followers.get(row, ()) if one.failure is not None), None)

    def sample(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Choose a token for each row. What is returned holds until the next call.

        Args:
            logits: [L, vocab] float32; may be overwritten.
            rows: L different rows that have started.
            positions: where in its sequence each row's chosen token goes = tokens before it.

        Raises:
            ValueError: `logits` has another shape or type.
        """
        if logits.shape != (len(rows), self._info.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype} for {len(rows)} rows")
        if not logits.is_contiguous():
            logits = logits.contiguous()
        barred = self._barred_at(rows, positions) if self._barred else {}
        if self.follows(rows):
            for row, position in zip(rows, positions, strict=True):
                for follower in self._followers.get(row, ()) if row in self._fused_rows else ():
                    follower.refresh(position)
        if self._fused is not None and self._fused.rows.issuperset(rows):
            choices = self._fused.choices(len(rows))
            tensors, wanted = self._fused.sample(logits, None, rows, positions, barred, choices)
            return Sampled(*choices.tensors, tensors, wanted, {}, choices.arrays)
        return self._sample_mixed(logits, rows, positions, barred)

    @property
    def launch_levels(self) -> Sequence[Hashable]:
        """All that `stage` can say of steps that `run` serves, the last of which does everything; empty if none."""
        return self._device_sampler.launch_levels if self._device_sampler is not None else ()

    def stage(self, rows: Sequence[int], positions: Sequence[int]) -> Hashable | None:
        """Prepare a call of `run` for these rows and positions: what it has to launch, None if some need `sample`."""
        device = self._device_sampler
        if device is None or not device.rows.issuperset(rows):
            return None
        if self.waits(rows, positions) or (device.wanted and not device.wanted.keys().isdisjoint(rows)):
            return None
        return device.stage(rows, positions, self._barred_at(rows, positions) if self._barred else {})

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
        """Choose a token for each row on the device alone, so that a CUDA graph can hold it; `stage` comes before.

        Args:
            logits: [B, vocab] of any floating type, contiguous rows; read only.
            rows, positions: [B] int32 on the device; row `num_rows` is padding, whose token is 0 and not ok.
            token_ids: [B] int32, written like `Sampled.token_ids`. ok, exhausted: [B] bool, likewise.
            launches: what `stage` said; a graph is good for all steps for which it says the same.

        Raises:
            TypeError: there is no such sampler for this device.
        """
        if self._device_sampler is None:
            raise TypeError(f"rows are not sampled by {self._info.device} alone")
        self._device_sampler.run(logits, rows, positions, token_ids, ok, exhausted, launches)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: torch.Tensor, target_ids: torch.Tensor, k: int) -> list[TokenLogprobs]:
        """Raw log-probabilities of given tokens.

        Args:
            logits: [P, vocab] float32, each row's speaking of the token in `target_ids` [P] (any integers).
            k: most likely tokens to list beside each.

        Raises:
            RequestFailedError: the logits hold NaN or +inf, or only -inf.
        """
        if not bool(logits.amax(-1).isfinite().all()):
            raise RequestFailedError("the model's logits for this prompt are not finite numbers")
        targets = target_ids.to(device=logits.device, dtype=torch.int64)
        if self._device_sampler is not None:
            entries = torch.arange(len(logits), device=logits.device)
            tensors = self._device_sampler.logprobs(logits, entries, targets, k)
        else:
            tensors = gather_logprobs(logits, targets, k, None if self._fused is None else self._fused.native)
        return [tensors.entry(entry, k) for entry in range(len(logits))]

    @torch.inference_mode()
    def _sample_mixed(
        self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int], barred: Mapping[int, Set[int]]
    ) -> Sampled:
        """Sample rows of which some or all go through the stages; arguments as those of `FusedSampler.sample`."""
        choices = Choices.empty(len(rows), logits.device)
        parts: list[LogprobTensors] = []
        wanted: dict[int, int] = {}
        fused = [entry for entry, row in enumerate(rows) if row in self._fused_rows]
        if self._fused is not None and fused:
            taken = [rows[entry] for entry in fused], [positions[entry] for entry in fused]
            tensors, wanted = self._fused.sample(logits, fused, *taken, barred, HostChoices.of(choices))
            parts = [] if tensors is None else [tensors]
        batch = _Batch([self._plans[row] for row in rows], rows, positions)
        report = _LogprobReport(batch, logits, skip=self._fused_rows)
        for entry, row in enumerate(rows):
            if row in barred and row not in self._fused_rows:
                logits[entry].index_fill_(0, self._index(sorted(barred[row])), -torch.inf)
        traces = self._sample_by_stages(logits, batch, choices, report)
        self._observe(batch, choices.token_ids)
        if report.wanted:
            parts.append(report.gather(choices.token_ids, None if self._fused is None else self._fused.native))
            wanted.update(report.wanted)
        return Sampled(*choices, join_logprobs(parts) if parts else None, wanted, traces)

    def _barred_at(self, rows: Sequence[int], positions: Sequence[int]) -> dict[int, set[int]]:
        """The tokens that each row may not choose now, of rows with any."""
        here = {row: self._barred.get(row, {}).get(position) for row, position in zip(rows, positions, strict=True)}
        return {row: token_ids for row, token_ids in here.items() if token_ids}

    def _sample_by_stages(
        self, logits: torch.Tensor, batch: _Batch, choices: Choices, report: _LogprobReport
    ) -> dict[int, TraceTensors]:
        """Sample the rows that the fast path leaves; writes their entries of `choices`, returns traces."""
        traces: dict[int, TraceTensors] = {}
        native = None if self._fused is None else self._fused.native
        for entries in batch.by_order(skip=self._fused_rows):
            part = batch if len(entries) == len(batch.rows) else batch.take(entries)
            index = self._index(entries)
            left = logits if part is batch else logits[index]
            before = left.amax(-1)
            tracer = StageTracer(left) if part.plans[0].trace else None
            left = self._apply_stages(left, part, tracer)
            after = left.amax(-1)
            finite = before.isfinite() & after.isfinite()
            chosen = torch.where(finite, self._choose(left, part), 0).to(torch.int32)
            choices.token_ids[index] = chosen
            choices.ok[index] = finite
            choices.exhausted[index] = (before < torch.inf) & (after == -torch.inf)
            report.processed(entries, left, range(len(entries)))
            if tracer is not None:
                traces[entries[0]] = tracer.finish(chosen, drawn=not part.plans[0].greedy, native=native)
        return traces

    def _apply_stages(self, logits: torch.Tensor, batch: _Batch, tracer: StageTracer | None) -> torch.Tensor:
        """Run every stage, in the order that all rows of `batch` share, on the rows that have it.

        A tracer follows the only row of `batch`.
        """
        for name in batch.plans[0].order:
            members = [entry for entry, plan in enumerate(batch.plans) if name in plan.steps]
            if not members:
                continue
            stage = batch.plans[members[0]].steps[name].stage
            if len(members) == len(batch.plans):
                logits = self._apply_stage(stage, logits, batch)
            else:
                index = self._index(members)
                logits[index] = self._apply_stage(stage, logits[index], batch.take(members))
            if tracer is not None:
                tracer.after(name, logits)
        return logits

    def _apply_stage(self, stage: Stage, logits: torch.Tensor, batch: _Batch) -> torch.Tensor:
        index = self._index(batch.rows)
        context = StageContext(
            rows=batch.rows,
            index=index,
            positions=batch.positions,
            prepared=[plan.steps[stage.name].prepared for plan in batch.plans],
            state=self._states[stage.name],
            seeds=self._seeds[index],
            token_ids=self._info.token_ids,
            num_prompt=self._info.num_prompt,
        )
        values = self._values[index, self._columns[stage.name]]
        if not stage.can_empty:
            return stage.apply(logits, values, context)
        before = logits.clone()
        after = stage.apply(logits, values, context)
        return torch.where(after.amax(-1, keepdim=True) == -torch.inf, before, after)

    def _choose(self, logits: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """[R] int64: the Gumbel-max draw, or the argmax of greedy rows; ties go to the lowest token id."""
        drawn = [entry for entry, plan in enumerate(batch.plans) if not plan.greedy]
        if not drawn:
            return logits.argmax(-1)
        if len(drawn) < len(batch.plans):
            chosen = logits.argmax(-1)
            index = self._index(drawn)
            chosen[index] = self._choose(logits[index], batch.take(drawn))
            return chosen
        return draw(logits, self._seeds[self._index(batch.rows)], self._index(batch.positions))

    def _observe(self, batch: _Batch, token_ids: torch.Tensor) -> None:
        for name, state in self._states.items():
            if state is None:
                continue
            members = batch.members(name, skip=self._fused_rows)
            if len(members) == len(batch.rows):
                state.observe(batch.rows, token_ids)
            elif members:
                state.observe([batch.rows[entry] for entry in members], token_ids[self._index(members)])

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        """[N] int64 on the device, without waiting for it."""
        if self._info.device.type == "cuda":
            return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(self._info.device, non_blocking=True)
        return torch.tensor(numbers, dtype=torch.int64, device=self._info.device)


class _Batch(NamedTuple):
    """Rows of one call, or some of them."""

    plans: Sequence[SamplingPlan]
    rows: Sequence[int]
    positions: Sequence[int]

    def take(self, entries: Sequence[int]) -> _Batch:
        return _Batch(
            [self.plans[entry] for entry in entries],
            [self.rows[entry] for entry in entries],
            [self.positions[entry] for entry in entries],
        )

    def members(self, stage: str, skip: Container[int]) -> list[int]:
        """Entries that have the stage, without those of rows in `skip`."""
        pairs = enumerate(zip(self.plans, self.rows, strict=True))
        return [entry for entry, (plan, row) in pairs if stage in plan.steps and row not in skip]

    def by_order(self, skip: Container[int]) -> list[list[int]]:
        """Entries grouped by their plans' order of stages, without those of rows in `skip`; traced ones alone."""
        groups: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
        for entry, (plan, row) in enumerate(zip(self.plans, self.rows, strict=True)):
            if row in skip:
                continue
            groups.setdefault((plan.order, entry if plan.trace else None), []).append(entry)
        return list(groups.values())


class _LogprobReport:
    """Keeps the logits whose log-probabilities are wanted: raw ones before the stages, processed ones after."""

    def __init__(self, batch: _Batch, logits: torch.Tensor, skip: Container[int]) -> None:
        pairs = enumerate(zip(batch.plans, batch.rows, strict=True))
        self.wanted = {
            entry: plan.logprobs for entry, (plan, row) in pairs if plan.logprobs is not None and row not in skip
        }
        self._processed = {entry for entry in self.wanted if batch.plans[entry].processed_logprobs}
        self._logits = logits[list(self.wanted)]

    def processed(self, entries: Sequence[int], logits: torch.Tensor, places: Sequence[int]) -> None:
        """Take the logits after the stages, `logits[places]`, of those of `entries` that want them."""
        for entry, place in zip(entries, places, strict=True):
            if entry in self._processed:
                self._logits[list(self.wanted).index(entry)] = logits[place]

    def gather(self, token_ids: torch.Tensor, native: NativeSampling | None) -> LogprobTensors:
        """For the chosen `token_ids` [L], where any are wanted."""
        return gather_logprobs(self._logits, token_ids[list(self.wanted)].long(), max(self.wanted.values()), native)


def _columns(stages: Sequence[Stage]) -> dict[str, slice]:
    """Where each stage's values stand in a row of the value table."""
    columns: dict[str, slice] = {}
    first = 0
    for stage in stages:
        count = len(stage.values(SamplingParams()))
        columns[stage.name] = slice(first, first + count)
        first += count
    return columns
