"""What the tests of fairness and overload play on the simulator: a small replica, and tenants who send at random times."""

from __future__ import annotations

import random

from quire.cluster.simulator.jobs import Job
from quire.cluster.simulator.simulation import NO_LIMITS, QueueLimits, Simulation, SimulationOptions
from quire.cluster.simulator.speed_profile import ReplicaShape, SpeedProfile, StepCost
from quire.cluster.tenants import TenantLimits

SEATS = 32
SMALL = SpeedProfile("small", True, StepCost(0.005, 0.0002), ReplicaShape(4096, 16, 512, SEATS, 4096))


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share stays within (nearest rank)."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def poisson(tenant: str, per_s: float, until_s: float, prompt: int, output: int, deadline_s: float | None = None) -> list[Job]:
    """Requests of one tenant at random times; the same for the same arguments."""
    draw, at_s, jobs = random.Random(f"{tenant}:{per_s}"), 0.0, []
    while (at_s := at_s + draw.expovariate(per_s)) < until_s:
        jobs.append(Job(f"{tenant}-{len(jobs)}", at_s, prompt, output, tenant=tenant, deadline_s=deadline_s))
    return jobs


def cluster(tenants: tuple[TenantLimits, ...] = (), order: str = "fair", replicas: int = 1, limits: QueueLimits = NO_LIMITS) -> Simulation:
    """Small replicas that stay where they are, and messages that take no time."""
    options = SimulationOptions(SMALL, replicas, rebalance=False, queue_order=order, limits=limits, tenants=tenants, hop_s=0.0)
    return Simulation(options)
