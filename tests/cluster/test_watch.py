"""The watch over one life, with actors that answer as they are told: what it feeds, what it survives, what ends it. No Ray runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from quire.cluster import polling
from quire.cluster.controller import Controller, Rank, ReplicaState
from quire.cluster.ray_gateway import watch
from quire.cluster.ray_gateway.calls import LifeName
from quire.cluster.ray_gateway.lives import Life
from quire.cluster.ray_gateway.watch import Watch
from quire.cluster.routing import Router
from quire.worker.protocol import EventFrame, ModelInfo, ReplicaLoad, ReplicaLost, pack_events

INFO = ModelInfo("m", "/m", 128, 64, (2,), 0)
LOAD = ReplicaLoad(1, 0, 8, 4, 0, 4, 0, 0, 0, 0, 0.0, 0.0, 1)
NAME = LifeName("replica-0", 1000)
WAIT_S = 120.0

Reply = Callable[..., Awaitable[Any]]


class Method:
    """`actor.method`, whose `remote` answers with what `reply` returns or raises."""

    def __init__(self, reply: Reply) -> None:
        self.remote = reply


class Actor:
    """A leader or a rank: by default ready, and with one event frame after another."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.fields: dict[str, Any] = {"failure": None, "info": tuple(INFO)}
        self.asked: list[int | None] = []
        self.fault: Exception | None = None  # of `report`
        self.event_fault: Exception | None = None
        self.hold = asyncio.Event()  # cleared: `events` does not answer
        self.hold.set()
        self.report, self.events = Method(self._report), Method(self._events)

    async def _report(self) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        whole = {"replica_id": NAME.replica_id, "epoch": NAME.epoch, "pid": 7 + self.rank, "node": "n", "rank": self.rank}
        return {**whole, "loaded": 0, "to_load": 0, "phases": {}, "stats": None, "draining": False, **self.fields}

    async def _events(self, after: int | None, wait_s: float) -> bytes:
        self.asked.append(after)
        await self.hold.wait()
        if self.event_fault is not None:
            raise self.event_fault
        start = after or 0
        frame = EventFrame(NAME.replica_id, NAME.epoch, start, start + 1, after is None, (), (), (), (), {}, LOAD)
        return pack_events(frame)


