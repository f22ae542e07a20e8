"""What /metrics says equals what clients saw, and clients cannot make it grow."""

from __future__ import annotations

import math

import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from running import RunningServer, running_server

from aphrodite.errors import QueueFullError
from aphrodite.server.metrics import Histogram

MODEL = 'model_name="fake/story"'


async def samples(server: RunningServer) -> dict[str, float]:
    text = (await server.http.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name.removeprefix('aphrodite:')}{{{labels}}}"] = sample.value
    return found


async def test_counts_equal_what_clients_saw(server: RunningServer) -> None:
    usages = []
    for fields in ({"n": 2, "max_tokens": 5}, {"max_tokens": 300}, {"max_tokens": 3, "prompt": ["a", "bc"]}):
        usages.append((await server.http.post("/v1/completions", json={"prompt": "abc", **fields})).json()["usage"])
    found = await samples(server)
    assert found[f"prompt_tokens_total{{{MODEL}}}"] == sum(usage["prompt_tokens"] for usage in usages)
    assert found[f"generation_tokens_total{{{MODEL}}}"] == sum(usage["completion_tokens"] for usage in usages)
    assert found[f'request_success_total{{finished_reason="length",{MODEL}}}'] == 4
    assert found[f'request_success_total{{finished_reason="stop",{MODEL}}}'] == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert found[f"{name}_count{{{MODEL}}}"] == 4
        assert found[f'{name}_bucket{{le="+Inf",{MODEL}}}'] == 4
    assert found[f"inter_token_latency_seconds_count{{{MODEL}}}"] > 50
    assert found[f"prefix_cache_hits_total{{{MODEL}}}"] == 40
    assert found[f"num_requests_running{{{MODEL}}}"] == 0
    assert found['http_requests_total{method="POST",route="/v1/completions",status="200"}'] == 3


async def test_requests_that_leave_count_as_aborted_and_refused_ones_not_at_all() -> None:
    async with running_server(FakeEngine(hold_after=2)) as server:
        async with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "n": 2, "stream": True}):
            await server.engine.holding.wait()
        await server.engine.idle.wait()
        server.engine.refuse = QueueFullError("full", retry_after=1.0)
        await server.http.post("/v1/completions", json={"prompt": "a"})
        found = await samples(server)
        assert found[f'request_success_total{{finished_reason="abort",{MODEL}}}'] == 2
        assert found[f"e2e_request_latency_seconds_count{{{MODEL}}}"] == 1


async def test_paths_methods_and_models_of_clients_are_no_labels(server: RunningServer) -> None:
    await server.http.get("/metrics")
    before = len(await samples(server))
    for number in range(50):
        await server.http.request(("PROPFIND", "MKCOL")[number % 2], f"/x/{number}")
        await server.http.get(f"/v1/models/m{number}")
        await server.http.post("/v1/completions", json={"prompt": "a", "model": f"m{number}"})
    after = await samples(server)
    assert len(after) <= before + 6
    assert after['http_requests_total{method="other",route="unmatched",status="404"}'] == 50


@pytest.mark.parametrize("value", [0.0, 0.1, 0.10001, 5.0, 1e9])
def test_an_observation_lands_in_the_first_bucket_that_holds_it(value: float) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    histogram.observe(value)
    for bound, count in histogram.cumulative():
        limit = math.inf if bound == "+Inf" else float(bound)
        assert count == (1 if value <= limit else 0)
