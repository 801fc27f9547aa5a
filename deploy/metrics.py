"""Prometheus metrics of one ingress: what it measures itself, and what replicas report in their heartbeats.

Every name here stands in docs/metrics.md. Labels come from fixed sets (ingress and replica ids, page states, actions, routes, status
codes, tenants by their keys), never from requests. What an ingress measures carries its id, since ingresses share a port and a scrape
reaches any of them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..cluster.admin import Percentiles
from ..cluster.client import RecoveryStats
from ..cluster.tenants import CountedTenants
from ..worker.protocol import EngineStats

WINDOW_S = 30.0
MOST_OBSERVED = 10_000

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_ADMISSION_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_E2E_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_COUNTERS = {
    "quire_steps": ("Steps that the engine has run.", "steps"),
    "quire_step_seconds": ("Time spent in steps.", "step_seconds"),
    "quire_prompt_tokens": ("Prompt tokens of admitted requests.", "prompt_tokens"),
    "quire_output_tokens": ("Tokens generated.", "output_tokens"),
    "quire_prefix_query_tokens": ("Prompt tokens looked up in the prefix cache.", "prefix_query_tokens"),
    "quire_prefix_hit_tokens": ("Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    "quire_prefix_host_hit_tokens": ("Of these, tokens that were copied in from host memory.", "host_hit_tokens"),
    "quire_recomputed_tokens": ("Tokens computed again after a preemption.", "recomputed_tokens"),
    "quire_stall_seconds": ("Time that sequences which had begun stood still, each for itself.", "stall_seconds"),
}
_GAUGES = {
    "quire_requests_running": ("Sequences in the running batch.", "running"),
    "quire_requests_waiting": ("Sequences that wait for a place.", "waiting"),
}
_RECOVERY = {
    "quire_streams_lost": ("Times that a request lost the replica that ran it.", "lost"),
    "quire_streams_resumed": ("Times that a lost request went on elsewhere.", "resumed"),
    "quire_replayed_tokens": ("Tokens that replicas were given again for that.", "replayed_tokens"),
    "quire_pause_seconds": ("Time from each loss to the next token.", "pause_s"),
}
_KEYED_COUNTERS = {
    "quire_preemptions": ("Times that pages had run out, by what was done.", "action", "preemptions"),
    "quire_preemption_predicted_seconds": ("What that was to cost.", "action", "predicted_seconds"),
    "quire_preemption_seconds": ("What it came to.", "action", "actual_seconds"),
    "quire_moved_bytes": ("Bytes of pages that were copied, by kind of move.", "kind", "moved_bytes"),
}
_PAGE_STATES = ("free", "cached", "active", "reserved")
_HOST_STATES = ("free", "cached", "active")


class Lately:
    """What was observed in the last `WINDOW_S`, of the latest `MOST_OBSERVED`."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=MOST_OBSERVED)

    def observe(self, seconds: float) -> None:
        self._seen.append((time.monotonic(), seconds))

    def percentiles(self) -> Percentiles | None:
        """Of it, in seconds; None when there was nothing."""
        since_s = time.monotonic() - WINDOW_S
        while self._seen and self._seen[0][0] < since_s:
            self._seen.popleft()
        ordered = sorted(seconds for _, seconds in self._seen)
        p50, p90, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] if ordered else 0.0 for share in (50, 90, 99))
        return Percentiles(p50, p90, p99) if ordered else None