class Scene:
    """A life under watch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> None:
        for name, seconds in {
            "START_POLL_S": 0.001,
            "EVENT_WAIT_S": 0.01,
            "CALL_TIMEOUT_S": 0.01,
            "RANK_POLL_S": 0.001,
        }.items():
            monkeypatch.setattr(watch, name, seconds)
        monkeypatch.setattr(polling, "MIN_POLL_S", 0.001)
        self.table = Controller(1, 100.0)
        self.table.adopt(*NAME, 0.0)
        self.router = Router("least_loaded")
        self.frames: list[EventFrame] = []
        self.leader = Actor()
        self.ranks = {rank: Actor(rank) for rank in range(1, ranks)}
        self.watch = Watch(self.table, self.router, self._take)

    def _take(self, frame: EventFrame) -> None:
        self.router.events(frame, 0.0)
        self.frames.append(frame)

    @property
    def state(self) -> ReplicaState:
        return self.table.replicas()[0].state

    @property
    def routed(self) -> list[str]:
        return [snapshot.replica_id for snapshot in self.router.snapshots()]

    def play(self, scenario: Callable[[asyncio.Task[None]], Awaitable[None]]) -> None:
        async def whole() -> None:
            following = asyncio.create_task(self.watch.follow(Life(NAME, self.leader, dict(self.ranks))))
            await scenario(following)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

        asyncio.run(asyncio.wait_for(whole(), WAIT_S))


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 (other tasks make it true)
        await asyncio.sleep(0.001)


def test_a_life_becomes_ready_and_its_frames_are_asked_for_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    scene.leader.fields["info"] = None

    async def scenario(_: asyncio.Task[None]) -> None:
        await until(lambda: scene.table.replicas()[0].report)
        assert (scene.state, scene.routed) == (ReplicaState.STARTING, [])
        scene.leader.fields["info"] = tuple(INFO)
        await until(lambda: len(scene.frames) >= 3)
        assert (scene.state, scene.routed) == (ReplicaState.READY, ["replica-0"])
        assert scene.leader.asked[:3] == [None, 1, 2]
        assert scene.table.replicas()[0].load == LOAD

    scene.play(scenario)


def test_a_life_of_which_an_operators_question_has_told_that_it_is_ready_is_followed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)
    report = watch.report_of(asyncio.run(scene.leader._report()))
    assert scene.table.reported(report, 0.0)

    async def scenario(_: asyncio.Task[None]) -> None:
        await until(lambda: len(scene.frames) >= 3)
        assert scene.routed == ["replica-0"]

    scene.play(scenario)



def test_a_dead_leader_ends_it_and_so_does_a_dead_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, why in ((0, "the process has died"), (1, "the process of rank 1 has died")):
        scene = Scene(monkeypatch, ranks=2)

        async def scenario(following: asyncio.Task[None], scene: Scene = scene, rank: int = rank, why: str = why) -> None:
            await until(lambda: len(scene.frames) >= 1 and len(scene.table.replicas()[0].ranks) == 2)
            assert scene.table.replicas()[0].ranks[1] == Rank(1, 8, "n")
            actor = scene.ranks[1] if rank else scene.leader
            actor.fault = actor.event_fault = ActorDiedError()
            with pytest.raises(ReplicaLost, match=why):
                await following

        scene.play(scenario)


def test_a_rank_that_cannot_be_reached_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, ranks=2)
    scene.ranks[1].fault = ActorUnavailableError("not now", None)

    async def scenario(following: asyncio.Task[None]) -> None:
        await until(lambda: len(scene.frames) >= 2)
        assert 1 not in scene.table.replicas()[0].ranks
        scene.ranks[1].fault = None
        await until(lambda: 1 in scene.table.replicas()[0].ranks)
        assert not following.done()

    scene.play(scenario)


def test_its_last_words_are_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)

    async def scenario(following: asyncio.Task[None]) -> None:
        await until(lambda: scene.frames)
        scene.leader.fields["failure"] = "the engine died: out of memory"
        scene.leader.event_fault = ActorUnavailableError("not now", None)
        with pytest.raises(ReplicaLost, match="out of memory"):
            await following
        assert (scene.state, scene.table.replicas()[0].reason) == (ReplicaState.DEAD, "the engine died: out of memory")

    scene.play(scenario)


def test_a_rank_that_cannot_load_is_final_at_the_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, ranks=2)
    scene.leader.fields["info"] = None
    scene.ranks[1].fields["failure"] = "no such tensor"

    async def scenario(following: asyncio.Task[None]) -> None:
        with pytest.raises(ReplicaLost, match="rank 1: no such tensor"):
            await following
        assert scene.table.hopeless() == "replica-0: rank 1: no such tensor"

    scene.play(scenario)


def test_a_long_step_is_waited_for_while_the_replica_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch)

    async def scenario(following: asyncio.Task[None]) -> None:
        await until(lambda: scene.frames)
        scene.leader.hold.clear()
        await until(lambda: len(scene.leader.asked) > len(scene.frames))
        heard_s, asked = scene.table.replicas()[0].heard_s, len(scene.leader.asked)
        await until(lambda: scene.table.replicas()[0].heard_s > heard_s + 0.03)
        assert len(scene.leader.asked) == asked  # one poll at a time
        assert scene.routed == ["replica-0"]
        scene.leader.hold.set()
        frames = len(scene.frames)
        await until(lambda: len(scene.frames) > frames)
        assert not following.done()

    scene.play(scenario)


def test_who_does_not_even_report_takes_no_requests_until_it_does_and_the_silence_is_the_tables_to_judge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch)

    async def scenario(following: asyncio.Task[None]) -> None:
        await until(lambda: scene.routed)
        scene.leader.event_fault = scene.leader.fault = ActorUnavailableError("not now", None)
        await until(lambda: not scene.routed)
        assert not following.done()
        scene.leader.event_fault = scene.leader.fault = None
        await until(lambda: scene.routed)
        asked = len(scene.leader.asked)
        await until(lambda: len(scene.leader.asked) > asked)
        assert None in scene.leader.asked[1:]  # forgotten meanwhile, so a dump was asked for

    scene.play(scenario)
