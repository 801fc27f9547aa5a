"""Carries out what `rebalancing` says: asks replicas what they have, tells them what goes where, and keeps the books of it.

Between two rounds of all policies there are quicker ones for replicas that drain or only prefill. A migration is one call to the leader
of its source, which answers when it is over; whatever comes of it, the request goes on somewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from ...worker.config import ClusterOptions
from ...worker.protocol import LiveRequest, MigrationResult, Outcome, ReplicaLost
from ..admin import DrainStatus, MoveRow, NotNow, UnknownReplica, UnknownRequest
from ..controller import DRAINED, Controller, ReplicaState
from ..global_scheduler import GlobalScheduler
from ..messages import Route
from ..mobility import QUICK_ROUND_S, ROUND_S, Mobility, by_hand
from ..rebalancing import Move, Need, Place, Relief, Role, relief
from ..routing import Router
from .calls import LifeName, answer
from .lives import Life

log = logging.getLogger(__name__)

LOOK_TIMEOUT_S = 2.0
MIGRATION_TIMEOUT_S = 610.0  # above the replica's own
POLL_S = 0.05  # while a drain is waited for


class Movers:
    """The migrations that the controller begins.

    Args:
        options: of the cluster.
        table: who is ready, and who drains.
        router: loads and places.
        scheduler: where requests are.
        lives: the actors of the lives that go on.
    """

    def __init__(
        self, options: ClusterOptions, table: Controller, router: Router, scheduler: GlobalScheduler, lives: Mapping[LifeName, Life]
    ) -> None:
        self.books = Mobility(options.prefill_replicas)
        self._rebalances = options.rebalance
        self._table = table
        self._router = router
        self._scheduler = scheduler
        self._lives = lives
        self._tasks: set[asyncio.Task[MoveRow]] = set()
        self._reliefs: dict[Route, Relief] = {}  # as they were told
        self._round_s = 0.0  # when the next full one is due

    async def run(self) -> None:
        """Rounds, for ever."""
        while True:
            self.steer()
            now_s = time.monotonic()
            full = now_s >= self._round_s
            if full:
                self._round_s = now_s + ROUND_S
                self._relieve(self.places())
            await self._round(full and self._rebalances)
            await asyncio.sleep(QUICK_ROUND_S)

    def stop(self) -> None:
        """Waits for no answer any more."""
        for task in self._tasks:
            task.cancel()

    def steer(self) -> None:
        """Tells the router what takes nothing new."""
        decode = [r.replica_id for r in self._table.replicas() if self.books.role(r.replica_id) is Role.DECODE]
        self._router.steer(self._table.draining(), decode)

    # --- what operators ask for ---

    async def migrate(self, request_id: str, replica_id: str) -> MoveRow:
        """As `AdminPort.migrate`; so below."""
        places = {p.route.replica_id: p for p in self.places()}
        if self._table.replica(replica_id) is None:
            raise UnknownReplica(replica_id)
        if replica_id not in places:
            raise NotNow(f"{replica_id} is not ready")
        if request_id in self.books.under_way:
            raise NotNow(f"{request_id} is on its way to {self.books.under_way[request_id].destination.replica_id} already")
        source, request = await self._find(request_id, places)
        if source.route.replica_id == replica_id:
            raise NotNow(f"{request_id} is at {replica_id} already")
        return await self._begin(by_hand(request, source, places[replica_id]))

    async def drain(self, replica_id: str, undo: bool, wait_s: float) -> DrainStatus:
        """Tells the replica, too, so that it takes no migrations, and a later controller knows."""
        replica = self._table.replica(replica_id)
        if replica is None:
            raise UnknownReplica(replica_id)
        if not self._table.drain(replica_id, not undo):
            raise NotNow(f"{replica_id} is {replica.state.value}")
        self.books.drain(replica_id, not undo)
        self.steer()
        life = self._lives.get(LifeName(replica_id, replica.epoch))
        if life is not None:
            await answer(life.leader.drain.remote(not undo))
        deadline_s = time.monotonic() + wait_s
        while not undo and replica.shown != DRAINED and replica.draining and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        load, moved = replica.load, self.books.drained(replica_id)
        left = load.running + load.waiting if load else 0
        return DrainStatus(replica_id, replica.shown, left, moved.moves, moved.pages, moved.bytes, moved.longest_ms)

    async def rebalance(self) -> list[MoveRow]:
        """A full round, whether or not they come by themselves."""
        return await asyncio.gather(*await self._round(True))

    async def _find(self, request_id: str, places: Mapping[str, Place]) -> tuple[Place, LiveRequest]:
        known = self._scheduler.where(request_id)
        if known is None:
            queued = any(request.request_id == request_id for request in self._scheduler.waiting())
            raise NotNow(f"{request_id} waits for a replica") if queued else UnknownRequest(request_id)
        source = places.get(known[1].replica_id)
        found = [] if source is None else [r for r in await self._requests(source.route) if r.request_id == request_id]
        if source is None or not found:
            raise UnknownRequest(request_id)
        return source, found[0]

    # --- rounds ---

    def places(self) -> list[Place]:
        ready = {(r.replica_id, r.epoch) for r in self._table.serving() if r.state is ReplicaState.READY}
        shots = [shot for shot in self._router.snapshots() if (shot.replica_id, shot.epoch) in ready]
        return self.books.places(shots, self._table.draining(), time.monotonic())

    async def _round(self, leisure: bool) -> list[asyncio.Task[MoveRow]]:
        """Begins what is to be begun now; the moves."""
        places, need = self.places(), self._need()
        routes = self.books.looked_at(places, need, leisure)
        if not routes:
            return []
        found = dict(zip(routes, await asyncio.gather(*(self._requests(route) for route in routes)), strict=True))
        moves = self.books.plan(self.places(), found, need, leisure, time.monotonic())
        return [self._begin(move) for move in moves]

    def _need(self) -> Need | None:
        request = self._scheduler.stuck()
        if request is None:
            return None
        page_size = min((shot.info.page_size for shot in self._router.snapshots()), default=1)
        return Need(-(-request.prompt_tokens // page_size) + request.sequences, request.longest_tokens)

    async def _requests(self, route: Route) -> list[LiveRequest]:
        """What a replica holds; nothing when it does not say."""
        life = self._lives.get(LifeName(*route))
        try:
            return [LiveRequest(*row) for row in await answer(life.leader.requests.remote(), LOOK_TIMEOUT_S)] if life else []
        except ReplicaLost:
            return []

    def _relieve(self, places: list[Place]) -> None:
        """Tells the replicas under pressure where victims may go, and again and again, since each failure makes them forget it."""
        for route, where in relief(places).items():
            life = self._lives.get(LifeName(*route))
            if life is not None and where is not None:
                destination = LifeName(*where.destination)
                life.leader.relieve.remote(str(destination), *destination, where.pages)
                self._reliefs[route] = where
            elif life is not None and self._reliefs.pop(route, None) is not None:
                life.leader.relieve.remote("", "", 0, 0)

    # --- moves ---

    def _begin(self, move: Move) -> asyncio.Task[MoveRow]:
        self.books.begin(move)
        attempt, _ = self._scheduler.where(move.request_id) or (-1, None)
        self._router.expect(move, attempt, time.monotonic())
        task = asyncio.create_task(self._carry_out(move))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _carry_out(self, move: Move) -> MoveRow:
        """One migration, to its end."""
        life, destination = self._lives.get(LifeName(*move.source)), LifeName(*move.destination)
        outcome = MigrationResult(Outcome.LOST, reason=f"{move.source.replica_id} is gone")
        try:
            if life is not None:
                call = life.leader.migrate.remote(move.request_id, str(destination), *destination)
                outcome = MigrationResult(*await answer(call, MIGRATION_TIMEOUT_S))
        except ReplicaLost as error:
            outcome = MigrationResult(Outcome.LOST, reason=str(error))
        finally:
            row = self.books.ended(move, outcome, time.monotonic())
            self._router.forget(move.request_id)
        why_not = f", {row.reason}" * bool(row.reason)
        log.info("%s: %s -> %s (%s): %s%s", row.request, row.source, row.destination, row.cause, row.outcome, why_not)
        return row