class Metrics:
    """One registry for one app.

    Attributes:
        ttft, tpot: what they were lately, for the autoscaler.
    """

    def __init__(
        self, stats: Callable[[], Mapping[str, EngineStats]], recovery: Callable[[], RecoveryStats] = RecoveryStats, ingress: str = ""
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside every histogram, of no use to anybody
        self.ttft, self.tpot = Lately(), Lately()
        self._registry = CollectorRegistry()
        self._ingress = ingress
        self._tenants = CountedTenants()
        self._http = self._counter("quire_http_requests", "HTTP requests answered.", "route", "status")
        self._ttft = self._histogram("quire_ttft_seconds", "Request received to first output.", _TTFT_S)
        self._tpot = self._histogram("quire_tpot_seconds", "Time per output token after the first.", _TPOT_S)
        self._admission = self._histogram("quire_admission_seconds", "Request received to a place for it on a replica.", _ADMISSION_S)
        self._e2e = self._histogram("quire_e2e_seconds", "Request received to its end.", _E2E_S)
        self._requests = self._counter("quire_tenant_requests", "A tenant's generation requests that have ended.", "tenant", "status")
        self._prompt = self._counter("quire_tenant_prompt_tokens", "Prompt tokens of those that a replica took.", "tenant")
        self._cached = self._counter("quire_tenant_cached_tokens", "Of these, tokens found in the prefix cache.", "tenant")
        self._tenant_ttft = Summary(
            "quire_tenant_ttft_seconds", "Request received to first output.", ["ingress", "tenant"], registry=self._registry
        )
        self._registry.register(_EngineCollector(stats))
        self._registry.register(_RecoveryCollector(recovery, ingress))

    def count_request(self, route: str, status: int) -> None:
        """One HTTP request was answered."""
        self._http.labels(self._ingress, route, status).inc()

    def count_generation(self, tenant: str, status: int) -> None:
        """One generation request has ended, whatever came of it."""
        self._requests.labels(self._ingress, self._tenants.name(tenant), status).inc()

    def count_prompt(self, tenant: str, prompt_tokens: int, cached_tokens: int, ttft_s: float | None) -> None:
        """The same of one that a replica took."""
        labels = self._ingress, self._tenants.name(tenant)
        self._prompt.labels(*labels).inc(prompt_tokens)
        self._cached.labels(*labels).inc(cached_tokens)
        if ttft_s is not None:
            self._tenant_ttft.labels(*labels).observe(ttft_s)

    def generation(self, started_s: float) -> GenerationClock:
        """A clock for a request that was received at `started_s` (time.perf_counter)."""
        return GenerationClock(Latencies(self._admission, self._ttft, self._tpot, self._e2e, self.ttft, self.tpot), started_s)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["ingress", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, ["ingress"], buckets=buckets, registry=self._registry).labels(self._ingress)


class Latencies(NamedTuple):
    """Where a clock writes."""

    admission: Histogram
    ttft: Histogram
    tpot: Histogram
    e2e: Histogram
    ttft_lately: Lately
    tpot_lately: Lately


class GenerationClock:
    """When the outputs of one request came. Only requests that end by themselves count for latency."""

    def __init__(self, latencies: Latencies, started_s: float) -> None:
        self._admission, self._ttft, self._tpot, self._e2e, self._ttft_lately, self._tpot_lately = latencies
        self._started_s = started_s
        self._first_s: dict[int, float] = {}
        self.ttft_s: float | None = None

    def tokens(self, choice: int, waited_s: float | None = None) -> None:
        """Output of a choice has come, of a request that waited so long for its place."""
        if choice not in self._first_s:
            now_s = time.perf_counter()
            if not self._first_s:
                self.ttft_s = now_s - self._started_s
                self._ttft.observe(self.ttft_s)
                self._ttft_lately.observe(self.ttft_s)
                if waited_s is not None:
                    self._admission.observe(waited_s)
            self._first_s[choice] = now_s

    def ended(self, choice: int, tokens: int) -> None:
        """A choice has ended with so many tokens."""
        if tokens > 1 and choice in self._first_s:
            tpot_s = (time.perf_counter() - self._first_s[choice]) / (tokens - 1)
            self._tpot.observe(tpot_s)
            self._tpot_lately.observe(tpot_s)

    def all_ended(self) -> None:
        """The request has ended."""
        self._e2e.observe(time.perf_counter() - self._started_s)


class _EngineCollector(Collector):
    """What replicas said last. Counters are theirs: they start again when a replica does."""

    def __init__(self, stats: Callable[[], Mapping[str, EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        replicas = sorted(self._stats().items())
        pages = GaugeMetricFamily("quire_pages", "Pages by what they hold.", labels=["replica", "state", "tier"])
        for replica, stats in replicas:
            for state in _PAGE_STATES:
                pages.add_metric([replica, state, "device"], getattr(stats, f"pages_{state}"))
            for state in _HOST_STATES:
                pages.add_metric([replica, state, "host"], getattr(stats, f"host_pages_{state}"))
            pages.add_metric([replica, "active", "disk"], stats.disk_pages)
        yield pages
        for name, (text, field) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["replica"])
            for replica, stats in replicas:
                gauge.add_metric([replica], getattr(stats, field))
            yield gauge
        for name, (text, field) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica"])
            for replica, stats in replicas:
                counter.add_metric([replica], getattr(stats, field))
            yield counter
        for name, (text, label, field) in _KEYED_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica", label])
            for replica, stats in replicas:
                for key, count in sorted(getattr(stats, field).items()):
                    counter.add_metric([replica, key], count)
            yield counter


class _RecoveryCollector(Collector):
    """What deaths have cost the streams of this ingress."""

    def __init__(self, recovery: Callable[[], RecoveryStats], ingress: str) -> None:
        self._recovery = recovery
        self._ingress = ingress

    def collect(self) -> Iterator[Metric]:
        stats = self._recovery()
        for name, (text, field) in _RECOVERY.items():
            counter = CounterMetricFamily(name, text, labels=["ingress"])
            counter.add_metric([self._ingress], getattr(stats, field))
            yield counter
