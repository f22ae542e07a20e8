"""The data plane: applies a plan to the rows, runs the model and the sampler, and reports the result.

`launch` starts a step and `collect` waits for it. With `async_depth` 0 a step runs inside `launch`;
with 1 it runs on the runner's own thread, in the order of launching, while the host schedules the next.
Both read and write the same rows, so what a step computes does not depend on the depth.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from aphrodite.core.plan import RowResult, RowStep, StepPlan, StepResult, TokenLogprobs
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.rows import Rows
from aphrodite.sampling.extensions import installed_extensions
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampled, Sampler
from aphrodite.sampling.vocabulary import TokenizerLike, Vocabulary

NON_FINITE_LOGITS = (
    "the model produced non-finite logits for this request; the weights may be damaged or overflow"
    " in this precision: try --dtype float32"
)
NOTHING_ALLOWED = (
    "no token may be chosen at this position: token bans, allowed_token_ids, bad_words and min_tokens together"
    " leave nothing of the vocabulary; loosen them"
)

EXTENSION_FAILED = "; or a sampler extension failed for it: then the server's log has its error"


class LogitsLayout(NamedTuple):
    """Which token rows' logits a step wants, and where each sequence's rows of them lie."""

    entries: np.ndarray  # [L] int32, token rows
    sampling: list[int]  # indices of `entries` that sample, in the order of the sampling steps
    prompt: dict[int, tuple[int, int]]  # step number -> slice of `entries` for prompt log-probabilities


@dataclass(slots=True)
class DeviceStep:
    """A step's outcome, still in tensors."""

    sampled: Sampled | None
    sampling_steps: list[int]  # step number of each entry of `sampled`
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    forward_seconds: float


