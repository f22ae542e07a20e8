"""Measuring the engine in this process: latency of steps, throughput of a heap of prompts.

Decode speed is taken as a difference: prompts whose KV cache is already there are answered with one token and
with many, so that neither the prefill nor the call itself counts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from aphrodite.errors import RequestFailedError
from aphrodite.sampling.params import SamplingParams

if TYPE_CHECKING:
    from aphrodite.llm import LLM
    from aphrodite.outputs import RequestOutput

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians over the repeats. Times are seconds, sizes are bytes, one step makes `batch_size` tokens."""

    batch_size: int
    input_len: int
    output_len: int
    repeats: int
    ttft: float  # from the call to the first token of all prompts, nothing cached
    step: float
    host: float  # the engine's own share of a step: scheduling, sampling, bookkeeping
    weight_bytes: int  # read by one step; of experts as many as tokens that choose at random are expected to choose
    kv_bytes: int  # read by one step, at the middle of the output

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.batch_size * self.input_len / self.ttft

    @property
    def decode_rate(self) -> float:
        """Output tokens a second, of all sequences together."""
        return self.batch_size / self.step

    @property
    def bytes_per_second(self) -> float:
        """Weights and KV cache that a decode step reads, over its time."""
        return (self.weight_bytes + self.kv_bytes) / self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """A heap of prompts answered together. Seconds."""

    num_prompts: int
    input_tokens: int
    output_tokens: int
    elapsed: float


def random_prompts(source: random.Random, vocab_size: int, lengths: list[int]) -> list[list[int]]:
    """Prompts of random token ids, so that none shares a beginning with another."""
    return [[source.randrange(vocab_size) for _ in range(length)] for length in lengths]


class Run(NamedTuple):
    """One timing of equal sequences. Seconds."""

    ttft: float
    step: float
    host: float


def time_once(llm: LLM, source: random.Random, *, batch_size: int, input_len: int, output_len: int) -> Run:
    """Prefill fresh random prompts, then decode `output_len` steps on top of their KV cache."""
    prompts = random_prompts(source, llm.info.vocab_size, [input_len] * batch_size)
    ttft = time_generate(llm, prompts, 1)
    short = time_generate(llm, prompts, 1)
    long = time_generate(llm, prompts, output_len + 1)
    return Run(ttft, (long - short) / output_len, llm.stats().host_ms / 1e3)


def summarize(llm: LLM, runs: Sequence[Run], *, batch_size: int, input_len: int, output_len: int) -> Latency:
    """Medians of runs of the same shape."""
    info = llm.info
    context = input_len + output_len / 2
    return Latency(
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        repeats=len(runs),
        ttft=statistics.median(run.ttft for run in runs),
        step=statistics.median(run.step for run in runs),
        host=statistics.median(run.host for run in runs),
        weight_bytes=info.weight_bytes - int(info.expert_bytes * (1.0 - info.expert_share) ** batch_size),
        kv_bytes=int(batch_size * context * info.kv_bytes_per_block / info.block_size),
    )


def measure_latency(
    llm: LLM, *, batch_size: int, input_len: int, output_len: int, repeats: int, seed: int = 0,
    advance: Advance = lambda: None,
) -> Latency:  # fmt: skip
    """Time prefill and decode of `batch_size` equal sequences; one warm-up run is not counted.

    Args:
        advance: called after each of the `repeats + 1` runs.
    """
    source = random.Random(seed)
    runs = []
    for _ in range(repeats + 1):
        runs.append(time_once(llm, source, batch_size=batch_size, input_len=input_len, output_len=output_len))
        advance()
    return summarize(llm, runs[1:], batch_size=batch_size, input_len=input_len, output_len=output_len)


def time_generate(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Seconds to answer `prompts` together with `tokens` tokens each, greedily."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    elapsed = time.perf_counter() - began
    _check_complete(outputs, len(prompts) * tokens)
    return elapsed


def _check_complete(outputs: Sequence[RequestOutput], expected: int) -> int:
    """Output tokens of all answers. A failed or short answer would only look fast.

    Raises:
        RequestFailedError: fewer tokens came than were asked for.
    """
    answers = [answer for output in outputs for answer in output.outputs]
    tokens = sum(answer.num_tokens for answer in answers)
    if tokens != expected:
        reason = next((answer.error for answer in answers if answer.error), "an answer ended early")
        raise RequestFailedError(f"{tokens} of {expected} tokens came: {reason}; the measurement is void.")
    return tokens


def measure_throughput(
    llm: LLM, *, num_prompts: int, input_range: tuple[int, int], output_range: tuple[int, int], seed: int,
    progress: bool,
) -> Throughput:  # fmt: skip
    """Answer `num_prompts` prompts of random lengths at once; ranges are inclusive, in tokens."""
    source = random.Random(seed)
    lengths = [source.randint(*input_range) for _ in range(num_prompts)]
    prompts = random_prompts(source, llm.info.vocab_size, lengths)
    params = [
        SamplingParams(max_tokens=source.randint(*output_range), ignore_eos=True, seed=number)
        for number in range(num_prompts)
    ]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=progress)
    elapsed = time.perf_counter() - began
    return Throughput(
        num_prompts=num_prompts,
        input_tokens=sum(lengths),
        output_tokens=_check_complete(outputs, sum(one.max_tokens or 0 for one in params)),
        elapsed=elapsed,
    )
