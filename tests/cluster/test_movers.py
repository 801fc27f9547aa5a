"""What the controller asks of replicas when requests are to move, with leaders that only remember it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from quire.cluster.admin import MoveRow, NotNow, UnknownReplica, UnknownRequest
from quire.cluster.controller import Controller, Report
from quire.cluster.global_scheduler import GlobalScheduler, QueueLimits
from quire.cluster.messages import AdmitRequest
from quire.cluster.ray_gateway.calls import LifeName
from quire.cluster.ray_gateway.lives import Life
from quire.cluster.ray_gateway.movers import Movers
from quire.cluster.routing import Router
from quire.cluster.tenants import TenantTable
from quire.worker.config import ClusterOptions
from quire.worker.protocol import EventFrame, LiveRequest, ModelInfo, ReplicaLoad

INFO = ModelInfo("m", "", 1000, 9, (), 0, page_size=10, pool_tokens=1000, max_running=16)
HALF = LiveRequest("r", "", 0, "running", 1, 290, 0, 29)


@dataclass
class Leader:
    """Answers as `ReplicaActor` does, and says how the next migration ends."""

    live: list[LiveRequest] = field(default_factory=list)
    outcome: tuple[Any, ...] = ("moved", 30, 3000, 12.5, "")
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            self.told.append((name, *args))
            future = asyncio.get_running_loop().create_future()
            future.set_result({"requests": [tuple(r) for r in self.live], "migrate": self.outcome}.get(name))
            return future

        return SimpleNamespace(remote=remote)

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.told if call[0] == name]


class Cluster:
    """Two replicas that are ready, of which the first holds so many pages."""

    def __init__(self, active: int = 80, **options: Any) -> None:
        self.table = Controller(2, 60.0)
        self.router = Router("cost")
        self.scheduler = GlobalScheduler(self.router, TenantTable(()), QueueLimits(100, 10_000), "fair")
        self.leaders = [Leader([HALF]), Leader()]
        lives = {LifeName(f"replica-{i}", 1): Life(LifeName(f"replica-{i}", 1), leader) for i, leader in enumerate(self.leaders)}
        self.movers = Movers(ClusterOptions(replicas=2, **options), self.table, self.router, self.scheduler, lives)
        for i, pages in enumerate((active, 0)):
            name = f"replica-{i}"
            self.table.begin(name, 1, 0.0)
            self.table.reported(Report(name, 1, 1, "n", 0, 0, {}, None, INFO, None), 0.0)
            self.router.add(name, 1, INFO)
            load = ReplicaLoad(int(pages > 0), 0, 100, 100 - pages, 0, pages, 0, 0, 0, 0, 0.0, 0.0, 1)
            started = (HALF,) if i == 0 else ()
            self.table.heard(name, 1, 0.0, load)
            self.scheduler.events(EventFrame(name, 1, 0, 1, True, (), (), started, (), {}, load), 0.0)


def play(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10.0))


def test_an_operator_moves_a_request_and_hears_what_came_of_it() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        row = await cluster.movers.migrate("r", "replica-1")
        assert row == MoveRow("r", "replica-0", "replica-1", "operator", "moved", 30, 3000, 12.5, "")
        assert cluster.leaders[0].asked("migrate") == [("r", "replica-1@1", "replica-1", 1)]
        assert cluster.movers.books.counts() == {("operator", "moved"): 1}
        assert len(cluster.router._ledger) == 0

    play(scenario)


@pytest.mark.parametrize(
    ("request_id", "to", "error"),
    [
        ("r", "replica-9", UnknownReplica),
        ("ghost", "replica-1", UnknownRequest),
        ("queued", "replica-1", NotNow),
        ("r", "replica-0", NotNow),
    ],
)
def test_what_an_operator_cannot_move(request_id: str, to: str, error: type[Exception]) -> None:
    async def scenario() -> None:
        cluster = Cluster()
        cluster.scheduler.offer(AdmitRequest("queued", 0, "", 0, 0.0, None, 1, 10, 10, 20), 0.0)
        with pytest.raises(error):
            await cluster.movers.migrate(request_id, to)
        assert cluster.leaders[0].asked("migrate") == []

    play(scenario)


def test_a_round_moves_what_narrows_the_gap_and_books_it_until_it_is_over() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        (row,) = await cluster.movers.rebalance()
        assert (row.request, row.cause, row.outcome) == ("r", "fill", "moved")
        assert await cluster.movers.rebalance() == []  # it rests

    play(scenario)


def test_a_drain_closes_the_replica_tells_it_and_moves_what_it_has() -> None:
    async def scenario() -> None:
        cluster = Cluster(rebalance=False)
        with pytest.raises(UnknownReplica):
            await cluster.movers.drain("replica-9", False, 0.0)
        rounds = asyncio.create_task(cluster.movers.run())
        status = await cluster.movers.drain("replica-0", False, 0.0)
        assert (status.state, status.requests) == ("draining", 1)
        assert cluster.leaders[0].asked("drain") == [(True,)]
        cluster.scheduler.offer(AdmitRequest("new", 0, "", 0, 0.0, None, 1, 10, 10, 20), 0.0)
        (decision,) = cluster.scheduler.dispatch(0.0)
        assert decision.outcome == ("replica-1", 1)
        while not cluster.leaders[0].asked("migrate"):  # noqa: ASYNC110 (it says it in no other way)
            await asyncio.sleep(0.01)
        load = ReplicaLoad(0, 0, 100, 100, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 2)
        cluster.table.heard("replica-0", 1, 0.0, load)
        status = await cluster.movers.drain("replica-0", False, 5.0)
        assert status == ("replica-0", "drained", 0, 1, 30, 3000, 12.5)
        assert (await cluster.movers.drain("replica-0", True, 0.0)).state == "ready"
        rounds.cancel()

    play(scenario)


def test_who_is_short_of_pages_is_told_where_victims_may_go_and_when_no_longer() -> None:
    async def scenario() -> None:
        cluster = Cluster(active=95, rebalance=False)
        cluster.movers._relieve(cluster.movers.places())
        assert cluster.leaders[0].asked("relieve") == [("replica-1@1", "replica-1", 1, 90)]
        load = ReplicaLoad(0, 0, 100, 100, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 2)
        cluster.scheduler.events(EventFrame("replica-0", 1, 1, 2, False, (), (), (), (), {}, load), 0.0)
        for _ in range(2):
            cluster.movers._relieve(cluster.movers.places())
        assert cluster.leaders[0].asked("relieve")[1:] == [("", "", 0, 0)]
        assert cluster.leaders[1].asked("relieve") == []

    play(scenario)
