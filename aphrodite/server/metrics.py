"""Prometheus metrics. Counting costs a bisection; the text is only made when somebody scrapes.

Names and meanings follow vLLM's, with our prefix. Labels come from fixed sets (finish reasons, route
templates, methods), so that no client can make the page grow.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from aphrodite.outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from aphrodite.server.model_pool import ModelPool

_TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BOUNDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BOUNDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960, 1920)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_FINISH_REASONS = ("stop", "length", "repetition", "abort", "error")
# Of an engine's own numbers: name, what it is, and where `EngineStats` has it.
_GAUGES = (
    ("num_requests_running", "Answers that are being generated.", "num_running"),
    ("num_requests_waiting", "Answers that wait for their first step.", "num_waiting"),
    ("kv_cache_usage_perc", "Share of the KV cache's blocks in use (1 is all).", "kv_usage"),
    ("step_host_milliseconds", "Median of a step's time outside the model.", "host_ms"),
    ("step_forward_milliseconds", "Median of a step's time inside the model.", "forward_ms"),
)
_TOTALS = (
    ("num_preemptions", "Answers that gave their KV blocks to others.", "num_preemptions"),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    ("num_steps", "Steps of the engine.", "num_steps"),
)


class Histogram:
    """Counts of observations in seconds; `bounds` are the buckets' upper ends."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' buckets: (upper end, observations up to it)."""
        rows = []
        running = 0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound == math.inf else str(bound), float(running)))
        return rows


class ModelMetrics:
    """What the front end counts of one model's answers; the engine's numbers are read when somebody scrapes."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(_FINISH_REASONS, 0))
        self.time_to_first_token = Histogram(_TTFT_BOUNDS)
        self.inter_token_latency = Histogram(_ITL_BOUNDS)
        self.e2e_latency = Histogram(_E2E_BOUNDS)
        self.queue_time = Histogram(_E2E_BOUNDS)


class ServerMetrics:
    """What is counted whatever the model."""

    def __init__(self) -> None:
        self.http: Counter[tuple[str, str, str]] = Counter()

    def count_http(self, route: str, method: str, status: int) -> None:
        """`route` is a template such as `/v1/models/{model_id:path}`, never a client's path."""
        self.http[route, method if method in _METHODS else "other", str(status)] += 1


class RequestTimer:
    """Observes one request's stream. `num_answers` is its `n`."""

    __slots__ = ("_began", "_last", "_metrics", "_open", "_refused", "_tokens")

    def __init__(self, metrics: ModelMetrics, num_answers: int) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._last: list[float] | None = None
        self._tokens = [0] * num_answers
        self._open = num_answers
        self._refused = False

    def observe(self, output: RequestOutput) -> None:
        now = time.monotonic()
        metrics = self._metrics
        if self._last is None:
            metrics.time_to_first_token.observe(now - self._began)
            metrics.prompt_tokens += len(output.prompt_token_ids)
            if output.queue_seconds is not None:
                metrics.queue_time.observe(output.queue_seconds)
            self._last = [0.0] * len(self._tokens)
        for answer in output.outputs:
            self._observe_answer(answer, self._last, now)

    def _observe_answer(self, answer: CompletionOutput, last: list[float], now: float) -> None:
        index = answer.index
        metrics = self._metrics
        if last[index]:
            metrics.inter_token_latency.observe(now - last[index])
        last[index] = now
        metrics.generation_tokens += answer.num_tokens - self._tokens[index]
        self._tokens[index] = answer.num_tokens
        if answer.finish_reason is not None:
            metrics.finished[answer.finish_reason] += 1
            self._open -= 1

    def refused(self) -> None:
        """The engine did not take the request, which leaves no trace here."""
        self._refused = True

    def close(self) -> None:
        """The request is over; answers that have not finished were aborted."""
        if self._refused:
            return
        self._metrics.finished["abort"] += self._open
        self._open = 0
        self._metrics.e2e_latency.observe(time.monotonic() - self._began)


class MetricsPage:
    """`GET /metrics`."""

    def __init__(self, models: ModelPool, metrics: ServerMetrics) -> None:
        self._models = models
        self._metrics = metrics

    async def show(self, request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
        from prometheus_client.registry import CollectorRegistry

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def collect(self) -> Iterator[Metric]:
        """The families of one scrape (prometheus_client's collector interface)."""
        yield from self._engine_families()
        yield from self._load_families()
        yield from self._answer_families()
        yield from self._latency_families()
        yield self._http_family()

    def _engine_families(self) -> Iterator[Metric]:
        """What the engines that run say of themselves."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        running = [(model.name, model.loaded.engine.stats()) for model in self._models.models if model.loaded]
        for kind, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _TOTALS)):
            for name, doc, field in rows:
                family = kind(f"aphrodite:{name}", doc, labels=["model_name"])
                for model, stats in running:
                    family.add_metric([model], getattr(stats, field))
                yield family

    def _load_families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        loaded = GaugeMetricFamily("aphrodite:model_loaded", "1 if the model is loaded.", labels=["model_name"])
        loads = CounterMetricFamily("aphrodite:model_loads", "Times the model was loaded.", labels=["model_name"])
        for model in self._models.models:
            loaded.add_metric([model.name], float(model.loaded is not None))
            loads.add_metric([model.name], model.num_loads)
        yield loaded
        yield loads

    def _answer_families(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        for name, doc in (
            ("prompt_tokens", "Prompt tokens of requests that got a first token."),
            ("generation_tokens", "Tokens generated."),
        ):
            family = CounterMetricFamily(f"aphrodite:{name}", doc, labels=["model_name"])
            for model in self._models.models:
                family.add_metric([model.name], getattr(model.metrics, name))
            yield family
        finished = CounterMetricFamily(
            "aphrodite:request_success", "Answers by why they ended.", labels=["model_name", "finished_reason"]
        )
        for model in self._models.models:
            for reason, count in model.metrics.finished.items():
                finished.add_metric([model.name, reason], count)
        yield finished

    def _latency_families(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        for name, doc, field in (
            ("time_to_first_token_seconds", "From the request to its first token.", "time_to_first_token"),
            ("inter_token_latency_seconds", "Between two pieces of one answer.", "inter_token_latency"),
            ("request_queue_time_seconds", "From the request to its first step.", "queue_time"),
            ("e2e_request_latency_seconds", "From the request to its end.", "e2e_latency"),
        ):
            family = HistogramMetricFamily(f"aphrodite:{name}", doc, labels=["model_name"])
            for model in self._models.models:
                histogram: Histogram = getattr(model.metrics, field)
                family.add_metric([model.name], histogram.cumulative(), histogram.total)
            yield family

    def _http_family(self) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        http = CounterMetricFamily("aphrodite:http_requests", "HTTP answers.", labels=["route", "method", "status"])
        for labels, count in self._metrics.http.items():
            http.add_metric(list(labels), count)
        return http
