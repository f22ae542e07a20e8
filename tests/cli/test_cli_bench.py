"""The load generator against a server of known behaviour, and the arithmetic of what is reported."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aphrodite.cli import bench
from aphrodite.cli.bench_client import Client, Load, Sample, percentile, run_load, summarize
from aphrodite.cli.bench_offline import Run, measure_latency, measure_throughput, random_prompts
from aphrodite.cli.bench_offline import summarize as summarize_runs
from aphrodite.cli.main import app
from aphrodite.errors import AphroditeError, RequestFailedError
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.sampling.params import SamplingParams

Respond = Callable[[dict[str, Any]], Sequence[bytes]]


def sse(*events: Any) -> list[bytes]:
    return [*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"]


def tokens(body: dict[str, Any]) -> list[bytes]:
    pieces = [{"choices": [{"text": "x"}]} for _ in range(body["max_tokens"])]
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return sse(*pieces, {"choices": [], "usage": usage})


class FakeServer:
    """Speaks chunked HTTP; every chunk is cut in two, as a network may do."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.active = self.most_active = 0
        self.keys: set[str] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while head := (await reader.readuntil(b"\r\n\r\n")).decode():
            lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            self.keys.add(lines.get("Authorization", ""))
            data = await reader.readexactly(int(lines["Content-Length"]))
            if head.startswith("GET"):
                answer = b'{"data": [{"id": "fake"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
                continue
            body = json.loads(data)
            self.bodies.append(body)
            await self._stream(writer, self.respond(body))

    async def _stream(self, writer: asyncio.StreamWriter, chunks: Sequence[bytes]) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for chunk in chunks:
            for part in (chunk[:7], chunk[7:]):
                if part:
                    writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            await asyncio.sleep(0)
        self.active -= 1
        writer.write(b"0\r\n\r\n")


@asynccontextmanager
async def serving(respond: Respond) -> AsyncIterator[tuple[FakeServer, Client]]:
    fake = FakeServer(respond)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await fake.handle(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", api_key="sesame")
        try:
            yield fake, client
        finally:
            await client.close()


class TestLoad:
    async def test_counts_connections_and_concurrency(self):
        prompts = random_prompts(random.Random(0), 100, [5] * 12)
        load = Load(prompts=prompts, output_len=4, concurrency=3, extra={"temperature": 0.5})
        done = []
        async with serving(tokens) as (fake, client):
            samples, elapsed = await run_load(client, "fake", load, lambda: done.append(1))
        assert [(s.input_tokens, s.output_tokens, s.error, len(s.gaps)) for s in samples] == [(5, 4, "", 3)] * 12
        assert all(0 < s.ttft <= s.elapsed <= elapsed for s in samples)
        assert fake.most_active <= 3
        assert fake.connections <= 3
        assert len(done) == 12
        assert sorted(body["prompt"] for body in fake.bodies) == sorted(prompts)
        assert all(body["temperature"] == 0.5 and body["ignore_eos"] is True for body in fake.bodies)
        assert fake.keys == {"Bearer sesame"}

    async def test_a_rate_sends_everything(self):
        load = Load(prompts=[[1]] * 5, output_len=2, rate=10_000.0)
        async with serving(tokens) as (fake, client):
            samples, _ = await run_load(client, "fake", load, lambda: None)
        assert len(fake.bodies) == 5
        assert all(not sample.error for sample in samples)

    @pytest.mark.parametrize(
        ("chunks", "words"),
        [
            (sse({"error": {"message": "no luck"}}), "no luck"),
            (sse({"choices": [{"text": "x"}]}), "no output tokens"),
            ([b"data: {not json\n\n"], "Expecting"),
        ],
    )
    async def test_a_failed_request_is_counted_and_the_others_go_on(self, chunks, words):
        load = Load(prompts=[[1], [2]], output_len=2, concurrency=1)
        async with serving(lambda body: chunks if body["prompt"] == [1] else tokens(body)) as (_, client):
            samples, elapsed = await run_load(client, "fake", load, lambda: None)
        assert words in samples[0].error
        assert samples[1].error == ""
        summary = summarize(samples, elapsed, load, "fake")
        assert (summary["completed"], summary["failed"], summary["total_output_tokens"]) == (1, 1, 2)

    async def test_no_server(self):
        with pytest.raises(AphroditeError, match="Is it running"):
            await Client("127.0.0.1:9").get("/v1/models")
        load = Load(prompts=[[1]], output_len=1, concurrency=1)
        samples, _ = await run_load(Client("127.0.0.1:9"), "m", load, lambda: None)
        assert samples[0].error


class TestSummary:
    def test_rates_and_times(self):
        samples = [
            Sample(10, 3, ttft=0.1, gaps=[0.2, 0.4], elapsed=0.7),
            Sample(20, 2, ttft=0.3, gaps=[0.1], elapsed=0.4),
            Sample(5, error="gone"),
        ]
        summary = summarize(samples, 2.0, Load(prompts=[[1]] * 3, output_len=3, rate=4.0), "m")
        assert (summary["completed"], summary["failed"], summary["errors"]) == (2, 1, ["gone"])
        assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (30, 5)
        assert summary["output_throughput"] == 2.5
        assert summary["total_token_throughput"] == 17.5
        assert summary["mean_ttft_ms"] == pytest.approx(200)
        assert summary["mean_tpot_ms"] == pytest.approx((300 + 100) / 2)
        assert summary["median_itl_ms"] == pytest.approx(200)
        assert summary["mean_e2el_ms"] == pytest.approx(550)

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
    def test_percentiles_are_numpys(self, values, percent):
        assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), abs=1e-6, rel=1e-9)


