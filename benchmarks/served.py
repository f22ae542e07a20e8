"""What a client sees: the start of `aphrodite run`, and a loaded server beside the same work offline."""

from __future__ import annotations

import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from aphrodite.cli.bench_client import Client, Load, run_load
from aphrodite.cli.bench_offline import random_prompts, time_generate
from aphrodite.cli.console import progress_bar, stderr
from aphrodite.errors import AphroditeError
from aphrodite.llm import LLM

STREAMS = 16
INPUT_LEN, OUTPUT_LEN = 128, 128
START_LIMIT = 120.0  # seconds after which a start has failed


@dataclass(frozen=True, slots=True)
class Comparison:
    """Output tokens a second, medians."""

    offline: float
    served: float

    @property
    def loss(self) -> float:
        return 1 - self.served / self.offline


@contextmanager
def running_server(model: str | None, threads: int) -> Iterator[str]:
    """`aphrodite run` on a free port of the loopback; yields its address at once, before it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "aphrodite.cli", "run", *([model] if model else []), "--device", "cpu"]
    options = ["--port", str(port), "--threads", str(threads), "--log-level", "warning"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        _, message = process.communicate(timeout=60)
        if process.returncode != 0:
            print(message, file=sys.stderr)


def time_start(model: str | None, *, threads: int, rounds: int) -> float:
    """Median seconds from starting `aphrodite run` to the first token that it serves."""
    seconds = []
    with progress_bar(stderr(), unit="starts") as bar:
        for _ in bar.track(range(rounds), description="start to first token"):
            began = time.perf_counter()
            with running_server(model, threads) as url:
                asyncio.run(_first_token(url))
                seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


async def _first_token(url: str) -> None:
    """Ask until the server listens, then wait for a token."""
    deadline = time.monotonic() + START_LIMIT
    while True:
        client = Client(url)
        try:
            name = (await client.get("/v1/models"))["data"][0]["id"]
            body = {"model": name, "prompt": "Once upon a time", "max_tokens": 1, "stream": True}
            async for event in client.events("/v1/completions", body):
                if event.get("choices"):
                    return
            raise RuntimeError("the server answered without a token")
        except (AphroditeError, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
        finally:
            await client.close()


def compare_with_offline(model: str | None, *, threads: int, rounds: int) -> Comparison:
    """The same prompts through a server and offline, in turn; one warm-up round does not count."""
    source = random.Random(0)
    offline, through = [], []
    llm = LLM(model, device="cpu", threads=threads)
    try:
        with running_server(model, threads) as url, progress_bar(stderr(), unit="rounds") as bar:
            asyncio.run(_first_token(url))
            for _ in bar.track(range(rounds + 1), description=f"server, {STREAMS} streams"):
                prompts = random_prompts(source, llm.info.vocab_size, [INPUT_LEN] * STREAMS)
                offline.append(_offline_rate(llm, prompts))
                through.append(asyncio.run(_served_rate(url, prompts)))
    finally:
        llm.close()
    return Comparison(statistics.median(offline[1:]), statistics.median(through[1:]))


def _offline_rate(llm: LLM, prompts: list[list[int]]) -> float:
    return len(prompts) * OUTPUT_LEN / time_generate(llm, prompts, OUTPUT_LEN)


async def _served_rate(url: str, prompts: Sequence[list[int]]) -> float:
    client = Client(url)
    load = Load(prompts=prompts, output_len=OUTPUT_LEN, concurrency=STREAMS, extra={"temperature": 0.0})
    try:
        name = (await client.get("/v1/models"))["data"][0]["id"]
        samples, elapsed = await run_load(client, name, load, lambda: None)
    finally:
        await client.close()
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return sum(sample.output_tokens for sample in samples) / elapsed
