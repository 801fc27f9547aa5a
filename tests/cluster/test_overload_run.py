"""Three times as many requests as the replicas can serve, in virtual time: what is served in time, and what the rest hear when.

The benchmark of the same name does it with real processes and a real clock (benchmarks/overload.py).
"""

from __future__ import annotations

import pytest
from virtual_cluster import cluster, poisson

from quire.cluster.queue_gate import QueueLimits
from quire.cluster.simulator.jobs import Job
from quire.cluster.simulator.simulation import Simulation

RUN_S = 60.0
PROMPT, OUTPUT = 128, 32
SLO_TTFT_S = 2.0
CAPACITY_PER_S = 26.7  # of one replica, as `test_the_capacity_is_what_it_is_taken_for` finds


def play(times: float, limits: QueueLimits, deadline_s: float | None, replicas: int = 1) -> tuple[list[Job], Simulation, int]:
    """`times` the capacity for a minute, from three tenants; and how many waited at most."""
    per_s = times * CAPACITY_PER_S * replicas / 3
    jobs = [job for tenant in "abc" for job in poisson(tenant, per_s, RUN_S, PROMPT, OUTPUT, deadline_s)]
    simulation, most = cluster(limits=limits, replicas=replicas), 0

    def watch() -> None:
        nonlocal most
        most = max(most, len(simulation.scheduler.waiting()))

    simulation.watch = watch
    return simulation.play(jobs, 2 * RUN_S), simulation, most


def goodput_per_s(jobs: list[Job]) -> float:
    return sum(job.ttft_s is not None and job.ttft_s <= SLO_TTFT_S for job in jobs) / RUN_S


def test_the_capacity_is_what_it_is_taken_for() -> None:
    jobs = cluster().play(poisson("a", 100.0, RUN_S, PROMPT, OUTPUT), RUN_S)
    assert sum(job.last_s is not None for job in jobs) / RUN_S == pytest.approx(CAPACITY_PER_S, rel=0.05)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("how", ["longest wait", "deadline"])
def test_three_times_the_load_is_served_as_well_as_once_and_the_rest_hears_at_once(how: str, replicas: int) -> None:
    limits = QueueLimits(10**6, 10**9, 1.0 if how == "longest wait" else 60.0)
    deadline_s = 1.0 if how == "deadline" else None
    once, _, _ = play(1.0, limits, deadline_s, replicas)
    thrice, _, waited = play(3.0, limits, deadline_s, replicas)
    assert goodput_per_s(thrice) >= 0.9 * goodput_per_s(once), f"{goodput_per_s(thrice):.1f} against {goodput_per_s(once):.1f} a second"
    refused = [job for job in thrice if job.error == "Overloaded"]
    assert len(refused) > 0.9 * (1 - 1.2 / 3) * len(thrice)
    assert all(job.error_s == job.arrival_s for job in refused)
    assert all(job.retry_after_s is not None and 1.0 <= job.retry_after_s <= 60.0 for job in refused)
    assert all(job.first_s is not None or job.error is not None for job in thrice), "everybody has an answer"
    assert waited < 3 * CAPACITY_PER_S * replicas, "the queue is as long as the wait, not as the load"


def test_nothing_waits_beyond_its_deadline() -> None:
    jobs, simulation, _ = play(3.0, QueueLimits(10**6, 10**9, 60.0), 0.5)
    expired = [job for job in jobs if job.error == "DeadlineExceeded"]
    assert all(job.error_s == pytest.approx(job.arrival_s + 0.5) for job in expired)
    assert max(job.sent_s - job.arrival_s for job in jobs if job.sent_s is not None) <= 0.5
    assert simulation.scheduler.waiting() == []


def test_without_a_bound_on_the_wait_nobody_is_served_in_time() -> None:
    jobs, _, _ = play(3.0, QueueLimits(10**6, 10**9, 10**6), None)
    assert goodput_per_s(jobs) < 0.3 * CAPACITY_PER_S


def test_books_and_memory_are_as_before_when_the_load_has_gone() -> None:
    jobs, simulation, most = play(3.0, QueueLimits(64, 10**6, 1.0), 1.0)
    assert most <= 64
    assert simulation.scheduler.next_s(2 * RUN_S) is None
    assert {(s.waiting, s.running, s.pages) for s in simulation.scheduler.tenants()} == {(0, 0, 0)}
    assert all(replica.idle() and not replica.planner.pages.active for replica in simulation.replicas.values())
    assert len(jobs) > 3000