class FakeLLM:
    """Answers at once with as many tokens as asked for."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(
            vocab_size=50,
            weight_bytes=1000,
            expert_bytes=0,
            expert_share=1.0,
            kv_bytes_per_block=160,
            block_size=16,
            kernels={},
            memory_plan=[],
        )
        self.calls: list[tuple[list[list[int]], Any]] = []
        self.closed = False
        self.short = 0  # tokens that the last answer lacks

    def generate(self, prompts: Any, params: Any, *, progress: bool) -> list[RequestOutput]:
        self.calls.append((prompts, params))
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        counts = [one.max_tokens for one in each]
        counts[-1] -= self.short
        return [
            RequestOutput("0", prompt, [CompletionOutput(0, num_tokens=count)], finished=True)
            for prompt, count in zip(prompts, counts, strict=True)
        ]

    def stats(self) -> Any:
        return SimpleNamespace(host_ms=0.25)

    def close(self) -> None:
        self.closed = True


class TestOffline:
    def test_latency_arithmetic(self):
        runs = [Run(ttft=0.5, step=0.01, host=0.001), Run(0.4, 0.02, 0.003), Run(0.6, 0.04, 0.002)]
        result = summarize_runs(FakeLLM(), runs, batch_size=4, input_len=100, output_len=40)
        assert (result.ttft, result.step, result.host) == (0.5, 0.02, 0.002)
        assert result.decode_rate == pytest.approx(200)
        assert result.prefill_rate == pytest.approx(800)
        assert result.kv_bytes == 4 * 120 * 10  # sequences, mean context, bytes a token
        assert result.bytes_per_second == pytest.approx((1000 + 4800) / 0.02)

    def test_of_experts_those_count_that_are_expected_to_be_read(self):
        llm = FakeLLM()
        llm.info.expert_bytes, llm.info.expert_share = 800, 0.25
        for batch, weights in ((1, 200 + 200), (2, 200 + 350)):
            result = summarize_runs(llm, [Run(0.5, 0.01, 0.001)], batch_size=batch, input_len=10, output_len=2)
            assert result.weight_bytes == weights

    def test_decode_is_timed_on_prompts_that_are_cached_by_then(self):
        llm = FakeLLM()
        measure_latency(llm, batch_size=2, input_len=3, output_len=5, repeats=2)
        assert [params.max_tokens for _, params in llm.calls] == [1, 1, 6] * 3
        for first in range(0, 9, 3):
            assert llm.calls[first][0] == llm.calls[first + 1][0] == llm.calls[first + 2][0]
        assert llm.calls[0][0] != llm.calls[3][0]
        assert all(params.ignore_eos for _, params in llm.calls)

    def test_a_short_answer_voids_the_measurement(self):
        llm = FakeLLM()
        llm.short = 1
        with pytest.raises(RequestFailedError, match="1 of 2 tokens"):
            measure_latency(llm, batch_size=2, input_len=3, output_len=5, repeats=1)

    def test_throughput_counts_tokens(self):
        llm = FakeLLM()
        result = measure_throughput(
            llm, num_prompts=20, input_range=(2, 4), output_range=(5, 9), seed=1, progress=False
        )  # fmt: skip
        prompts, params = llm.calls[0]
        assert {len(prompt) for prompt in prompts} == {2, 3, 4}
        assert result.input_tokens == sum(map(len, prompts))
        assert result.output_tokens == sum(one.max_tokens for one in params)


class TestCommands:
    def test_latency_writes_what_it_prints(self, monkeypatch, tmp_path):
        llm = FakeLLM()
        monkeypatch.setattr(bench, "_load", lambda config: llm)
        monkeypatch.setattr("aphrodite.cli.machine.read_bandwidth", lambda threads: 5e10)
        path = tmp_path / "out.json"
        arguments = ["--batch-size", "1", "--batch-size", "2", "--repeats", "1", "--json", str(path)]
        result = CliRunner().invoke(app, ["bench", "latency", *arguments])
        assert result.exit_code == 0, result.output
        assert "50.0 GB/s" in result.output
        assert [row["batch_size"] for row in json.loads(path.read_text())["results"]] == [1, 2]
        assert llm.closed

    def test_throughput_refuses_an_empty_range(self):
        result = CliRunner().invoke(app, ["bench", "throughput", "--min-input-len", "9", "--max-input-len", "8"])
        assert "more than" in str(result.exception)

    async def test_serve_reports_failures_with_an_error(self, tmp_path):
        path = tmp_path / "out.json"

        def half(body: dict[str, Any]) -> Sequence[bytes]:
            return tokens(body) if sum(body["prompt"]) % 2 else sse({"error": {"message": "even"}})

        async with serving(half) as (fake, client):
            arguments = ["bench", "serve", "--url", client.url, "--num-prompts", "8", "--json", str(path)]
            result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        summary = json.loads(path.read_text())
        assert summary["model_id"] == "fake"
        assert summary["completed"] + summary["failed"] == 8 == len(fake.bodies)
        assert summary["failed"] == sum(sum(body["prompt"]) % 2 == 0 for body in fake.bodies)
        assert (result.exit_code != 0) is (summary["failed"] > 0)
