"""What `/metrics` tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmrun.engine.types import EngineCounters
from llmrun.server.types import Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

Engines = Callable[[], Sequence[tuple[str, EngineCounters]]]
"""The loaded models' names and counters."""


class Metrics:
    """Counters of one server. Labels are paths of the API, status codes and models' names: never
    what clients wrote."""

    def __init__(self, engines: Engines, n_active: Callable[[], int]) -> None:
        """`n_active`: requests being worked on now."""
        # Twice the lines, for what nobody asks.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmrun_requests", "Requests answered.", ("path", "status"), registry=self._registry
        )
        in_flight = Gauge(
            "llmrun_requests_in_flight", "Requests being answered.", registry=self._registry
        )
        in_flight.set_function(n_active)
        self._first_token = Histogram(
            "llmrun_time_to_first_token_seconds",
            "From the arrival of a request at the engine to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "llmrun_reply_seconds",
            "From the arrival of a request at the engine to its last token.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(engines))

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def count_reply(self, model: str, finish: Finished) -> None:
        if finish.reason == "cancelled":
            return
        self._duration.labels(model).observe(finish.total_s)
        self._first_token.labels(model).observe(max(finish.total_s - finish.decode_s, 0.0))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Asks the engines when somebody asks for the metrics."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        engines = self._engines()
        yield from self._family(
            engines,
            CounterMetricFamily,
            ("prompt_tokens", "Tokens of prompts.", lambda c: c.n_prompt),
            ("cached_tokens", "Tokens of prompts that were in the cache.", lambda c: c.n_cached),
            ("generated_tokens", "Tokens generated.", lambda c: c.n_completion),
            ("drafted_tokens", "Tokens guessed.", lambda c: c.n_drafted),
            ("accepted_tokens", "Tokens guessed rightly.", lambda c: c.n_accepted),
            ("steps", "Batches computed.", lambda c: c.n_steps),
            ("decode_seconds", "Time spent computing.", lambda c: c.decode_s),
        )
        yield from self._family(
            engines,
            GaugeMetricFamily,
            ("running", "Replies being generated.", lambda c: c.n_running),
            ("waiting", "Replies that wait for a place.", lambda c: c.n_waiting),
            ("kv_cells_used", "Tokens in the KV cache.", lambda c: c.n_cells),
            ("kv_cells", "Tokens that the KV cache can hold.", lambda c: c.n_ctx),
        )

    def _family(
        self,
        engines: Sequence[tuple[str, EngineCounters]],
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        *rows: tuple[str, str, Callable[[EngineCounters], float]],
    ) -> Iterator[Metric]:
        for name, words, value in rows:
            family = kind(f"llmrun_{name}", words, labels=["model"])
            for model, counters in engines:
                family.add_metric([model], value(counters))
            yield family
