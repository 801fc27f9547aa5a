"""A recorded trace in the simulator: jobs from its rows, and figures of what became of them, as `quire bench` tells those of real ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...cluster.simulator.jobs import Job
from ...cluster.simulator.simulation import Simulation, SimulationOptions
from .client import Outcome
from .report import Slo, summarize
from .report import table as bench_table
from .traces import TraceOptions, TraceRow

SPREAD_S = 60.0  # within which the copies of a request come


@dataclass(frozen=True, slots=True)
class Pace:
    """When the requests of a trace come.

    Attributes:
        from_s, until_s: the part of the trace that is played.
        speedup: the trace's times are divided by this.
        multiply: so many copies of each request come, each within `SPREAD_S` (of the trace's time) after it; a fraction is a chance.
        seed: of these times.
    """

    from_s: float = 0.0
    until_s: float = math.inf
    speedup: float = 1.0
    multiply: float = 1.0
    seed: int = 0


def jobs_of(rows: Sequence[TraceRow], options: TraceOptions, pace: Pace) -> list[Job]:
    """The requests of a trace, in the order of arrival. The first copy of each comes when the trace says; copies share its prefix."""
    draw, jobs = random.Random(f"{pace.seed}:copies"), []
    for number, row in enumerate(rows):
        at_s = row.at_s - rows[0].at_s
        if not pace.from_s <= at_s < pace.until_s:
            continue
        copies = int(pace.multiply) + (draw.random() < pace.multiply % 1)
        for copy in range(copies):
            moved_s = at_s - pace.from_s + (draw.uniform(0, SPREAD_S) if copy else 0.0)
            lengths = (row.prompt_tokens, row.output_tokens, row.blocks, options.block_tokens if row.blocks else 0)
            jobs.append(Job(f"{number}.{copy}", moved_s / pace.speedup, *lengths))
    return sorted(jobs, key=lambda job: job.arrival_s)


@dataclass(frozen=True, slots=True)
class Played:
    """One run."""

    jobs: list[Job]
    simulation: Simulation

    @property
    def end_s(self) -> float:
        """When the last request had its answer."""
        return max((job.error_s if job.last_s is None else job.last_s) for job in self.jobs)

    def outcomes(self) -> list[Outcome]:
        """As a load test's client would have noted them."""
        return [_outcome(job) for job in self.jobs]

    def figures(self, slo: Slo) -> dict[str, Any]:
        """The summary of `quire bench`, and what only a simulation knows."""
        sim, end_s = self.simulation, self.end_s
        gpus = sim.options.profile.replica.gpus
        planners = [replica.planner for replica in sim.replicas.values()]
        moved = sim.books.total
        return {
            **summarize(self.outcomes(), end_s, slo),
            "replica_hours": sim.timeline.replica_s(end_s) / 3600,
            "gpu_hours": sim.timeline.replica_s(end_s) / 3600 * gpus,
            "replicas_most": max((s.ready + s.starting + s.draining for s in sim.timeline.samples), default=0),
            "preemptions": sim.gone_preemptions + sum(p.preemptions for p in planners),
            "recomputed_tokens": sim.gone_recomputed + sum(p.recomputed_tokens for p in planners),
            "migrations": {f"{reason} {outcome}": count for (reason, outcome), count in sorted(sim.books.counts().items())},
            "migrated_pages": moved.pages,
            "longest_downtime_ms": moved.longest_ms,
        }


def play(options: SimulationOptions, jobs: list[Job], done: Callable[[Job], None] | None = None) -> Played:
    """Plays all of `jobs`; `done` hears of each as it ends."""
    simulation = Simulation(options)
    return Played(simulation.play(jobs, done=done), simulation)


def table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    moves = ", ".join(f"{count} {name}" for name, count in figures["migrations"].items()) or "none"
    hours, gpu_hours = figures["replica_hours"], figures["gpu_hours"]
    lines = [
        bench_table(figures),
        "",
        f"replicas   {figures['replicas_most']} at most, {hours:.2f} hours of them, {gpu_hours:.2f} GPU-hours",
        f"moves      {moves}; longest gap {figures['longest_downtime_ms']:.1f} ms",
        f"preempted  {figures['preemptions']} times, {figures['recomputed_tokens']} tokens computed again",
    ]
    return "\n".join(lines)


def _outcome(job: Job) -> Outcome:
    if job.first_s is None or job.last_s is None:
        return Outcome(job.arrival_s, None, job.error_s - job.arrival_s, error=job.error or "unanswered")
    lengths = (job.prompt_tokens, job.output_tokens, job.cached_tokens)
    return Outcome(job.arrival_s, job.first_s - job.arrival_s, job.last_s - job.arrival_s, *lengths)