class Runner:
    """Owns the rows, the executor and the sampler.

    Args:
        tokenizer: for samplers whose parameters are texts; without it requests with such parameters fail.
    """

    def __init__(
        self,
        executor: ModelExecutor,
        *,
        num_rows: int,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        async_depth: int,
        tokenizer: TokenizerLike | None = None,
    ) -> None:
        executor.allocate_kv_cache(num_blocks)
        self.executor = executor
        self.rows = Rows(num_rows, max_model_len, executor.block_size)
        self.sampler = Sampler(
            num_rows=num_rows,
            vocab_size=executor.spec.vocab_size,
            eos_token_ids=eos_token_ids,
            token_ids=self.rows.token_ids,
            num_prompt=self.rows.num_prompt,
            device=executor.device,
            vocabulary=None if tokenizer is None else Vocabulary(executor.spec.vocab_size, tokenizer),
        )
        self.async_depth = async_depth
        self._params: dict[int, SamplingParams] = {}
        self._thread = ThreadPoolExecutor(1, "runner") if async_depth else None

    def launch(self, plan: StepPlan) -> Future[DeviceStep]:
        """Start the step; the caller keeps launching and collecting in the same order."""
        if self._thread is not None:
            return self._thread.submit(self._run, plan)
        future: Future[DeviceStep] = Future()
        try:
            future.set_result(self._run(plan))
        except Exception as error:
            future.set_exception(error)
        return future

    def collect(self, plan: StepPlan, step: Future[DeviceStep]) -> tuple[StepResult, float]:
        """Wait for the step; returns its result and the seconds that the model's forward took.

        Raises:
            Exception: whatever the forward pass or the sampler raised.
        """
        outcome = step.result()
        rows = [
            RowResult(row.row, prompt_logprobs=outcome.prompt_logprobs.get(number))
            for number, row in enumerate(plan.steps)
        ]
        if outcome.sampled is not None:
            tokens = outcome.sampled.token_ids.tolist()
            finite = outcome.sampled.ok.tolist()
            exhausted = outcome.sampled.exhausted.tolist()
            for entry, number in enumerate(outcome.sampling_steps):
                if finite[entry]:
                    logprobs = outcome.sampled.logprobs_of(entry)
                    trace = outcome.sampled.trace_of(entry)
                    rows[number] = rows[number]._replace(token_id=tokens[entry], logprobs=logprobs, trace=trace)
                else:
                    reason = NOTHING_ALLOWED if exhausted[entry] else _non_finite_logits()
                    rows[number] = rows[number]._replace(error=reason)
        return StepResult(plan.step_id, rows), outcome.forward_seconds

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> DeviceStep:
        for row in plan.ends:
            self.sampler.end(row)
            self._params.pop(row, None)
        self.rows.apply(plan)
        for start in plan.starts:
            self._params[start.row] = start.sampling
            self.sampler.start(start.row, start.sampling, start.seed, start.prompt_token_ids)
        for rewind in plan.rewinds:
            self.sampler.rewind(rewind.row, rewind.position)
            if rewind.barred:
                self.sampler.bar(rewind.row, rewind.position, rewind.barred)
            else:
                self.sampler.unbar(rewind.row, rewind.position)
        if not plan.steps:
            return DeviceStep(None, [], {}, 0.0)
        layout = self._logits_layout(plan.steps)
        inputs = self.rows.inputs(plan.steps, layout.entries)
        began = time.perf_counter()
        logits = self.executor.forward(inputs)
        forward_seconds = time.perf_counter() - began
        prompt_logprobs = {
            number: self._prompt_logprobs(plan.steps[number], logits[first:end])
            for number, (first, end) in layout.prompt.items()
        }
        return self._sample(plan.steps, layout, logits, prompt_logprobs, forward_seconds)

    def _sample(
        self,
        steps: list[RowStep],
        layout: LogitsLayout,
        logits: torch.Tensor,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        forward_seconds: float,
    ) -> DeviceStep:
        sampling_steps = [number for number, step in enumerate(steps) if step.samples]
        if not sampling_steps:
            return DeviceStep(None, [], prompt_logprobs, forward_seconds)
        if layout.prompt:
            logits = logits[layout.sampling]
        rows = [steps[number].row for number in sampling_steps]
        positions = [steps[number].start + steps[number].count for number in sampling_steps]
        sampled = self.sampler.sample(logits, rows, positions)
        self.rows.append(rows, positions, sampled.token_ids)
        return DeviceStep(sampled, sampling_steps, prompt_logprobs, forward_seconds)

    def _logits_layout(self, steps: list[RowStep]) -> LogitsLayout:
        """The last token of every sampling row, and a prompt's every position where its logprobs are wanted."""
        if not any(self._params[step.row].prompt_logprobs is not None for step in steps):
            ends = np.cumsum(np.array([step.count for step in steps], dtype=np.int32), dtype=np.int32) - 1
            samples = np.array([step.samples for step in steps], dtype=bool)
            return LogitsLayout(ends[samples], list(range(int(samples.sum()))), {})
        entries: list[int] = []
        sampling: list[int] = []
        prompt: dict[int, tuple[int, int]] = {}
        first_token = 0
        for number, step in enumerate(steps):
            last_token = first_token + step.count - 1
            if self._params[step.row].prompt_logprobs is not None:
                # Logits at position p speak of position p + 1, which has to lie inside the prompt.
                inside = min(step.count, int(self.rows.num_prompt[step.row]) - 1 - step.start)
                if inside > 0:
                    prompt[number] = (len(entries), len(entries) + inside)
                    entries.extend(range(first_token, first_token + inside))
            if step.samples:
                sampling.append(len(entries))
                entries.append(last_token)
            first_token += step.count
        return LogitsLayout(np.array(entries, dtype=np.int32), sampling, prompt)

    def _prompt_logprobs(self, step: RowStep, logits: torch.Tensor) -> list[TokenLogprobs]:
        count = len(logits)
        targets = self.rows.token_ids[step.row, step.start + 1 : step.start + 1 + count]
        top = self._params[step.row].prompt_logprobs
        return self.sampler.prompt_logprobs(logits, targets, top or 0)


def _non_finite_logits() -> str:
    return NON_FINITE_LOGITS + (EXTENSION_FAILED if installed_extensions() else "")
