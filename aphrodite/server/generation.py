"""Running a request's prompts through the engine, for whichever endpoint."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from aphrodite.chat.answer import raw_marks
from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.engine.output import merge_outputs
from aphrodite.errors import InvalidRequestError, QueueFullError, RequestFailedError
from aphrodite.outputs import RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.body import BYTES_PER_TOKEN, BYTES_PER_TRACED_TOKEN, off_loop
from aphrodite.server.context import ModelContext
from aphrodite.server.metrics import RequestTimer


@dataclass(frozen=True, slots=True)
class Generation:
    """What an endpoint has made of a request."""

    response_id: str
    model: str
    prompts: list[list[int]]
    params: SamplingParams
    priority: int
    cache_salt: str | None
    progress: bool = False  # pieces without answers tell how much of a prompt is computed
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls,
        prefix: str,
        model: str,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> Generation:
        """`prefix` opens the response's id, which is always the server's own."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", model, prompts, params, priority, cache_salt, progress)

    def head(self, kind: str) -> dict[str, Any]:
        """The keys that the response and each of its chunks open with."""
        return {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}

    def body_bytes(self, num_tokens: int) -> int:
        """Roughly what a whole answer of so many tokens costs to write, in the measure of `off_loop`."""
        return num_tokens * (BYTES_PER_TRACED_TOKEN if self.params.sampler_trace else BYTES_PER_TOKEN)


class UsageCounter:
    """Token counts and times of all of a request's prompts and answers. Its clock runs from its making."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._lengths = [len(prompt) for prompt in prompts]
        self._prompt_tokens = sum(self._lengths)
        self._cached: dict[int, int] = {}
        self._generated: dict[tuple[int, int], int] = {}
        self._began = time.perf_counter()
        self._spans: dict[int, tuple[float, float]] = {}  # of a prompt: when its first step began, its first token came

    def observe(self, prompt: int, output: RequestOutput) -> None:
        self._cached[prompt] = output.num_cached_tokens
        for answer in output.outputs:
            self._generated[prompt, answer.index] = answer.num_tokens
        if prompt not in self._spans and output.outputs:
            self._spans[prompt] = (self._start(output), time.perf_counter())

    def usage(self) -> dict[str, Any]:
        completion_tokens = sum(self._generated.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    def timings(self) -> dict[str, float]:
        """llama.cpp's `timings` so far; of several prompts, from the first step of one to the first token of each."""
        cached = sum(self._cached.values())
        now = time.perf_counter()
        began = min((start for start, _ in self._spans.values()), default=now)
        first = max((first for _, first in self._spans.values()), default=now)
        return {
            "cache_n": cached,
            **_rates("prompt", self._prompt_tokens - cached, first - began),
            **_rates("predicted", sum(self._generated.values()), now - first),
        }

    def progress(self, prompt: int, output: RequestOutput) -> dict[str, float]:
        """llama.cpp's `prompt_progress` as of `output`; once there is an answer, all is done."""
        total = self._lengths[prompt]
        done = total if output.outputs else output.num_computed
        elapsed = round((time.perf_counter() - self._start(output)) * 1e3)
        return {"total": total, "cache": output.num_cached_tokens, "processed": done, "time_ms": elapsed}

    def _start(self, output: RequestOutput) -> float:
        """When the first step of a prompt began."""
        return self._began + (output.queue_seconds or 0.0)


def _rates(kind: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{kind}_n": count,
        f"{kind}_ms": seconds * 1e3,
        f"{kind}_per_token_ms": seconds * 1e3 / count if count else 0.0,
        f"{kind}_per_second": count / seconds if seconds > 0 else 0.0,
    }


async def stream_pieces(
    context: ModelContext, generation: Generation
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Pieces of all prompts as they come, each with its prompt's number. Closing it frees the requests.

    Raises:
        RequestFailedError: an answer failed in the engine.
        AphroditeError: whatever the engine refuses with.
    """
    if len(generation.prompts) == 1:
        stream = _stream_prompt(context, generation, 0)
        async with aclosing(stream):
            async for output in stream:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()

    async def pump(number: int) -> None:
        stream = _stream_prompt(context, generation, number)
        async with aclosing(stream):
            async for output in stream:
                queue.put_nowait((number, output))

    pumps = [asyncio.ensure_future(pump(number)) for number in range(len(generation.prompts))]
    for number, task in enumerate(pumps):
        task.add_done_callback(lambda _, number=number: queue.put_nowait((number, None)))  # type: ignore[misc]
    try:
        running = len(pumps)
        while running:
            number, piece = await queue.get()
            if piece is not None:
                yield number, piece
            else:
                running -= 1
                pumps[number].result()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def collect(context: ModelContext, generation: Generation) -> tuple[list[RequestOutput], UsageCounter]:
    """The whole results in the order of the prompts."""
    pieces: list[list[RequestOutput]] = [[] for _ in generation.prompts]
    counter = UsageCounter(generation.prompts)
    stream = stream_pieces(context, generation)
    async with aclosing(stream):
        async for number, output in stream:
            pieces[number].append(output)
            counter.observe(number, output)
    return [merge_outputs(parts) for parts in pieces], counter


async def _stream_prompt(
    context: ModelContext, generation: Generation, number: int
) -> AsyncGenerator[RequestOutput, None]:
    timer = RequestTimer(context.metrics, generation.params.n)
    params = await _with_marks(context, generation, number)
    stream = cast(
        AsyncGenerator[RequestOutput, None],
        context.engine.generate(
            generation.prompts[number],
            params,
            request_id=f"{generation.response_id}-{number}",
            priority=generation.priority,
            cache_salt=generation.cache_salt,
            progress=generation.progress,
            adapter=context.adapter,
        ),
    )
    try:
        with context.loaded.hold():
            async for output in stream:
                if output.outputs:  # otherwise it tells progress
                    timer.observe(output)
                for answer in output.outputs:
                    if answer.finish_reason in ("error", "abort"):
                        raise RequestFailedError(answer.error or "the engine ended the request")
                yield output
    except (InvalidRequestError, QueueFullError):
        timer.refused()
        raise
    finally:
        timer.close()
        await stream.aclose()


async def _with_marks(context: ModelContext, generation: Generation, number: int) -> SamplingParams:
    """The request's parameters; a budget of reasoning needs its marks where a text that no template made goes on."""
    params, prompt = generation.params, generation.prompts[number]
    if params.thinking_token_budget is None or params.reasoning is not None or params.grammar is not None:
        return params
    engine = context.engine
    reasoning = reasoning_marks(engine.chat_template.traits, context.config.reasoning_parser)
    if reasoning is None:
        return params
    size = len(prompt) * BYTES_PER_TOKEN
    text = await off_loop(size, lambda: engine.tokenizer.decode(prompt, skip_special_tokens=False))
    return msgspec.structs.replace(params, reasoning=raw_marks(reasoning, text))
