"""A load generator for a server that speaks OpenAI's protocol, light enough to share a machine with it.

HTTP/1.1 over plain asyncio streams with kept connections; one task a request. Results carry the names that
vLLM's `bench serve` writes, so that tools which read those files read ours.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aphrodite.errors import AphroditeError, ConfigError

PERCENTILES = (50, 90, 95, 99)
MAX_LINE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Exactly one of `concurrency` and `rate` shapes it.

    Attributes:
        prompts: token ids of each request's prompt.
        output_len: tokens to generate for each.
        concurrency: so many requests are always under way; None is no limit.
        rate: requests a second, with Poisson arrivals; None sends as fast as `concurrency` allows.
        extra: further fields of each request's body.
    """

    prompts: Sequence[Sequence[int]]
    output_len: int
    concurrency: int | None = None
    rate: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(slots=True)
class Sample:
    """One request as its client saw it. Seconds since it was sent."""

    input_tokens: int
    output_tokens: int = 0
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    error: str = ""

    @property
    def tpot(self) -> float:
        """Time of an output token after the first."""
        return (self.elapsed - self.ttft) / max(self.output_tokens - 1, 1)


class Client:
    """Keeps connections to one server and sends requests over them."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is not an address; expected one such as http://127.0.0.1:2242.")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str) -> Any:
        """The JSON answer of a GET.

        Raises:
            AphroditeError: the server cannot be reached or refuses.
        """
        try:
            body = b"".join([chunk async for chunk in self._exchange("GET", path, b"")])
        except OSError as error:
            raise AphroditeError(f"cannot talk to the server at {self.url}: {error}. Is it running?") from None
        return json.loads(body)

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events of a POST, until `[DONE]` or the end."""
        rest = b""
        async for chunk in self._exchange("POST", path, json.dumps(body).encode()):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        reader, writer = self._idle.pop() if self._idle else await self._connect()
        kept = False
        try:
            head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status, headers = await _read_head(reader)
            async for chunk in _read_body(reader, headers):
                if status != 200:
                    raise AphroditeError(f"status {status}: {chunk[:300].decode('utf-8', 'replace')}")
                yield chunk
            kept = headers.get("connection", "").lower() != "close"
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, ssl=self._secure or None, limit=MAX_LINE)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ", 2)[1])
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, IndexError, ValueError):
        raise AphroditeError("the server closed the connection or does not speak HTTP") from None
    pairs = (line.partition(":") for line in rest if line)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    try:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            yield await reader.readexactly(int(headers.get("content-length", "0")))
            return
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    except (asyncio.IncompleteReadError, ValueError):
        raise AphroditeError("the server broke off its answer") from None


async def run_load(client: Client, model: str, load: Load, advance: Callable[[], None]) -> tuple[list[Sample], float]:
    """Send every prompt; returns the samples in the order of the prompts, and the seconds it took."""
    source = random.Random(load.seed)
    slots = asyncio.Semaphore(load.concurrency or len(load.prompts))

    async def one(prompt: Sequence[int]) -> Sample:
        async with slots:
            sample = await _send(client, model, prompt, load)
        advance()
        return sample

    tasks = []
    began = time.perf_counter()
    arrival = began
    async with asyncio.TaskGroup() as group:
        for prompt in load.prompts:
            tasks.append(group.create_task(one(prompt)))
            if load.rate is not None:
                arrival += source.expovariate(load.rate)
                await asyncio.sleep(max(arrival - time.perf_counter(), 0))
    return [task.result() for task in tasks], time.perf_counter() - began


async def _send(client: Client, model: str, prompt: Sequence[int], load: Load) -> Sample:
    sample = Sample(input_tokens=len(prompt))
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": load.output_len,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.extra,
    }
    began = last = time.perf_counter()
    try:
        async for event in client.events("/v1/completions", body):
            now = time.perf_counter()
            if "error" in event:
                raise AphroditeError(str(event["error"].get("message")))
            if event.get("choices"):
                if sample.ttft:
                    sample.gaps.append(now - last)
                else:
                    sample.ttft = now - began
                last = now
            if event.get("usage"):
                sample.input_tokens = event["usage"]["prompt_tokens"]
                sample.output_tokens = event["usage"]["completion_tokens"]
    except (AphroditeError, OSError, ValueError) as error:
        sample.error = str(error) or type(error).__name__
    # The last token's time, not that of the usage event and the end of the connection.
    sample.elapsed = last - began
    if not sample.error and not sample.output_tokens:
        sample.error = "the server reported no output tokens (does it know stream_options.include_usage?)"
    return sample


def summarize(samples: Sequence[Sample], elapsed: float, load: Load, model: str) -> dict[str, Any]:
    """Totals, rates and percentiles (milliseconds) under vLLM's names."""
    good = [sample for sample in samples if not sample.error]
    inputs, outputs = sum(s.input_tokens for s in good), sum(s.output_tokens for s in good)
    summary: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai",
        "model_id": model,
        "num_prompts": len(samples),
        "request_rate": load.rate if load.rate is not None else "inf",
        "max_concurrency": load.concurrency,
        "duration": elapsed,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / elapsed,
        "output_throughput": outputs / elapsed,
        "total_token_throughput": (inputs + outputs) / elapsed,
    }
    metrics = {
        "ttft": [sample.ttft for sample in good],
        "tpot": [sample.tpot for sample in good if sample.output_tokens > 1],
        "itl": [gap for sample in good for gap in sample.gaps],
        "e2el": [sample.elapsed for sample in good],
    }
    for name, values in metrics.items():
        summary.update(_statistics(name, values))
    summary["errors"] = sorted({sample.error for sample in samples if sample.error})
    return summary


def _statistics(name: str, seconds: list[float]) -> dict[str, float]:
    values = sorted(value * 1e3 for value in seconds) or [0.0]
    summary = {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
    }
    for percent in PERCENTILES:
        summary[f"p{percent}_{name}_ms"] = percentile(values, percent)
    return summary


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks of an ascending, non-empty sequence."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
