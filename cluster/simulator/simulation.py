"""The whole cluster in virtual time: clients, the controller's deciding classes, and replicas that count tokens.

What is real: the waiting line with its fairness, limits and deadlines (`cluster.global_scheduler`), routing with its page index and ledger
(`cluster.routing`), the table of lives (`cluster.controller`), and what moves where (`cluster.mobility`, `cluster.rebalancing`). What is a
model: a replica (`planner`, `replica`), a migration (`migrations`), and messages, which take `hop_s` each. Nothing fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from ...worker.protocol import EventFrame, MigrationResult, Overloaded, QuireError
from ..autoscaling_guard import Autoscaler
from ..controller import Controller, Report
from ..global_scheduler import GlobalScheduler, QueueLimits
from ..messages import Route
from ..mobility import QUICK_ROUND_S, ROUND_S, Mobility
from ..rebalancing import Move, Need, Place, Role
from ..routing import Router
from ..tenants import TenantLimits, TenantTable
from .fleet import Fleet
from .jobs import Job, PageNames, sorted_jobs
from .loop import EventLoop
from .migrations import Migrations
from .replica import Replica
from .reports import Reports
from .sequence import Sequence
from .speed_profile import SpeedProfile
from .timeline import SAMPLE_S, Sample, Timeline

NO_LIMITS = QueueLimits(10**9, 10**15, 1e9)


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """What is played on.

    Attributes:
        profile: of every replica.
        replicas: at the beginning, when they are ready.
        routing: a key of `policies.POLICIES`.
        rebalance: running requests move to where there is more room for them.
        prefill_replicas, queue_order: as `worker.config.ClusterOptions` has them.
        limits: of the queue.
        tenants: who may use how much.
        hop_s: that a message from one process to another takes.
        seed: of the draws of `power_of_two`.
        autoscaler: makes what changes the number of replicas; None: there are as many all the time.
    """

    profile: SpeedProfile
    replicas: int = 1
    routing: str = "cost"
    rebalance: bool = True
    prefill_replicas: int = 0
    queue_order: str = "fair"
    limits: QueueLimits = NO_LIMITS
    tenants: tuple[TenantLimits, ...] = ()
    hop_s: float = 0.001
    seed: int = 0
    autoscaler: Callable[[], Autoscaler | None] | None = None


class Simulation:
    """One run. `watch`, when set, is called after everything that was decided."""

    def __init__(self, options: SimulationOptions) -> None:
        self.options = options
        self.loop = EventLoop()
        self.router = Router(options.routing, options.seed)
        self.scheduler = GlobalScheduler(
            self.router, TenantTable(options.tenants, options.profile.replica.page_size), options.limits, options.queue_order
        )
        self.table = Controller(options.replicas, 10 * options.profile.replica.startup_s + 600)
        self.books = Mobility(options.prefill_replicas)
        self.replicas: dict[Route, Replica] = {}
        self.timeline = Timeline()
        self.gone_preemptions = self.gone_recomputed = 0  # of replicas that are gone
        self.fleet = Fleet(self, options.autoscaler() if options.autoscaler else None, options.replicas)
        self.watch: Callable[[], None] | None = None
        self._migrations = Migrations(self.loop, options.hop_s, self._moved)
        self._names = PageNames(options.profile.replica.page_size)
        self._jobs: dict[str, Job] = {}
        self._open = 0
        self._alarm_s: float | None = None
        self._round_s = 0.0

    # --- the run ---

    def play(self, jobs: Iterable[Job], until_s: float = float("inf"), done: Callable[[Job], None] | None = None) -> list[Job]:
        """All of `jobs`, in the order of arrival, as they are when the last of them has its answer, or at `until_s`.

        Args:
            done: hears of each as it ends.
        """
        ordered = sorted_jobs(jobs)
        self._jobs = {job.request_id: job for job in ordered}
        self._open, self._done = len(ordered), done
        self.fleet.begin()
        for job in ordered:
            self.loop.at(job.arrival_s + self.options.hop_s, partial(self._offer, job))
        if self.options.rebalance or self.options.prefill_replicas or self.options.autoscaler:
            self.loop.after(0.0, self._rounds)
        self.loop.after(0.0, self._sample)
        self.loop.run(until_s)
        return ordered

    @property
    def running(self) -> bool:
        """Some job has no answer yet."""
        return self._open > 0

    # --- lives ---

    def ready(self, route: Route) -> None:
        """A replica takes requests from now on."""
        replica = Replica(route, self.options.profile, self.loop, self._ended, lambda: reports.news())
        reports = Reports(self.loop, replica, lambda: len(self.replicas), self._events, self.options.hop_s)
        self.replicas[route] = replica
        report = Report(*route, 0, "", 1, 1, {}, None, replica.info, None)
        self.table.reported(report, self.loop.now_s)
        self.router.add(*route, replica.info)
        self._events(replica.frame())

    def gone(self, route: Route) -> None:
        """It is no longer there; it held nothing."""
        self.scheduler.replica_lost(*route, self.loop.now_s)
        replica = self.replicas.pop(route, None)
        if replica is not None:
            self.gone_preemptions += replica.planner.preemptions
            self.gone_recomputed += replica.planner.recomputed_tokens

    def _sample(self) -> None:
        draining, ready = len(self.table.draining()), len(self.table.serving())
        running = sum(r.load.running + r.load.waiting for r in self.table.serving() if r.load is not None)
        starting = len(self.table.replicas()) - ready
        self.timeline.samples.append(Sample(self.loop.now_s, ready - draining, starting, draining, running, len(self.scheduler.waiting())))
        if self.running:
            self.loop.after(SAMPLE_S, self._sample)

    # --- requests ---

    def _offer(self, job: Job) -> None:
        now_s = self.loop.now_s
        self.fleet.arrivals.came(job.prompt_tokens, now_s)
        try:
            self.scheduler.offer(job.admission(self._names.hashes(job), now_s - job.arrival_s), now_s)
        except QuireError as error:
            self._refused(job, error)
        self._dispatch()

    def _dispatch(self) -> None:
        """Decides what can be decided now, and sets the alarm for when that may change by itself."""
        now_s = self.loop.now_s
        for decision in self.scheduler.dispatch(now_s):
            job = self._jobs[decision.request_id]
            if isinstance(decision.outcome, Route):
                job.sent_s = now_s
                self.loop.after(2 * self.options.hop_s, partial(self._submit, job, decision.outcome))
            else:
                self._refused(job, decision.outcome)
        next_s = self.scheduler.next_s(now_s)
        if next_s is not None and (self._alarm_s is None or now_s + next_s < self._alarm_s):
            self._alarm_s = now_s + next_s
            self.loop.at(self._alarm_s, self._alarm)
        if self.watch is not None:
            self.watch()

    def _alarm(self) -> None:
        if self._alarm_s is not None and self.loop.now_s >= self._alarm_s:
            self._alarm_s = None
            if self.running:
                self._dispatch()

    def _submit(self, job: Job, route: Route) -> None:
        s = Sequence(job.request_id, job.tenant, job.prompt_tokens, job.output_tokens, self._names.hashes(job), job.priority)
        self.replicas[route].submit(s)

    def _refused(self, job: Job, error: QuireError) -> None:
        job.error, job.error_s = type(error).__name__, self.loop.now_s + self.options.hop_s
        job.retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None
        self._close(job)

    def _ended(self, s: Sequence) -> None:
        job = self._jobs[s.request_id]
        if s.first_s is None or s.last_s is None:
            raise RuntimeError(f"{s.request_id} has ended without a token")
        job.first_s, job.last_s = s.first_s + self.options.hop_s, s.last_s + self.options.hop_s
        job.cached_tokens = s.cached_tokens or 0
        self.fleet.ended(job)
        self._close(job)

    def _close(self, job: Job) -> None:
        self._open -= 1
        if self._done is not None:
            self._done(job)

    def _events(self, frame: EventFrame) -> None:
        self.table.heard(frame.replica_id, frame.epoch, self.loop.now_s, frame.load)
        self.scheduler.events(frame, self.loop.now_s)
        self._dispatch()

    # --- moves ---

    def _rounds(self) -> None:
        """A round of moves, and the next one's time."""
        now_s = self.loop.now_s
        self.steer()
        full = now_s >= self._round_s
        if full:
            self._round_s = now_s + ROUND_S
        self._round(full and self.options.rebalance)
        if self.running:
            hurry = self.options.prefill_replicas or self.table.draining()
            self.loop.after(QUICK_ROUND_S if hurry else ROUND_S, self._rounds)

    def steer(self) -> None:
        """Tells the router what takes nothing new."""
        decode = [r.replica_id for r in self.table.replicas() if self.books.role(r.replica_id) is Role.DECODE]
        self.router.steer(self.table.draining(), decode)

    def _round(self, leisure: bool) -> None:
        now_s, need = self.loop.now_s, self._need()
        places = self.places()
        routes = self.books.looked_at(places, need, leisure)
        if not routes:
            return
        found = {route: self.replicas[route].requests() for route in routes}
        for move in self.books.plan(places, found, need, leisure, now_s):
            self.books.begin(move)
            attempt, _ = self.scheduler.where(move.request_id) or (-1, None)
            self.router.expect(move, attempt, now_s)
            source, destination = self.replicas.get(move.source), self.replicas.get(move.destination)
            self.loop.after(self.options.hop_s, partial(self._migrations.begin, move, source, destination))

    def places(self) -> list[Place]:
        """The replicas as they are when all that moves has moved."""
        return self.books.places(self.router.snapshots(), self.table.draining(), self.loop.now_s)

    def _need(self) -> Need | None:
        request = self.scheduler.stuck()
        if request is None:
            return None
        size = self.options.profile.replica.page_size
        return Need(-(-request.prompt_tokens // size) + request.sequences, request.longest_tokens)

    def _moved(self, move: Move, outcome: MigrationResult) -> None:
        self.books.ended(move, outcome, self.loop.now_s)
        self.router.forget(move.request_id)
