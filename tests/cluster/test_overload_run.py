"""Three times as many requests as the replicas can serve, in virtual time: what is served in time, and what the rest hear when.

The benchmark of the same name does it with real processes and a real clock (benchmarks/overload.py).
"""

from __future__ import annotations

import pytest
from virtual_cluster import Load, VirtualCluster, poisson

from quire.cluster.queue_gate import QueueLimits
from quire.worker.protocol import DeadlineExceeded, Overloaded

RUN_S = 60.0
PROMPT, OUTPUT = 128, 32
SLO_TTFT_S = 2.0
CAPACITY_PER_S = 26.7  # of one replica, as `test_the_capacity_is_what_it_is_taken_for` finds


def play(times: float, limits: QueueLimits, deadline_s: float | None, replicas: int = 1) -> tuple[list[Load], VirtualCluster]:
    """`times` the capacity for a minute, from three tenants."""
    per_s = times * CAPACITY_PER_S * replicas / 3
    loads = [load for tenant in "abc" for load in poisson(tenant, per_s, RUN_S, PROMPT, OUTPUT, deadline_s)]
    cluster = VirtualCluster(limits=limits, replicas=replicas)
    cluster.run(loads, 2 * RUN_S)
    return loads, cluster


def goodput_per_s(loads: list[Load]) -> float:
    return sum(load.ttft_s is not None and load.ttft_s <= SLO_TTFT_S for load in loads) / RUN_S


def test_the_capacity_is_what_it_is_taken_for() -> None:
    loads = poisson("a", 100.0, RUN_S, PROMPT, OUTPUT)
    VirtualCluster().run(loads, RUN_S)
    assert sum(load.last_s is not None for load in loads) / RUN_S == pytest.approx(CAPACITY_PER_S, rel=0.05)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("how", ["longest wait", "deadline"])
def test_three_times_the_load_is_served_as_well_as_once_and_the_rest_hears_at_once(how: str, replicas: int) -> None:
    limits = QueueLimits(10**6, 10**9, 1.0 if how == "longest wait" else 60.0)
    deadline_s = 1.0 if how == "deadline" else None
    once, _ = play(1.0, limits, deadline_s, replicas)
    thrice, cluster = play(3.0, limits, deadline_s, replicas)
    assert goodput_per_s(thrice) >= 0.9 * goodput_per_s(once), f"{goodput_per_s(thrice):.1f} against {goodput_per_s(once):.1f} a second"
    refused = [load for load in thrice if isinstance(load.error, Overloaded)]
    assert len(refused) > 0.9 * (1 - 1.2 / 3) * len(thrice)
    assert all(load.error_s == load.at_s for load in refused)
    assert all(isinstance(load.error, Overloaded) and 1.0 <= load.error.retry_after_s <= 60.0 for load in refused)
    assert all(load.first_s is not None or load.error is not None for load in thrice), "everybody has an answer"
    assert cluster.waiting_most < 3 * CAPACITY_PER_S * replicas, "the queue is as long as the wait, not as the load"


def test_nothing_waits_beyond_its_deadline() -> None:
    loads, cluster = play(3.0, QueueLimits(10**6, 10**9, 60.0), 0.5)
    expired = [load for load in loads if isinstance(load.error, DeadlineExceeded)]
    assert all(load.error_s == pytest.approx(load.at_s + 0.5) for load in expired)
    assert max(load.sent_s - load.at_s for load in loads if load.sent_s is not None) <= 0.5
    assert cluster.scheduler.waiting() == []


def test_without_a_bound_on_the_wait_nobody_is_served_in_time() -> None:
    loads, _ = play(3.0, QueueLimits(10**6, 10**9, 10**6), None)
    assert goodput_per_s(loads) < 0.3 * CAPACITY_PER_S


def test_books_and_memory_are_as_before_when_the_load_has_gone() -> None:
    loads, cluster = play(3.0, QueueLimits(64, 10**6, 1.0), 1.0)
    assert cluster.waiting_most <= 64
    assert cluster.scheduler.next_s(2 * RUN_S) is None
    assert {(s.waiting, s.running, s.pages) for s in cluster.scheduler.tenants()} == {(0, 0, 0)}
    assert not any(replica.held for replica in cluster.replicas.values())
    assert len(loads) > 3000
