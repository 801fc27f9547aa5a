"""The controller's actor: starts, follows and ends the replicas, and answers ingresses, operators and the command line.

All that it decides is decided by pure classes: the table of lives (`cluster.controller`), the queue (`cluster.global_scheduler`)
and the router. Their state belongs to one event loop. After a restart by Ray it finds the replicas by name and learns the rest
from their reports and event dumps; what it cannot learn (the queue) is asked again by the ingresses. So it takes over other options, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError

from ...worker.actor import Reply, reply_to, start_actor_logging
from ...worker.config import QuireOptions
from ...worker.protocol import EventFrame, QuireError, ReplicaLost
from ..admin import NotNow, Percentiles, UnknownReplica, UnknownRequest
from ..admissions import ADMIT_POLL_S, Admissions
from ..autoscaling_setup import replicas_at_first
from ..controller import Controller, Replica, ReplicaState
from ..global_scheduler import GlobalScheduler, QueueLimits
from ..messages import AdmitRequest, Route
from ..routing import Router
from ..tally import Tally
from ..tenants import TenantLimits, TenantTable
from ..upgrading import hindrance, shared, version
from .calls import CALL_TIMEOUT_S, LifeName, answer, first_line, ray_
from .lives import Life, Lives, NoPlace
from .memory import Memory
from .movers import Movers
from .scaler import Scaler
from .watch import Watch, report_of

log = logging.getLogger(__name__)

MAX_CONCURRENCY = 16_384  # requests that wait for a route, above all; they are bounded by the queue
TICK_S = 0.1
LEASE_S = 30.0
INGRESS_LEASE_S = 10.0
STATUS_TIMEOUT_S = 2.0
LAST_ANSWER_S = 1.0  # for the answer to who released it


class ControllerActor:
    """One controller of one namespace.

    Args:
        options: of the cluster.
        tenants: who may use how much.
        hash_key: of page hashes, the same for every life of every process of the cluster.

    Options and tenants are those that it began with; what it was told to `become` since counts instead.
    """

    def __init__(self, options: QuireOptions, tenants: tuple[TenantLimits, ...], hash_key: bytes) -> None:
        start_actor_logging(options.server.log_level, options.server.log_format)
        self._memory = Memory(options.cluster.namespace, hash_key)
        options, tenants = self._memory.options() or (options, tenants)
        cluster = options.cluster
        self._options = options
        self._becomes = shared(options)
        self._hash_key = hash_key
        self._table = Controller(replicas_at_first(options), cluster.start_timeout_s, version(options))
        self._table.renew("start", time.monotonic() + LEASE_S)
        self._router = Router(cluster.routing)
        limits = QueueLimits(cluster.max_queue_requests, cluster.max_queue_tokens, cluster.max_queue_wait_s)
        self._scheduler = GlobalScheduler(self._router, TenantTable(tenants, options.engine.cache.page_size), limits, cluster.queue_order)
        self._admissions = Admissions()
        self._decided: dict[tuple[str, int], asyncio.Event] = {}  # (request id, attempt) that somebody waits for
        self._tally = Tally()
        self._died: set[str] = set()  # replicas that have, since this controller began
        self._lives = Lives(options, hash_key)
        self._watch = Watch(self._table, self._router, self._events)
        self._running: dict[LifeName, Life] = {}
        self._tasks: dict[LifeName, asyncio.Task[None]] = {}  # of lives that go on
        self._ending: dict[LifeName, asyncio.Task[None]] = {}  # of lives that are being cleared away
        self._movers = Movers(cluster, self._table, self._router, self._scheduler, self._running)
        self._scaler = Scaler(options, self._table, self._router, self._scheduler, self._movers, self._memory)
        self._ingresses: dict[str, tuple[int, float]] = {}  # id -> pid, end of its lease
        self._timer: asyncio.TimerHandle | None = None
        self._found = asyncio.Event()  # what a controller before this one has started
        self._loop: asyncio.Task[None] | None = None
        self._rounds: list[asyncio.Task[None]] = []

    # --- for ingresses ---

    async def admit(self, fields: tuple[Any, ...]) -> Reply:
        """Where a request (the fields of `AdmitRequest`) goes, as soon as that is decided.

        Returns:
            ("route", replica id, epoch); ("queued",) when it is still undecided after `ADMIT_POLL_S`; or the reply of an error.
        """
        await self._started()
        request = AdmitRequest(*fields)
        key, now_s = (request.request_id, request.attempt), time.monotonic()
        try:
            if self._admissions.ask(request, now_s):
                self._scaler.came(request, now_s)
                self._scheduler.offer(request, now_s)
                self._dispatch()
        except QuireError as error:
            self._tally.refused(request.tenant, error)
            self._admissions.withdraw(request.request_id)
            return reply_to(error)
        found = self._admissions.fetch(*key)
        if found is None and not self._admissions.superseded(*key):
            decided = self._decided.setdefault(key, asyncio.Event())
            try:
                await asyncio.wait_for(decided.wait(), ADMIT_POLL_S)
            except TimeoutError:
                return ("queued",)
            found = self._admissions.fetch(*key)
        return found or reply_to(ReplicaLost("this attempt is not asked any more"))

    async def withdraw(self, request_id: str) -> None:
        """The client of a request has left."""
        self._withdraw(request_id)
        self._dispatch()

    async def serving(self) -> tuple[bytes, list[tuple[str, int, tuple[Any, ...]]], tuple[Any, ...] | None]:
        """The key of page hashes, (replica id, epoch, ModelInfo's fields) of every replica that serves, and ModelInfo's fields while there
        are to be none."""
        await self._started()
        rows = [(r.replica_id, r.epoch, tuple(r.report.info)) for r in self._table.serving() if r.report and r.report.info]
        asleep = self._scaler.asleep()
        return self._hash_key, rows, tuple(asleep) if asleep else None

    async def register(self, ingress_id: str, pid: int, ttft_s: tuple[float, ...] | None, tpot_s: tuple[float, ...] | None) -> str:
        """An ingress is there, for the next `INGRESS_LEASE_S`, and has seen such `Percentiles`. Returns the level at which it is to log."""
        self._scaler.saw(ingress_id, Percentiles(*ttft_s) if ttft_s else None, Percentiles(*tpot_s) if tpot_s else None)
        self._ingresses[ingress_id] = (pid, time.monotonic() + INGRESS_LEASE_S)
        return self._lives.log_level

    # --- for the command line ---

    async def options(self) -> QuireOptions:
        """What it goes by."""
        return self._options

    async def become(self, options: QuireOptions, tenants: tuple[TenantLimits, ...]) -> str:
        """Takes these over: in a moment this process ends, and the next one goes by them. Nothing happens when it does already.

        Returns:
            Why it cannot (`upgrading.hindrance`); empty when it can.
        """
        await self._started()
        why = hindrance(self._options, options)
        if why or shared(options) == self._becomes:
            return why
        self._becomes = shared(options)
        log.warning("other options are taken over: version %s becomes %s", version(self._options), version(options))
        own = replace(options, cluster=replace(options.cluster, namespace=self._options.cluster.namespace))
        for rounds in [*self._rounds, *([self._loop] if self._loop else [])]:
            rounds.cancel()
        await asyncio.to_thread(self._scaler.hand_over, self._options, own)
        await asyncio.to_thread(self._memory.become, own, tenants)
        asyncio.get_running_loop().call_later(LAST_ANSWER_S, os._exit, 1)
        return ""

    async def view(self, holder: str) -> dict[str, Any]:
        """Fields of `driver.ClusterView`; renews the lease of `holder`."""
        await self._started()
        self._table.renew(holder, time.monotonic() + LEASE_S)
        rows = []
        for r in self._table.replicas():
            loaded, to_load, phases = (r.report.loaded, r.report.to_load, r.report.phases) if r.report else (0, 0, {})
            rows.append((r.replica_id, r.epoch, r.state.value, r.reason, loaded, to_load, phases))
        return {"replicas": rows, "settled": self._table.settled(), "hopeless": self._table.hopeless()}

    async def release(self, holder: str) -> bool:
        """`holder` leaves. True when it was the last one: the replicas are gone, and the controller goes."""
        self._table.release("start")
        self._table.release(holder)
        if self._table.wanted(time.monotonic()):
            return False
        if self._loop is not None:
            self._loop.cancel()
        await self._stop()
        asyncio.get_running_loop().call_later(LAST_ANSWER_S, _end_for_good)
        return True

    # --- for operators ---

    async def status(self) -> dict[str, Any]:
        """All there is to know, as primitives: `AdminPort.status` makes a `ClusterStatus` of it."""
        await self._started()
        now_s = time.monotonic()
        self._ingresses = {name: row for name, row in self._ingresses.items() if row[1] > now_s}
        lives = [life for name, life in self._running.items() if self._table.lives(*name)]
        live = await asyncio.gather(*(self._live_requests(life) for life in lives))
        waiting = self._scheduler.waiting()
        moved = self._movers.books
        figures = replace(
            self._tally.figures(len(waiting), self._scheduler.queued_tokens()),
            migrations=moved.counts(),
            migrations_under_way=len(moved.under_way),
            migrated_pages=moved.total.pages,
            migrated_bytes=moved.total.bytes,
            downtime_s=moved.total.downtime_ms / 1000,
        )
        queued = [(r.request_id, None, r.tenant, r.prompt_tokens, 0, "queued") for r in waiting]
        return {
            "controller_pid": os.getpid(),
            "ingresses": [(name, pid) for name, (pid, _) in sorted(self._ingresses.items())],
            "replicas": [_replica_row(r) for r in self._table.replicas()],
            "requests": [row for rows in live for row in rows] + queued,
            "tenants": [(t.name, t.weight, t.waiting, t.running, t.pages, t.bounds) for t in self._scheduler.tenants()],
            "figures": asdict(figures),
            "scale": asdict(self._scaler.figures()),
        }

    async def page_maps(self) -> dict[str, tuple[bytes, bytes]]:
        """A byte for each page of each ready replica (`ReplicaActor.page_maps`)."""
        maps = await self._ask_all(lambda life: life.leader.page_maps.remote())
        return {replica_id: pages for replica_id, pages in maps.items() if isinstance(pages, tuple)}

    async def recent(self) -> tuple[Any, ...]:
        """Fields of `Recent`, as primitives."""
        await self._started()
        now_s, books = time.monotonic(), self._movers.books
        moved = [(ago_s, tuple(row)) for ago_s, row in books.moved(now_s)]
        latencies = [tuple(seen) if seen else None for seen in self._scaler.latencies(now_s)]
        return [tuple(row) for row in books.moving()], moved, *latencies

    async def decisions(self) -> dict[str, list[dict[str, Any]]]:
        """What each ready replica did lately when pages had run out (`ReplicaActor.decisions`)."""
        rows = await self._ask_all(lambda life: life.leader.decisions.remote())
        return {replica_id: some for replica_id, some in rows.items() if isinstance(some, list)}

    async def _ask_all(self, ask: Callable[[Life], Any]) -> dict[str, Any]:
        """What each ready replica answers, or the error."""
        await self._started()
        ready = [r for r in self._table.serving() if r.state is ReplicaState.READY]
        lives = [life for r in ready if (life := self._running.get(LifeName(r.replica_id, r.epoch)))]
        answers = await asyncio.gather(*(answer(ask(life), STATUS_TIMEOUT_S) for life in lives), return_exceptions=True)
        return {life.name.replica_id: some for life, some in zip(lives, answers, strict=True)}

    async def restart(self, replica_id: str) -> bool:
        """Ends the life of a replica; the next one begins at once. False when there is no such replica."""
        replica = self._table.replica(replica_id)
        if replica is None:
            return False
        self._table.died(replica_id, replica.epoch, "restarted by an operator", time.monotonic())
        self._table.hurry(replica_id, time.monotonic())
        return True  # the loop ends what is left of it

    async def migrate(self, request_id: str, replica_id: str) -> tuple[str, Any]:
        """("ok", fields of `MoveRow`), or the name of an error of `AdminPort.migrate` and what it says."""
        await self._started()
        return await _told(self._movers.migrate(request_id, replica_id))

    async def drain(self, replica_id: str, undo: bool, wait_s: float) -> tuple[str, Any]:
        """("ok", fields of `DrainStatus`), or an error, as `migrate` tells it."""
        await self._started()
        return await _told(self._movers.drain(replica_id, undo, wait_s))

    async def rebalance(self) -> list[tuple[Any, ...]]:
        """Fields of a `MoveRow` for each move of one round of all policies."""
        await self._started()
        return [tuple(row) for row in await self._movers.rebalance()]

    async def scale(self, replicas: int | None) -> tuple[str, Any]:
        """("ok", the view), or an error, as `migrate` tells it. None: as the autoscaler says."""
        await self._started()
        try:
            self._scaler.scale(replicas)
        except NotNow as error:
            return type(error).__name__, str(error)
        return "ok", self._scaler.view()

    async def autoscaling(self) -> dict[str, Any]:
        """`Scaler.view`."""
        await self._started()
        return self._scaler.view()

    async def set_log_level(self, level: str) -> None:
        """How much every process logs; ingresses hear of it when they register next."""
        self._lives.log_level = level
        logging.getLogger().setLevel(level.upper())
        for life in self._running.values():
            for actor in (life.leader, *life.ranks.values()):
                actor.set_log_level.remote(level)

    # --- lives ---

    async def _started(self) -> None:
        """Starts the loop on the first call; returns when the table tells what there is."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
            self._loop.add_done_callback(_start_over)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._found.wait()

    async def _run(self) -> None:
        await asyncio.to_thread(self._scaler.restore)
        for life in await asyncio.to_thread(self._lives.find):
            if self._table.adopt(*life.name, time.monotonic()):
                log.info("found %s", life.name)
                self._begin(life.name, self._watch.follow(life))
                self._running[life.name] = life
            else:
                await asyncio.to_thread(self._lives.end, life.name)
        await asyncio.to_thread(self._lives.sweep, list(self._running))
        self._found.set()
        self._rounds = [asyncio.create_task(rounds) for rounds in (self._movers.run(), self._scaler.run())]
        for rounds in self._rounds:
            rounds.add_done_callback(_start_over)
        while self._table.wanted(time.monotonic()):
            now_s = time.monotonic()
            self._table.silent(now_s)
            for name in [name for name in self._tasks if not self._table.lives(*name)]:
                self._tasks[name].cancel()
            for replica_id in self._table.due(now_s):
                name = LifeName(replica_id, self._table.begin(replica_id, time.time_ns() // 10**6, now_s))
                self._tally.restarts += name.replica_id in self._died
                self._begin(name, self._start(name))
            for request_id in self._admissions.expire(now_s):
                self._withdraw(request_id)
            await asyncio.sleep(TICK_S)
        log.warning("nobody has renewed a lease for %g s: stopping the replicas", LEASE_S)
        await self._stop()
        _end_for_good()

    def _begin(self, name: LifeName, following: Coroutine[Any, Any, None]) -> None:
        self._tasks[name] = asyncio.create_task(self._live(name, following))

    async def _start(self, name: LifeName) -> None:
        life = self._running[name] = await self._lives.start(name, lambda what_for: self._table.waits(*name, what_for))
        await self._watch.follow(life)

    async def _live(self, name: LifeName, following: Coroutine[Any, Any, None]) -> None:
        """One life, to its end; whatever ends it, nothing is left of it."""
        try:
            await following
        except NoPlace as error:
            self._table.died(*name, str(error), time.monotonic(), final=True)
        except ReplicaLost as error:
            self._table.died(*name, str(error), time.monotonic())
        except (RayError, ValueError) as error:
            self._table.died(*name, f"could not be started: {first_line(error)}", time.monotonic(), final=True)
        finally:
            self._ending[name] = self._tasks.pop(name)
            self._lose(name)
            await asyncio.to_thread(self._lives.end, name)
            del self._ending[name]

    def _lose(self, name: LifeName) -> None:
        """Nothing goes to this life any more."""
        replica = self._table.replica(name.replica_id)
        if replica is not None and not self._table.lives(*name):
            self._tally.deaths += 1
            self._died.add(name.replica_id)
            log.error("%s is dead: %s", name, replica.reason)
        self._running.pop(name, None)
        self._tally.ended(*name)
        self._scheduler.replica_lost(*name, time.monotonic())
        self._dispatch()

    async def _live_requests(self, life: Life) -> list[tuple[Any, ...]]:
        """The requests that a replica holds, as rows of `RequestRow`; none when it does not answer. Renews its report, too."""
        try:
            report = await answer(life.leader.report.remote(), STATUS_TIMEOUT_S)
            rows = await answer(life.leader.requests.remote(), STATUS_TIMEOUT_S)
        except ReplicaLost:
            return []
        self._table.reported(report_of(report), time.monotonic())
        return [(id_, life.name.replica_id, tenant, prompt, output, state) for id_, tenant, _, state, _, prompt, output, _ in rows]

    async def _stop(self) -> None:
        self._movers.stop()
        tasks = [*self._tasks.values(), *self._rounds]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._ending.values(), return_exceptions=True)
        await asyncio.to_thread(self._memory.forget)

    # --- the queue ---

    def _dispatch(self) -> None:
        """Decides what can be decided now, and sets the alarm for when that may change by itself."""
        now_s = time.monotonic()
        for decision in self._scheduler.dispatch(now_s):
            outcome = decision.outcome
            if isinstance(outcome, Route):
                reply: Reply = ("route", *outcome)
            else:
                self._tally.refused(self._admissions.tenant(decision.request_id), outcome)
                reply = reply_to(outcome)
            self._admissions.decide(decision.request_id, decision.attempt, reply)
            self._wake(decision.request_id, decision.attempt)
        if self._timer is not None:
            self._timer.cancel()
        next_s = self._scheduler.next_s(now_s)
        self._timer = None if next_s is None else asyncio.get_running_loop().call_later(max(next_s, 0.001), self._dispatch)

    def _events(self, frame: EventFrame) -> None:
        self._tally.served(frame)
        self._scheduler.events(frame, time.monotonic())
        self._dispatch()

    def _withdraw(self, request_id: str) -> None:
        self._admissions.withdraw(request_id)
        self._scheduler.withdraw(request_id)
        for key in [key for key in self._decided if key[0] == request_id]:
            self._wake(*key)

    def _wake(self, request_id: str, attempt: int) -> None:
        event = self._decided.pop((request_id, attempt), None)
        if event is not None:
            event.set()


def _replica_row(replica: Replica) -> tuple[Any, ...]:
    """A replica as a row of `cluster.admin.ReplicaRow`."""
    report, load = replica.report, replica.load
    stats, info = (report.stats, report.info) if report else (None, None)
    pages = (load.pages_total, load.pages_free, load.pages_cached, load.pages_active, load.pages_host) if load else (0,) * 5
    return (
        replica.replica_id,
        replica.epoch,
        replica.shown,
        info.name if info else "",
        tuple(tuple(rank) for _, rank in sorted(replica.ranks.items())),
        pages,
        load.running if load else 0,
        load.waiting if load else 0,
        stats.prompt_tokens if stats else 0,
        stats.output_tokens if stats else 0,
        replica.reason,
        tuple(report.phases.items()) if report else (),
    )


async def _told(asked: Coroutine[Any, Any, tuple[Any, ...]]) -> tuple[str, Any]:
    """An answer as primitives, so that an error that an operator made is none of the actor's."""
    try:
        return "ok", tuple(await asked)
    except (UnknownReplica, UnknownRequest, NotNow, ReplicaLost) as error:
        return type(error).__name__, str(error)


def _end_for_good() -> None:
    """Ends the controller's process; an end of any other kind would be followed by a restart."""
    ray.kill(ray_.get_runtime_context().current_actor)


def _start_over(loop: asyncio.Task[None]) -> None:
    """Ends the controller's process when its loop has failed: Ray starts another, which learns all from the replicas."""
    if not loop.cancelled() and loop.exception() is not None:
        log.critical("the controller's loop has failed", exc_info=loop.exception())
        os._exit(1)
