"""The data plane: applies a plan to the rows, runs the model and the sampler, and reports the result.

`launch` starts a step and `collect` waits for it. With `async_depth` 0 a step runs inside `collect`;
with 1 it runs on the runner's own thread, in the order of launching, while the host schedules the next.
Both read and write the same rows, so what a step computes does not depend on the depth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from aphrodite.core.plan import RowResult, RowStep, StepPlan, StepResult
from aphrodite.errors import RequestFailedError
from aphrodite.runner.executor import ModelExecutor, place_adapters
from aphrodite.runner.inputs import ForwardInputs
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
from aphrodite.runner.rows import Rows
from aphrodite.sampling.guidance import guide
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.pipeline import Sampler
from aphrodite.sampling.vocabulary import TokenizerLike, Vocabulary


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
        self._requests = RowRequests(self.sampler)
        self._pooler = Pooler()
        self._thread = ThreadPoolExecutor(1, "runner") if async_depth else None

    def prepare(self, params: SamplingParams) -> None:
        """Make what is slow to make of a request's parameters; may run beside everything else."""
        self.sampler.prepare(params)

    def launch(self, plan: StepPlan) -> Future[Outcome] | None:
        """Start the step; the caller keeps launching and collecting in the same order."""
        return None if self._thread is None else self._thread.submit(self._run, plan)

    def collect(self, plan: StepPlan, step: Future[Outcome] | None) -> Outcome:
        """Wait for the step that `launch` returned.

        Raises:
            Exception: whatever the forward pass or the sampler raised.
        """
        if step is None:
            return self._run(plan)
        began = time.perf_counter()
        return step.result()._replace(waited_seconds=time.perf_counter() - began)

    def lost(self) -> None:
        """A host's steps fail one by one."""

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _run(self, plan: StepPlan) -> Outcome:
        parts: list[Callable[[StepPlan], None]] = [partial(place_adapters, self.executor)]
        parts += [self.rows.apply, self._requests.apply, self._pooler.apply]
        take_over(parts, lambda part: part(plan))
        steps = plan.steps
        if not steps:
            return Outcome(StepResult(plan.step_id, []), 0.0, 0.0)
        rows = [step.row for step in steps]
        decodes = all(step.count == 1 and step.samples for step in steps)
        layout = None if decodes else logits_layout(steps, self._requests.scored)
        if layout is None or (len(layout.entries) == len(steps) and all(step.count == 1 for step in steps)):
            inputs = self.rows.decode_inputs(steps, rows)
        else:
            inputs = self.rows.inputs(steps, layout.entries)
        pooled = None if decodes else self._pooler.layout(steps)
        began = time.perf_counter()
        embeddings: dict[int, RowResult] = {}
        if pooled is None:
            logits = self.executor.forward(inputs)
        else:
            logits, embeddings = self._forward_pooled(steps, inputs, pooled)
        forward_seconds = time.perf_counter() - began
        if layout is None:
            results = self._sample(logits, rows, [step.start + 1 for step in steps])
        else:
            results = self._finish_chunks(steps, layout, logits)
            for number, result in embeddings.items():
                results[number] = result
        self._requests.fail_unservable(results)
        return Outcome(StepResult(plan.step_id, results), forward_seconds, forward_seconds)

    def _forward_pooled(
        self, steps: list[RowStep], inputs: ForwardInputs, pooled: HiddenLayout
    ) -> tuple[torch.Tensor, dict[int, RowResult]]:
        """Logits of a step, and what became of the prompts in it that are to be pooled."""
        logits, hidden = self.executor.forward_hidden(inputs, torch.from_numpy(pooled.entries))
        return logits, self._pooler.collect(steps, pooled, part_sums(hidden, pooled).numpy())

    def _finish_chunks(self, steps: list[RowStep], layout: LogitsLayout, logits: torch.Tensor) -> list[RowResult]:
        """Results of a step in which not every row decodes: samples for those that do, prompts' scores."""
        prompt_logprobs = {
            number: self._prompt_logprobs(steps[number], logits[first:end])
            for number, (first, end) in layout.prompt.items()
        }
        sampling = [step for step in steps if step.samples]
        sampled: Iterator[RowResult] = iter(())
        if sampling:
            if layout.guides:
                self._guide(steps, layout, logits)
            if layout.prompt or layout.guides:
                logits = logits[layout.sampling]
            rows, positions = [step.row for step in sampling], [step.start + step.count for step in sampling]
            sampled = iter(self._sample(logits, rows, positions))
        results = [next(sampled) if step.samples else RowResult(step.row) for step in steps]
        for number in layout.guides:
            token_id, shadow = results[number].token_id, steps[number + 1]
            if token_id is not None:
                self.rows.append([shadow.row], [shadow.start + shadow.count], [token_id])
        for number, logprobs in prompt_logprobs.items():
            results[number] = with_prompt_logprobs(results[number], logprobs)
        return results

    def _guide(self, steps: list[RowStep], layout: LogitsLayout, logits: torch.Tensor) -> None:
        own, others = torch.tensor(list(layout.guides.values())).unbind(1)
        scales = torch.tensor([self._requests.params[steps[number].row].guidance_scale for number in layout.guides])
        guide(logits, own, others, scales)

    def _sample(self, logits: torch.Tensor, rows: list[int], positions: list[int]) -> list[RowResult]:
        """Choose the next token of each row, and note it where the next step finds it."""
        sampled = self.sampler.sample(logits, rows, positions)
        token_ids, finite, exhausted = sampled.lists()
        self.rows.append(rows, positions, token_ids)
        results = list(map(RowResult, rows, token_ids))
        for entry in {*sampled.wanted, *sampled.traces}:
            logprobs, trace = sampled.logprobs_of(entry), sampled.trace_of(entry)
            results[entry] = results[entry]._replace(logprobs=logprobs, trace=trace)
        if not all(finite):
            for entry, row in enumerate(rows):
                if not finite[entry]:
                    results[entry] = RowResult(row, error=self._requests.error(row, exhausted[entry]))
        self._requests.follow(results, positions)
        return results

    def _prompt_logprobs(self, step: RowStep, logits: torch.Tensor) -> PromptLogprobs:
        count = len(logits)
        targets = self.rows.token_ids[step.row, step.start + 1 : step.start + 1 + count]
        top = self._requests.params[step.row].prompt_logprobs
        try:
            return self.sampler.prompt_logprobs(logits, targets, top or 0)
        except RequestFailedError as error:
            return error
