"""The data plane of an accelerator: launches steps without waiting for the ones before.

`launch` copies a step's differences to the device and queues its kernels, a decode step's as one graph that
ends with the choice of tokens; `collect` waits until the tokens have been copied back. Between the two the host
plans the next step, whose newest tokens are read on the device, where the sampler wrote them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from aphrodite.core.plan import RowResult, RowStep, StepPlan, StepResult, TokenLogprobs
from aphrodite.errors import ConfigError, RequestFailedError
from aphrodite.kernels.triton.compile_ahead import Jobs, compile_ahead
from aphrodite.kernels.triton.launch import recording
from aphrodite.runner.device_rows import DeviceRows, PaddedStep, StagedStep, ragged_lengths
from aphrodite.runner.executor import DeviceModelExecutor, LogitsOf, place_adapters
from aphrodite.runner.inputs import HostLengths, StepSize
from aphrodite.runner.pooling import HiddenLayout, Pooler, part_sums
from aphrodite.runner.results import (
    LogitsLayout,
    Outcome,
    PromptLogprobs,
    RowRequests,
    logits_layout,
    take_over,
    with_prompt_logprobs,
)
from aphrodite.runner.step_graphs import Ending, StepGraphs, decode_sizes, ragged_sizes, smallest
from aphrodite.runner.transfers import HostCopy, StepClock, Transfers
from aphrodite.sampling.guidance import guide
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled, Sampler
from aphrodite.sampling.vocabulary import TokenizerLike, Vocabulary

logger = logging.getLogger(__name__)

# Tokens of a step whose attention is split along the keys and merged, for its kernels.
LONG_CHAT, SHORT_MESSAGE = 4096, 32
# Tokens of prompts whose kernels are compiled ahead: dense ones differ between these up to 256, those of 4 bits from
# tile to tile of 128 up to 1,024.
REHEARSED_PROMPTS = (16, 32, 64, 128, 192, *range(256, 1025, 128), 2048)
SCORED_ROWS = 256  # of a prompt, whose logits are in memory at once


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way: what will come back for it."""

    sampling: list[int] = field(default_factory=list)  # numbers of the steps that sample
    choices: HostCopy | None = None  # token ids, whether each may be shown, whether nothing was left: [S] each
    sampled: Sampled | None = None  # log-probabilities and traces, where some are wanted
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    pooled: tuple[HiddenLayout, HostCopy] | None = None  # of prompts to embed, their parts' sums
    clock: StepClock | None = None
    error: Exception | None = None


