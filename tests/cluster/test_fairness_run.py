"""One tenant floods, three send little, in virtual time: what fair order gives the three, and what order of arrival does to them.

The benchmark of the same name does it with real processes and a real clock (benchmarks/fairness.py).
"""

from __future__ import annotations

from collections import Counter, deque

import pytest
from virtual_cluster import SEATS, cluster, percentile, poisson

from quire.cluster.fairness import INPUT_PRICE, OUTPUT_PRICE
from quire.cluster.simulator.jobs import Job
from quire.cluster.tenants import TenantLimits

RUN_S = 60.0
SMALL = ("a", "b", "c")


def ttft_p99_s(order: str, flood: bool) -> float:
    """Of the small tenants. They send documents, the flood is chats, far more than the replica can do."""
    jobs = [job for tenant in SMALL for job in poisson(tenant, 1.0, RUN_S, 400, 16)]
    if flood:
        jobs += poisson("flood", 50.0, RUN_S, 32, 32)
    cluster(order=order).play(jobs, 3 * RUN_S)
    ttfts = [job.ttft_s for job in jobs if job.tenant in SMALL]
    assert len(ttfts) > 150
    return percentile([ttft for ttft in ttfts if ttft is not None], 0.99)


def test_a_flood_hardly_delays_the_others() -> None:
    alone_s, fair_s = ttft_p99_s("fair", flood=False), ttft_p99_s("fair", flood=True)
    assert fair_s <= 2 * alone_s, f"{fair_s:.3f} s against {alone_s:.3f} s"


def test_by_arrival_everybody_waits_behind_the_flood() -> None:
    alone_s, fcfs_s = ttft_p99_s("fcfs", flood=False), ttft_p99_s("fcfs", flood=True)
    assert fcfs_s > 20 * alone_s, f"{fcfs_s:.3f} s against {alone_s:.3f} s"


LONG, SHORT = (300, 20), (50, 60)  # tokens in and out
# 2 * max(INPUT_PRICE * longest prompt, OUTPUT_PRICE * tokens that the replica holds at once): sequences that run, and two ahead
BOUND = 2 * max(INPUT_PRICE * LONG[0], OUTPUT_PRICE * (SEATS + 2) * sum(LONG))


def service_gap(order: str, weight: float, replicas: int = 1) -> tuple[float, float]:
    """(largest difference of service over any time in which both tenants wait, service of both). `weight` is the second one's."""
    simulation = cluster((TenantLimits("y", weight=weight),), order, replicas)
    jobs = poisson("x", 60.0 * replicas, 40.0, *SHORT) + poisson("y", 20.0 * replicas, 40.0, *LONG)
    unsent = {tenant: deque(job for job in jobs if job.tenant == tenant) for tenant in "xy"}
    service: Counter[str] = Counter()  # without what live requests were given at replicas
    differences: list[float] = []

    def total(tenant: str) -> float:
        return service[tenant] + OUTPUT_PRICE * sum(r.served_tokens(tenant) for r in simulation.replicas.values())

    def watch() -> None:
        for tenant, line in unsent.items():
            while line and line[0].sent_s is not None:
                service[tenant] += INPUT_PRICE * line.popleft().prompt_tokens
        lines = {status.name: status.waiting for status in simulation.scheduler.tenants()}
        if lines.get("x") and lines.get("y"):
            differences.append(total("x") - total("y") / weight)

    def done(job: Job) -> None:
        service[job.tenant] += OUTPUT_PRICE * job.output_tokens

    simulation.watch = watch
    simulation.play(jobs, 40.0, done)
    return max(differences) - min(differences), total("x") + total("y")


@pytest.mark.parametrize(("weight", "replicas"), [(1.0, 1), (2.0, 1), (1.0, 3)])
def test_two_that_always_wait_are_served_alike_within_the_bound_of_the_paper(weight: float, replicas: int) -> None:
    gap, service = service_gap("fair", weight, replicas)
    assert gap <= BOUND * replicas
    assert service > 3 * BOUND * replicas, "the run is long enough for the bound to mean something"


def test_by_arrival_whoever_sends_more_gets_more_without_bound() -> None:
    gap, _ = service_gap("fcfs", 1.0)
    assert gap > BOUND
