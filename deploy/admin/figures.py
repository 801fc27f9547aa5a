"""What the controller counts, as Prometheus text: `GET /metrics` of the admin API. Names stand in docs/metrics.md.

Labels come from fixed sets: replica ids and states, phases of a start, reasons of refusal and of moves, and the tenants that the key file
names, so there are as many series as there are of these, whatever is asked. Counters begin at 0, for a rate misses what a series begins
with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...cluster.admin import ClusterStatus, TenantRow
from ...cluster.autoscaling_guard import Why
from ...cluster.controller import SHOWN_STATES
from ...cluster.rebalancing import Reason
from ...cluster.tally import REFUSALS
from ...cluster.tenants import KEPT_TENANTS
from ...worker.protocol import Outcome

OUTCOMES = (Outcome.MOVED, Outcome.REFUSED, Outcome.ABORTED, Outcome.LOST)  # of those that the controller begins


def exposition(status: ClusterStatus) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry)


class _StatusCollector(Collector):
    def __init__(self, status: ClusterStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status, figures = self._status, self._status.figures
        states = Counter(replica.state for replica in status.replicas)
        replicas = GaugeMetricFamily("quire_replicas", "Replicas by state.", labels=["state"])
        for state in SHOWN_STATES:
            replicas.add_metric([state], states[state])
        yield replicas
        startup = GaugeMetricFamily("quire_startup_seconds", "What a replica's start took, by phase.", labels=["replica", "phase"])
        for replica in status.replicas:
            for phase, seconds in replica.startup_s:
                startup.add_metric([replica.id, phase], seconds)
        yield startup
        yield GaugeMetricFamily("quire_ingresses", "HTTP server processes.", value=len(status.ingresses))
        yield GaugeMetricFamily("quire_queue_requests", "Requests that wait for a replica.", value=figures.queue_requests)
        yield GaugeMetricFamily("quire_queue_tokens", "Prompt tokens that wait for a replica.", value=figures.queue_tokens)
        refused = CounterMetricFamily("quire_refused", "Requests refused, by tenant and reason.", labels=["tenant", "reason"])
        for tenant in sorted({row.name for row in status.tenants[:KEPT_TENANTS]}.union(tenant for tenant, _ in figures.refused)):
            for reason in REFUSALS:
                refused.add_metric([tenant, reason], figures.refused.get((tenant, reason), 0))
        yield refused
        yield CounterMetricFamily("quire_expired", "Requests whose deadline passed in the queue.", value=figures.expired)
        yield CounterMetricFamily("quire_replica_deaths", "Replicas that died.", value=figures.deaths)
        yield CounterMetricFamily("quire_replica_restarts", "Replicas that were started again.", value=figures.restarts)
        scale = status.scale
        yield GaugeMetricFamily("quire_autoscaler_target_replicas", "Replicas that there are to be.", value=scale.target)
        yield GaugeMetricFamily("quire_autoscaler_ready_replicas", "Of these, replicas that are ready.", value=scale.ready)
        yield GaugeMetricFamily("quire_autoscaler_leaving_replicas", "Replicas that are emptied to go.", value=scale.leaving)
        yield GaugeMetricFamily("quire_autoscaler_wanted_replicas", "Replicas that the policy asked for last.", value=scale.wanted)
        yield GaugeMetricFamily("quire_autoscaler_gpus", "Ranks of all replicas that there are to be.", value=scale.gpus)
        decisions = CounterMetricFamily("quire_autoscaler_decisions", "Decisions on their number, by why.", labels=["why"])
        for why in Why:
            decisions.add_metric([why.value], scale.decisions.get(why.value, 0))
        yield decisions
        migrations = CounterMetricFamily("quire_migrations", "Migrations that the controller began.", labels=["reason", "outcome"])
        for reason, outcome in product(Reason, OUTCOMES):
            migrations.add_metric([reason.value, outcome.value], figures.migrations.get((reason.value, outcome.value), 0))
        yield migrations
        yield GaugeMetricFamily("quire_migrations_under_way", "Migrations that have not ended.", value=figures.migrations_under_way)
        yield CounterMetricFamily("quire_migrated_pages", "Pages that they sent.", value=figures.migrated_pages)
        yield CounterMetricFamily("quire_migrated_bytes", "Bytes of these pages.", value=figures.migrated_bytes)
        yield CounterMetricFamily("quire_migration_downtime_seconds", "Time that requests stood still to move.", value=figures.downtime_s)
        served = CounterMetricFamily("quire_tenant_output_tokens", "Tokens generated, by tenant.", labels=["tenant"])
        for tenant, tokens in sorted(figures.served_tokens.items()):
            served.add_metric([tenant], tokens)
        yield served
        yield from _tenants(status.tenants[:KEPT_TENANTS])


def _tenants(rows: tuple[TenantRow, ...]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("quire_tenant_requests_waiting", "A tenant's requests that wait for a replica.", labels=["tenant"])
    running = GaugeMetricFamily("quire_tenant_requests_running", "A tenant's requests that have a replica.", labels=["tenant"])
    pages = GaugeMetricFamily("quire_tenant_pages", "Pages of these, counted from their tokens.", labels=["tenant"])
    weight = GaugeMetricFamily("quire_tenant_weight", "A tenant's share while others want the cluster, too.", labels=["tenant"])
    limit = GaugeMetricFamily("quire_tenant_limit", "What a tenant may use at most.", labels=["tenant", "limit"])
    for row in rows:
        waiting.add_metric([row.name], row.waiting)
        running.add_metric([row.name], row.running)
        pages.add_metric([row.name], row.pages)
        weight.add_metric([row.name], row.weight)
        for name, most in row.bounds:
            limit.add_metric([row.name, name], most)
    yield from (waiting, running, pages, weight, limit)
