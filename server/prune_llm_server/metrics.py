"""Numbers to watch, for Prometheus: vLLM's names and meanings under our prefix."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prune_llm_server.engine import Answer, Engine, Unavailable
from prune_llm_server.logs import RequestRecord

PREFIX = "prune_llm:"
_MODEL = ("model_name",)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LONG_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = tuple(2.0**power for power in range(18))
_SHARES = tuple(round(0.05 * step, 2) for step in range(1, 20))


class EngineCollector(Collector):
    """What the engine says of itself, asked when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or it would be asked before it has loaded

    def collect(self) -> Iterator[Metric]:
        try:
            model = self._engine.info.model
        except Unavailable:
            return  # without a name there is nothing to put a number to
        status = self._engine.status()
        gauges = {
            "num_requests_running": ("Sequences that are being computed.", status.running),
            "num_requests_waiting": ("Sequences that wait for a row.", status.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache's pages in use; 1: all.",
                status.cache_used,
            ),
        }
        counters = {
            "num_preemptions": ("Sequences that gave up their pages.", status.preemptions),
            "engine_restarts": ("Dead engines that were replaced.", status.restarts),
            "prefix_cache_queries": ("Prompt tokens looked up.", status.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens not computed again.", status.cached_tokens),
        }
        for name, (help_text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, help_text, labels=_MODEL)
            gauge.add_metric([model], value)
            yield gauge
        for name, (help_text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, help_text, labels=_MODEL)
            counter.add_metric([model], value)
            yield counter


class Metrics:
    """All numbers of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(EngineCollector(engine))
        self._failures = self._counter(
            "request_failures", "Requests that ended in an error, by HTTP status.", ("status",)
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.", _MODEL)
        self.generation_tokens = self._counter("generation_tokens", "Tokens drawn.", _MODEL)
        self.success = self._counter(
            "request_success", "Sequences that ended well.", (*_MODEL, "finished_reason")
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Until a sequence's first token.", _SECONDS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _SECONDS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a sequence's tokens behind its first.",
            _SECONDS,
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "Until a sequence's end.", _LONG_SECONDS
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "A sequence's time in the queue.", _LONG_SECONDS
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds",
            "From the first token of a sequence's prompt to its first answer.",
            _LONG_SECONDS,
        )
        self.decode = self._histogram(
            "request_decode_time_seconds",
            "From a sequence's first token to its end.",
            _LONG_SECONDS,
        )
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Length of a prompt.", _TOKENS
        )
        self.generation_length = self._histogram(
            "request_generation_tokens", "Length of a sequence's answer.", _TOKENS
        )
        self.sparsity = self._histogram(
            "activation_sparsity",
            "Share of the linears' inputs that a sequence skipped.",
            _SHARES,
            (*_MODEL, "level"),
        )

    def _counter(self, name: str, help_text: str, labels: Sequence[str]) -> Counter:
        return Counter(PREFIX + name, help_text, labels, registry=self._registry)

    def _histogram(
        self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = _MODEL
    ) -> Histogram:
        return Histogram(PREFIX + name, help_text, labels, registry=self._registry, buckets=buckets)

    def failed(self, status: int) -> None:
        self._failures.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found


class Meter:
    """Watches the sequences of one request, for the metrics and for its line in the log."""

    def __init__(
        self,
        metrics: Metrics,
        record: RequestRecord,
        model: str,
        prompt_tokens: Sequence[int],
        n: int,
    ) -> None:
        """``prompt_tokens``: for each sequence; ``n`` in a row share a prompt."""
        self._metrics, self._record, self._model = metrics, record, model
        self._n = n
        self._prompt_tokens = prompt_tokens
        self._tokens = [0] * len(prompt_tokens)
        self._first = [math.nan] * len(prompt_tokens)
        self._last = [math.nan] * len(prompt_tokens)
        self._seen: set[int] = set()

    def saw(self, index: int, answer: Answer) -> None:
        """One step of a sequence."""
        now = time.perf_counter()
        if index not in self._seen:
            self._seen.add(index)
            if index % self._n == 0:  # as prompt_tokens, where a prompt counts once
                self._record.cached_tokens += answer.cached_tokens
            self._metrics.prompt_tokens.labels(self._model).inc(self._prompt_tokens[index])
        for histogram, seconds in (
            (self._metrics.queue, answer.queue_seconds),
            (self._metrics.prefill, answer.prefill_seconds),
        ):
            if seconds is not None:
                histogram.labels(self._model).observe(seconds)
        if answer.tokens:
            self._drew(index, answer.tokens, now)
        if answer.finish_reason is not None:
            self._finished(index, answer, now)

    def _drew(self, index: int, tokens: int, now: float) -> None:
        metrics, record = self._metrics, self._record
        if self._tokens[index] == 0:
            seconds = now - record.started
            metrics.first_token.labels(self._model).observe(seconds)
            if record.first_token_seconds is None:
                record.first_token_seconds = seconds
            self._first[index] = now
        else:
            gap = (now - self._last[index]) / tokens
            metrics.inter_token.labels(self._model).observe(gap)
        self._last[index] = now
        self._tokens[index] += tokens
        record.completion_tokens += tokens
        metrics.generation_tokens.labels(self._model).inc(tokens)

    def _finished(self, index: int, answer: Answer, now: float) -> None:
        metrics, record, tokens = self._metrics, self._record, self._tokens[index]
        assert answer.finish_reason is not None
        record.finish_reasons.append(answer.finish_reason)
        metrics.success.labels(self._model, answer.finish_reason).inc()
        metrics.end_to_end.labels(self._model).observe(now - record.started)
        metrics.prompt_length.labels(self._model).observe(self._prompt_tokens[index])
        metrics.generation_length.labels(self._model).observe(tokens)
        if tokens:
            metrics.decode.labels(self._model).observe(now - self._first[index])
        if tokens > 1:
            mean = (self._last[index] - self._first[index]) / (tokens - 1)
            metrics.per_token.labels(self._model).observe(mean)
        if answer.active is not None:
            level: Any = record.level
            metrics.sparsity.labels(self._model, level).observe(1 - answer.active)
