"""Replicas that come and go in a simulation: by the real autoscaler, with starts that take time and drains that move what runs."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from quire.cluster.autoscaling_guard import Autoscaler, ScaleLimits
from quire.cluster.autoscaling_policies import OngoingPolicy
from quire.cluster.controller import ReplicaState
from quire.cluster.rebalancing import Reason
from quire.cluster.simulator.jobs import Job
from quire.cluster.simulator.simulation import Simulation, SimulationOptions
from quire.cluster.simulator.speed_profile import ReplicaShape, SpeedProfile, StepCost

START_S = 8.0
PROFILE = SpeedProfile(
    "p", True, StepCost(0.004, 0.0005), ReplicaShape(400, 32, 512, 32, 16_384, 10**5, gpus=2, link_bytes_per_s=1e8, startup_s=START_S)
)


def autoscaler(least: int = 1) -> Autoscaler:
    return Autoscaler("ongoing", OngoingPolicy(4.0), ScaleLimits(least, 5, up_cooldown_s=1.0, down_cooldown_s=15.0, zero_after_s=20.0))


def hill() -> list[Job]:
    """Five minutes whose load rises and falls."""
    draw, at_s, jobs = random.Random(0), 0.0, []
    while at_s < 300.0:
        at_s += draw.expovariate(0.2 + 9.0 * math.sin(math.pi * at_s / 300.0) ** 4)
        jobs.append(Job(f"{len(jobs)}", at_s, draw.randrange(20, 300), draw.choice((30, 400))))
    return jobs


def test_replicas_follow_the_load_and_nobody_notices_when_one_goes() -> None:
    simulation = Simulation(SimulationOptions(PROFILE, 1, autoscaler=autoscaler))
    jobs = simulation.play(hill())
    assert all(job.last_s is not None for job in jobs)
    counts = [(d.before, d.target) for d in simulation.fleet.decisions]
    assert max(target for _, target in counts) >= 4
    assert counts[-1][1] < 4, "and back"
    assert simulation.books.counts()[Reason.DRAIN, "moved"] > 0
    first = simulation.fleet.decisions[0]
    ready = [s.at_s for s in simulation.timeline.samples if s.ready > 1]
    assert first.at_s + START_S <= ready[0] <= first.at_s + START_S + 6.0
    assert {r.state for r in simulation.table.replicas()} <= {ReplicaState.READY, ReplicaState.STARTING}
    assert len(simulation.replicas) == simulation.timeline.samples[-1].ready + simulation.timeline.samples[-1].draining
    assert all(one.planner.pages.active == 0 for one in simulation.replicas.values())


def test_time_is_paid_from_the_start_of_a_replica_to_its_end() -> None:
    simulation = Simulation(SimulationOptions(PROFILE, 1, autoscaler=autoscaler))
    simulation.play(hill())
    end_s = simulation.loop.now_s
    paid_s = simulation.timeline.replica_s(end_s)
    samples = simulation.timeline.samples
    seen_s = 5.0 * sum(s.ready + s.starting + s.draining for s in samples)
    assert paid_s < 5 * end_s
    assert abs(paid_s - seen_s) < 0.05 * seen_s


def test_with_nothing_to_do_all_go_and_the_first_request_wakes_one() -> None:
    jobs = [Job("early", 0.0, 50, 20), Job("late", 200.0, 50, 20)]
    simulation = Simulation(SimulationOptions(PROFILE, 1, autoscaler=lambda: autoscaler(0)))
    simulation.play(jobs)
    assert any(s.ready + s.starting == 0 for s in simulation.timeline.samples)
    early, late = jobs
    assert early.ttft_s is not None
    assert early.ttft_s < 1.0
    assert late.ttft_s is not None
    assert START_S < late.ttft_s < START_S + 3.0


def test_a_replica_that_is_wanted_again_while_it_leaves_stays() -> None:
    wish = {"now": 2.0}
    limits = ScaleLimits(1, 3, up_cooldown_s=0.0, down_cooldown_s=0.0)
    options = SimulationOptions(replace(PROFILE), 2, autoscaler=lambda: Autoscaler("test", lambda ctx: (wish["now"], {}), limits))
    simulation = Simulation(options)
    for at_s, wanted in ((5.2, 1.0), (6.2, 2.0)):
        simulation.loop.at(at_s, lambda wanted=wanted: wish.update(now=wanted))
    jobs = simulation.play([Job(f"{i}", 0.1 * i, 200, 2000) for i in range(8)])
    assert all(job.last_s is not None for job in jobs)
    assert [(d.before, d.target) for d in simulation.fleet.decisions] == [(2, 1), (1, 2)]
    assert max(s.starting for s in simulation.timeline.samples) == 0, "nothing new had to be started"