class DeviceRunner:
    """Owns the rows, the executor, the sampler and the graphs of a device.

    Args:
        use_graphs: whether decode steps run as graphs; otherwise every kernel is launched by itself.
        tokenizer: for samplers whose parameters are texts; without it requests with such parameters fail.
    """

    def __init__(
        self,
        executor: DeviceModelExecutor,
        *,
        num_rows: int,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        async_depth: int,
        use_graphs: bool,
        tokenizer: TokenizerLike | None = None,
    ) -> None:
        executor.allocate_kv_cache(num_blocks)
        self.executor = executor
        self.async_depth = async_depth
        device, vocab_size = executor.device, executor.spec.vocab_size
        self._transfers = Transfers(device)
        num_adapters = 0 if executor.adapters is None else executor.adapters.num_slots
        self.rows = DeviceRows(num_rows, max_model_len, executor.block_size, self._transfers, num_adapters=num_adapters)
        self.sampler = Sampler(
            num_rows=num_rows,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            token_ids=self.rows.token_ids,
            num_prompt=self.rows.num_prompt,
            device=device,
            vocabulary=None if tokenizer is None else Vocabulary(vocab_size, tokenizer),
        )
        self._requests = RowRequests(self.sampler)
        self._pooler = Pooler()
        self._underway: deque[tuple[StepPlan, LaunchedStep]] = deque()  # launched and not collected
        # What graphs leave behind.
        self._logits = torch.zeros(num_rows, vocab_size, dtype=executor.dtype, device=device)
        self._chosen = torch.zeros(
            6 * num_rows, dtype=torch.uint8, device=device
        )  # see `_unpack`, so that one copy does
        stream = self._transfers.stream
        # How a decode step can end: by samplers that the device runs alone, or with logits for the others.
        self._endings: dict[Hashable, Ending] = {
            level: partial(self._choose, level) for level in self.sampler.launch_levels
        }
        self._endings[None] = self._hand_out
        self._decode_sizes = decode_sizes(num_rows)
        self._ragged_sizes: list[StepSize] = []
        self._padded_steps = executor.padded_steps
        self._graphs = None
        if use_graphs and executor.can_capture and stream is not None:
            self._graphs = StepGraphs(stream, self._model, self._endings_of, self._pad)
            if self._padded_steps is not None and self.sampler.launch_levels:
                self._ragged_sizes = ragged_sizes(self._padded_steps.most_tokens, num_rows)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # the model was loaded there

    def prepare(self, params: SamplingParams) -> None:
        """Make what is slow to make of a request's parameters; may run beside everything else."""
        self.sampler.prepare(params)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue the step's work; the caller keeps launching and collecting in the same order."""
        try:
            with torch.inference_mode(), torch.cuda.stream(self._transfers.stream):
                step = self._launch(plan)
        except Exception as error:
            step = LaunchedStep(error=error)
        self._underway.append((plan, step))
        return step

    def collect(self, plan: StepPlan, step: LaunchedStep) -> Outcome:
        """Wait for the step's tokens; returns its result and the seconds that the device took.

        Raises:
            Exception: whatever launching the step raised.
        """
        self._underway.popleft()
        if step.error is not None:
            raise step.error
        waited = 0.0
        if step.choices is None:
            rows = [RowResult(row.row) for row in plan.steps]
        else:
            began = time.perf_counter()
            tensors = step.choices.wait()
            waited = time.perf_counter() - began
            rows = self._results(plan.steps, step, *(tensor.tolist() for tensor in tensors))
            self._requests.follow(rows, [row.start + row.count for row in plan.steps])
        for number, logprobs in step.prompt_logprobs.items():
            rows[number] = with_prompt_logprobs(rows[number], logprobs)
        if step.pooled is not None:
            layout, sums = step.pooled
            for number, result in self._pooler.collect(plan.steps, layout, sums.wait()[0].numpy()).items():
                rows[number] = result
        self._requests.fail_unservable(rows)
        waited_for = step.choices is not None or step.pooled is not None
        seconds = step.clock.seconds() if step.clock is not None and waited_for else 0.0
        return Outcome(StepResult(plan.step_id, rows), seconds, waited)

    def _results(
        self, steps: Sequence[RowStep], step: LaunchedStep, token_ids: list[int], ok: list[bool], exhausted: list[bool]
    ) -> list[RowResult]:
        """What became of each row; the lists are of those that sampled."""
        if len(step.sampling) == len(steps) and step.sampled is None and all(ok):
            return [RowResult(row.row, token_id) for row, token_id in zip(steps, token_ids, strict=True)]
        rows = [RowResult(row.row) for row in steps]
        for entry, number in enumerate(step.sampling):
            if not ok[entry]:
                rows[number] = RowResult(
                    steps[number].row, error=self._requests.error(steps[number].row, exhausted[entry])
                )
                continue
            logprobs = step.sampled.logprobs_of(entry) if step.sampled is not None else None
            trace = step.sampled.trace_of(entry) if step.sampled is not None else None
            rows[number] = RowResult(steps[number].row, token_ids[entry], logprobs, trace=trace)
        return rows

    def warm_up(self, max_tokens: int, progress: Callable[[int, int], None]) -> None:
        """Compile the kernels of usual steps, capture graphs, and try the largest step.

        All of it computes padding or the spare row, and what it leaves in the cache is never read.

        Args:
            max_tokens: of the largest step.
            progress: told of steps done and of all.

        Raises:
            ConfigError: the largest step needs more memory than there is.
        """
        largest = min(max_tokens, self.rows.max_model_len)
        prompts = sorted({min(16, largest), min(2048, largest), largest})
        reached = smallest(self._ragged_sizes, largest, self.rows.num_rows)
        if reached is not None:  # no step needs larger ones
            self._ragged_sizes = [size for size in self._ragged_sizes if size.tokens <= reached.tokens]
        sizes = list(reversed(self._decode_sizes))
        tried = sizes if self._graphs is not None else [sizes[0], sizes[-1]]
        tasks: list[Callable[[], object]] = [partial(self._try_prompt, tokens) for tokens in prompts]
        tasks.append(self._try_mixed)
        prepare = self._try_padded if self._graphs is None else self._graphs.prepare
        ragged = list(reversed(self._ragged_sizes))
        if self.executor.adapters is not None:
            sizes, tried, ragged = _with_adapters(sizes), _with_adapters(tried), _with_adapters(ragged)
        tasks += [partial(self._prepare_ragged, size) for size in ragged]
        tasks += [partial(prepare, size) for size in tried]
        tasks.append(partial(self._try_prompt, largest))  # beside all graphs
        try:
            with torch.inference_mode(), torch.cuda.stream(self._transfers.stream):
                rehearsal = self.executor.rehearsal() if self._transfers.stream is not None else None
                if rehearsal is not None:
                    self._compile_ahead(rehearsal, largest, [*ragged, *sizes], progress)
                for number, task in enumerate(tasks):
                    progress(number, len(tasks))
                    began = time.perf_counter()
                    task()
                    logger.debug("step %d of the start took %.2f s", number, time.perf_counter() - began)
                progress(len(tasks), len(tasks))
                self.close()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step of {largest:,} tokens does not fit the GPU beside the KV cache: lower --max-num-batched-tokens"
                " or --gpu-memory-utilization"
            ) from error

    def lost(self) -> str | None:
        """A GPU that met a fault answers every call with it for as long as the process lives."""
        try:
            self.close()
        except RuntimeError as error:
            fault = str(error).partition("\n")[0]
            return f"the GPU failed ({fault}): start the engine again; if it recurs, the system's log may tell why"
        return None

    def close(self) -> None:
        if self._transfers.stream is not None:
            self._transfers.stream.synchronize()

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        began = self._transfers.mark()
        parts: list[Callable[[StepPlan], None]] = [partial(place_adapters, self.executor)]
        parts += [self.rows.apply, self._requests.apply, self._pooler.apply]
        take_over(parts, lambda part: part(plan))
        if not plan.steps:
            return LaunchedStep()
        decodes = all(step.count == 1 and step.samples for step in plan.steps)
        step = self._launch_decode(plan.steps) if decodes else self._launch_ragged(plan.steps)
        step.clock = StepClock(began, self._transfers.mark())
        return step

    def _launch_decode(self, steps: Sequence[RowStep]) -> LaunchedStep:
        """A step of one token for each row."""
        count = len(steps)
        rows, positions = [step.row for step in steps], [step.start + 1 for step in steps]
        launches = self.sampler.stage(rows, positions)  # None: not in the graph
        size = StepSize(count, count, True)
        if self._graphs is not None:
            size = smallest(self._decode_sizes, count, count) or size
        if self.rows.has_adapters(steps):
            size = size._replace(adapters=True)
        captured = None if self._graphs is None else self._graphs.prepare(size)
        staged = self.rows.stage_decode(steps, size.sequences)
        if size.adapters:
            self.rows.stage_adapters(steps, size)
        if captured is None:
            self._endings[launches](size, self._model(size))
        else:
            captured.model.replay()
            captured.endings[launches].replay()
        if launches is not None:
            return LaunchedStep(list(range(count)), self._copy_chosen(count))
        return self._launched(self._sample(staged, self._logits[:count], rows, positions), list(range(count)), {})

    def _launch_ragged(self, steps: Sequence[RowStep]) -> LaunchedStep:
        """A step in which some rows compute more than one token, or do not sample."""
        layout = logits_layout(steps, self._requests.scored)
        sampling = [number for number, step in enumerate(steps) if step.samples]
        pooled = self._pooler.layout(steps)
        if not layout.prompt and not layout.guides and pooled is None:
            launched = self._launch_padded(steps, layout.entries, sampling)
            if launched is not None:
                return launched
        table = self.executor.stage_step(ragged_lengths(steps))
        staged = self.rows.stage_ragged(steps, layout.entries, sampling, table)
        inputs = staged.inputs
        if self.rows.has_adapters(steps):
            inputs = inputs._replace(adapters=self.rows.stage_adapters(steps))
        embeddings = None
        scores: dict[int, PromptLogprobs] = {}
        if pooled is None and not layout.prompt and not layout.guides:
            logits = self.executor.forward(inputs)
        else:
            index = None if pooled is None else self._transfers.to_device(pooled.entries)
            logits_of, hidden = self.executor.forward_rows(inputs, index)
            if pooled is not None and hidden is not None:
                embeddings = pooled, self._transfers.to_host([part_sums(hidden, pooled)])
            scores = {
                number: self._prompt_logprobs(steps[number], range(*entries), logits_of)
                for number, entries in layout.prompt.items()
            }
            if sampling:
                logits = self._guided_logits(steps, layout, logits_of)
        if not sampling:
            return LaunchedStep(prompt_logprobs=scores, pooled=embeddings)
        rows = [steps[number].row for number in sampling]
        positions = [steps[number].start + steps[number].count for number in sampling]
        sampled = self._sample(staged, logits, rows, positions)
        if layout.guides:
            self._append_to_shadows(steps, layout, sampling, sampled.token_ids)
        launched = self._launched(sampled, sampling, scores)
        launched.pooled = embeddings
        return launched

    def _launch_padded(
        self, steps: Sequence[RowStep], entries: np.ndarray, sampling: Sequence[int]
    ) -> LaunchedStep | None:
        """The same by a captured step, for tokens that the device samples alone; None if there is no such step."""
        size = smallest(self._ragged_sizes, sum(step.count for step in steps), len(steps))
        if size is None or self._graphs is None or self._padded_steps is None:
            return None
        sampled = [steps[number] for number in sampling]
        launches = self.sampler.stage([step.row for step in sampled], [step.start + step.count for step in sampled])
        table = self._padded_steps.stage(ragged_lengths(steps), size)
        if launches is None or table is None:
            return None
        size = size._replace(adapters=self.rows.has_adapters(steps))
        captured = self._graphs.prepare(size)
        self.rows.stage_padded(steps, size, entries, sampling, table)
        if size.adapters:
            self.rows.stage_adapters(steps, size)
        captured.model.replay()
        if not sampling:
            return LaunchedStep()
        (choose,) = captured.endings.values()
        choose.replay()
        return LaunchedStep(list(sampling), self._copy_chosen(len(sampling)))

    def _copy_chosen(self, count: int) -> HostCopy:
        """What the graphs chose for the first `count` entries, on its way to the host."""
        copy = self._transfers.to_host([self._chosen])
        return copy._replace(tensors=_unpack(copy.tensors[0], count))

    def _model(self, size: StepSize) -> torch.Tensor:
        """The kernels of a step over tensors at fixed addresses, up to its logits: what a graph holds."""
        if size.decode:
            self.rows.load_decode_step(size.sequences)
        else:
            self.rows.load_padded_step(self._padded_step(size))
        inputs = self._staged(size).inputs
        if size.adapters:
            inputs = inputs._replace(adapters=self.rows.adapter_tiles(size))
        return self.executor.forward(inputs)

    def _padded_step(self, size: StepSize) -> PaddedStep:
        if self._padded_steps is None:
            raise RuntimeError("this executor's steps cannot be padded")
        return self.rows.padded_step(size, self._padded_steps.table_length(size))

    def _staged(self, size: StepSize) -> StagedStep:
        return self.rows.decode_inputs(size.sequences) if size.decode else self._padded_step(size).staged

    def _endings_of(self, size: StepSize) -> Mapping[Hashable, Ending]:
        """All of them after decode steps; after others, of which there are few, the one that does all that any does."""
        if size.decode:
            return self._endings
        complete = self.sampler.launch_levels[-1]
        return {complete: self._endings[complete]}

    def _choose(self, launches: Hashable, size: StepSize, logits: torch.Tensor) -> None:
        """End a step by choosing tokens."""
        staged = self._staged(size)
        token_ids, ok, exhausted = _unpack(self._chosen, size.sequences)
        self.sampler.run(logits, staged.sample_rows, staged.sample_positions, token_ids, ok, exhausted, launches)
        self.rows.append(staged, token_ids)

    def _hand_out(self, size: StepSize, logits: torch.Tensor) -> None:
        """End a step by leaving its logits to samplers of torch operations."""
        self._logits[: size.sequences].copy_(logits)

    def _compile_ahead(
        self,
        rehearsal: AbstractContextManager[None],
        largest: int,
        sizes: Sequence[StepSize],
        progress: Callable[[int, int], None],
    ) -> None:
        """Compile in parallel what usual steps launch: those of `warm_up` and with prompts between, and what else they
        sample with."""
        jobs = Jobs()
        try:
            with rehearsal, recording(jobs):
                for tokens in REHEARSED_PROMPTS:
                    if tokens < largest:
                        self._try_prompt(tokens)
                self._try_mixed()
                for size in sizes:
                    self._try_padded(size)
        except Exception as error:  # whatever it is, the start goes on without
            logger.warning("kernels are compiled one by one, for steps could not be rehearsed: %s", error)
            torch.cuda.empty_cache()
            return
        compile_ahead(jobs, progress)

    def _try_prompt(self, tokens: int) -> None:
        self._try_ragged([RowStep(self.rows.num_rows, 0, tokens, [], False, True)])

    def _try_mixed(self) -> None:
        """A step of decoding and prompting sequences, one behind a context whose keys are split, and its sampling."""
        spare, most = self.rows.num_rows, self.rows.max_model_len
        shares = [(0, 1), (20, 1), (0, SHORT_MESSAGE // 2 + 1), (min(LONG_CHAT, most - SHORT_MESSAGE), SHORT_MESSAGE)]
        fitting = [(start, count) for start, count in shares if start >= 0 and start + count <= most]
        steps = [RowStep(spare, start, count, [], False, True) for start, count in fitting]
        logits = self._try_ragged(steps)[:1].float()
        alone = StepSize(1, 1, True)
        self._pad(alone)
        for launches, end in self._endings.items():
            if launches is not None:
                end(alone, logits)

    def _try_ragged(self, steps: Sequence[RowStep]) -> torch.Tensor:
        entries = np.cumsum([step.count for step in steps], dtype=np.int32) - 1
        table = self.executor.stage_step(ragged_lengths(steps))
        staged = self.rows.stage_ragged(steps, entries, list(range(len(steps))), table)
        if self.executor.adapters is not None:
            self.executor.forward(staged.inputs._replace(adapters=self.rows.stage_adapters(steps)))
        return self.executor.forward(staged.inputs)

    def _prepare_ragged(self, size: StepSize) -> None:
        """Capture a step that is not only decoding; where that fails, all such steps are launched kernel by kernel."""
        if self._graphs is None or size._replace(adapters=False) not in self._ragged_sizes:
            return
        try:
            self._graphs.prepare(size)
        except RuntimeError as error:
            logger.warning("steps with prompts are not captured, which makes short ones slower: %s", error)
            self._ragged_sizes = []

    def _try_padded(self, size: StepSize) -> None:
        self._pad(size)
        logits = self._model(size)
        for end in self._endings_of(size).values():
            end(size, logits)

    def _pad(self, size: StepSize) -> None:
        if size.adapters:
            self.rows.stage_adapters([], size)
        if size.decode:
            self.rows.stage_decode([], size.sequences)
        elif self._padded_steps is not None:
            nothing = np.zeros(0, dtype=np.int32)
            table = self._padded_steps.stage(HostLengths(nothing, nothing), size)
            if table is None:
                raise RuntimeError(f"a step of nothing does not fit {size}")
            self.rows.stage_padded([], size, nothing, [], table)

    def _sample(self, staged: StagedStep, logits: torch.Tensor, rows: list[int], positions: list[int]) -> Sampled:
        """Choose tokens outside of a graph, for `logits` `[S, vocab]`, and write them behind their rows' tokens."""
        if self.sampler.waits(rows, positions):
            self._tell()
        sampled = self.sampler.sample(logits.float(), rows, positions)
        self.rows.append(staged, sampled.token_ids)
        return sampled

    def _tell(self) -> None:
        """Tell the sampler what the steps before this one chose, for its grammars and budgets.

        It waits for those steps. This one's model has been launched, so the device is busy while the host finds the
        tokens that may come next.
        """
        for plan, step in self._underway:
            if step.choices is None:
                continue
            token_ids, ok, _ = (tensor.tolist() for tensor in step.choices.wait())
            for number, token_id, usable in zip(step.sampling, token_ids, ok, strict=True):
                if usable:
                    row = plan.steps[number]
                    self.sampler.tell([row.row], [row.start + row.count], [token_id])

    def _launched(
        self, sampled: Sampled, sampling: list[int], prompt_logprobs: dict[int, PromptLogprobs]
    ) -> LaunchedStep:
        choices = self._transfers.to_host([sampled.token_ids, sampled.ok, sampled.exhausted])
        detailed = sampled if sampled.wanted or sampled.traces else None
        return LaunchedStep(sampling, choices, detailed, prompt_logprobs)

    def _guided_logits(self, steps: Sequence[RowStep], layout: LogitsLayout, logits_of: LogitsOf) -> torch.Tensor:
        """Logits of the rows that sample: of guided ones what theirs and their shadows' make together."""
        shadows = [other for _, other in layout.guides.values()]
        logits = logits_of(self._transfers.to_device(np.array([*layout.sampling, *shadows])))
        if not layout.guides:
            return logits
        count = len(layout.sampling)
        places = [[layout.sampling.index(own) for own, _ in layout.guides.values()], range(count, count + len(shadows))]
        own, others = self._transfers.to_device(np.array(places))
        scales = [self._requests.params[steps[number].row].guidance_scale for number in layout.guides]
        logits = logits.float()
        guide(logits, own, others, self._transfers.to_device(np.array(scales, np.float32)))
        return logits[:count]

    def _append_to_shadows(
        self, steps: Sequence[RowStep], layout: LogitsLayout, sampling: list[int], token_ids: torch.Tensor
    ) -> None:
        """Write what was chosen for guided rows behind their shadows' tokens too."""
        entries = {number: entry for entry, number in enumerate(sampling)}
        shadows = [steps[number + 1] for number in layout.guides]
        places = [
            (entries[number], step.row, step.start + step.count)
            for number, step in zip(layout.guides, shadows, strict=True)
        ]
        chosen, rows, positions = self._transfers.to_device(np.array(places, np.int32).T.copy())
        self.rows.write(rows, positions, token_ids[chosen])

    def _prompt_logprobs(self, step: RowStep, entries: range, logits_of: LogitsOf) -> PromptLogprobs:
        """Of the prompt behind the step's `entries` of the logits, some at a time: all might not fit the memory."""
        targets = self.rows.token_ids[step.row, step.start + 1 : step.start + 1 + len(entries)]
        top = self._requests.params[step.row].prompt_logprobs or 0
        found: list[TokenLogprobs] = []
        try:
            for at in range(0, len(entries), SCORED_ROWS):
                logits = logits_of(self._transfers.to_device(np.array(entries[at : at + SCORED_ROWS])))
                found += self.sampler.prompt_logprobs(logits.float(), targets[at : at + SCORED_ROWS], top)
        except RequestFailedError as error:
            return error
        return found


def _with_adapters(sizes: Sequence[StepSize]) -> list[StepSize]:
    """Each size, and the same for steps in which some rows have an adapter."""
    return [size._replace(adapters=adapters) for size in sizes for adapters in (True, False)]


def _unpack(chosen: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The first `count` token ids (int32) and two flags (bool) each, of `[6 * rows]` bytes."""
    num_rows = len(chosen) // 6
    ok, exhausted = chosen[4 * num_rows :].view(torch.bool).view(2, num_rows)
    return [chosen[: 4 * num_rows].view(torch.int32)[:count], ok[:count], exhausted[:count]]
