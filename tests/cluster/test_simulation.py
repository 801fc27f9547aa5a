"""The simulated cluster: as the real engine would do it, the same every time, and nothing left over."""

from __future__ import annotations

import random

import pytest
from virtual_cluster import SMALL
from virtual_replica import DELAY_S, Shape, Speed, VirtualCluster
from virtual_replica import Job as RealJob

from quire.cluster.rebalancing import Reason
from quire.cluster.routing import Router
from quire.cluster.simulator.jobs import Job
from quire.cluster.simulator.simulation import Simulation, SimulationOptions
from quire.cluster.simulator.speed_profile import ReplicaShape, SpeedProfile, StepCost
from quire.deploy.load.report import percentile
from quire.deploy.load.traces import TraceOptions, trace_rows
from quire.deploy.load.workload import trace_file

STEP_S, TOKEN_S = 0.004, 0.0005


def replica(pages: int, **more: int) -> SpeedProfile:
    return SpeedProfile("test", True, StepCost(STEP_S, TOKEN_S), ReplicaShape(pages, 32, 512, 32, 16_384, **more))


def random_jobs(count: int, per_s: float, seed: int = 0, longest: int = 900) -> list[Job]:
    draw, at_s, jobs = random.Random(seed), 0.0, []
    for i in range(count):
        at_s += draw.expovariate(per_s)
        prompt = draw.randrange(1, longest)
        blocks = tuple(range(1000 * i, 1000 * i + prompt // 32 + 1))  # nobody else's, but found again after giving way
        jobs.append(Job(f"{i}", at_s, prompt, draw.randrange(1, 120), blocks, 32))
    return jobs


def real(jobs: list[Job], pages: int) -> list[float]:
    """Times to first token from the worker's own engine, on a clock that its runner moves on."""
    shape, speed = Shape(pages=pages), Speed(STEP_S, TOKEN_S, TOKEN_S)
    asked = [
        RealJob(j.arrival_s, tuple(int(j.request_id) * 7 % 9000 + k % 900 for k in range(j.prompt_tokens)), j.output_tokens) for j in jobs
    ]
    return [ttft_s - DELAY_S for ttft_s in VirtualCluster(Router("cost"), [speed], shape).run(asked).ttft_s]


def test_alone_every_request_takes_as_long_as_in_the_real_engine() -> None:
    jobs = [Job(f"{i}", 100.0 * i, prompt, 40) for i, prompt in enumerate((1, 31, 32, 33, 511, 512, 513, 1500))]
    played = Simulation(SimulationOptions(replica(512), hop_s=0.0)).play(jobs)
    assert [job.ttft_s for job in played] == pytest.approx(real(jobs, 512))
    assert [job.last_s - job.first_s for job in played] == pytest.approx([39 * (STEP_S + TOKEN_S)] * len(jobs))


@pytest.mark.parametrize(("per_s", "pages"), [(2.0, 512), (4.0, 512), (3.0, 80)], ids=["light", "heavy", "short of pages"])
def test_together_they_take_as_long_as_in_the_real_engine(per_s: float, pages: int) -> None:
    jobs = random_jobs(300, per_s)
    simulation = Simulation(SimulationOptions(replica(pages), hop_s=0.0))
    simulation.play(jobs)
    ttfts, wanted = [job.ttft_s for job in jobs], real(jobs, pages)
    for percent in (50, 90):
        assert percentile(ttfts, percent) == pytest.approx(percentile(wanted, percent), rel=0.15), percent
    planner = next(iter(simulation.replicas.values())).planner
    assert (planner.preemptions > 0) == (pages == 80)


def test_prefixes_are_found_as_in_the_real_engine(data_file) -> None:
    path, options = data_file("traces/mooncake_conversation_trace.jsonl.gz"), TraceOptions(scale=16, max_tokens=2048, one_session_in=60)
    rows, requests = trace_rows(path, 10_000, options), trace_file(path, 10_000, options)
    squeeze = 12.0
    figures = VirtualCluster(Router("cost"), [Speed(STEP_S, TOKEN_S, TOKEN_S)] * 2, Shape(pages=512)).run(
        [RealJob(r.arrival_s / squeeze, r.prompt, r.output_tokens) for r in requests]
    )
    jobs = [
        Job(f"{i}", (r.at_s - rows[0].at_s) / squeeze, r.prompt_tokens, r.output_tokens, r.blocks, options.block_tokens)
        for i, r in enumerate(rows)
    ]
    Simulation(SimulationOptions(replica(512), 2, rebalance=False)).play(jobs)
    hit_rate = sum(job.cached_tokens for job in jobs) / sum(job.prompt_tokens for job in jobs)
    assert len(jobs) > 100
    assert figures.hit_rate > 0.2
    assert hit_rate == pytest.approx(figures.hit_rate, rel=0.1)
    assert percentile([job.ttft_s for job in jobs], 50) == pytest.approx(percentile(figures.ttft_s, 50), rel=0.15)


def test_the_same_jobs_give_the_same_run() -> None:
    def run() -> list[tuple[float | None, float | None]]:
        options = SimulationOptions(replica(200), 3, "power_of_two", seed=3)
        return [(job.first_s, job.last_s) for job in Simulation(options).play(random_jobs(200, 12.0))]

    assert run() == run()


def test_when_all_is_over_nothing_is_held() -> None:
    simulation = Simulation(SimulationOptions(replica(100), 3))
    jobs = simulation.play(random_jobs(300, 15.0))
    assert all(job.over and job.error is None for job in jobs)
    for one in simulation.replicas.values():
        planner = one.planner
        assert (one.idle(), planner.pages.active, planner.awaited, len(planner.batch)) == (True, 0, 0, 0)
        assert planner.pages.available == 100
    assert simulation.scheduler.waiting() == []


def skewed() -> list[Job]:
    """Every other one, in turn for the same replica, is long."""
    return [Job(f"{i}", 0.02 * i, 60, 600 if i % 2 == 0 else 20) for i in range(48)]


def test_running_requests_move_to_where_there_is_room_at_the_speed_of_the_link() -> None:
    profile = SpeedProfile("x", True, StepCost(STEP_S, TOKEN_S), ReplicaShape(600, 32, 512, 32, 16_384, 10**6, link_bytes_per_s=1e8))
    options = SimulationOptions(profile, 2, "round_robin")
    moving, staying = Simulation(options), Simulation(SimulationOptions(profile, 2, "round_robin", rebalance=False))
    jobs, still = moving.play(skewed()), staying.play(skewed())
    assert moving.books.counts()[Reason.FILL, "moved"] > 3, "a replica that is new gets its share"
    assert all(job.last_s is not None for job in jobs)
    assert max(job.last_s for job in jobs) < 0.9 * max(job.last_s for job in still)
    moved = moving.books.total
    assert moved.bytes == moved.pages * 10**6
    assert 10.0 <= moved.longest_ms <= 100.0, "the page that is being written, and what has grown, at 10 ms a page"
    assert all(one.planner.pages.active == 0 and one.planner.awaited == 0 for one in moving.replicas.values())


def test_what_a_prefill_replica_has_begun_goes_on_elsewhere() -> None:
    simulation = Simulation(SimulationOptions(SMALL, 2, prefill_replicas=1))
    jobs = simulation.play([Job(f"{i}", 0.3 * i, 300, 200) for i in range(12)])
    assert all(job.last_s is not None for job in jobs)
    assert simulation.books.counts()[Reason.DISAGGREGATE, "moved"] == 12
