"""The client over the real controller and real replicas, all as plain objects in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from paged_memory import expected_output, hash_engine

from quire.cluster import remote_client
from quire.cluster.controller import Controller, ReplicaState, Report
from quire.cluster.messages import Route
from quire.cluster.remote_client import RemoteEngineClient, Serving
from quire.cluster.stream import Owner
from quire.worker.actor import ReplicaActor, raise_reply
from quire.worker.config import EngineOptions
from quire.worker.protocol import BadRequest, EngineStats, GenerateRequest, ModelInfo, Overloaded, ReplicaLost, SamplingParams

WAIT_S = 30.0


def request(name: str, **params: Any) -> GenerateRequest:
    return GenerateRequest(name, ((1, 2, 3),), SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "seed": 1} | params)))


class Town:
    """A controller and its replicas, and what goes wrong with them."""

    def __init__(self) -> None:
        self.controller = Controller()
        self.actors: dict[Owner, ReplicaActor] = {}
        self.engines: dict[Owner, Any] = {}
        self.away = False  # the controller does not answer
        self.routes: list[Route] = []  # said instead of the controller's, while there are any
        self.renewed: list[str] = []
        self.taken = asyncio.Event()  # a replica has taken a request
        self.answers = asyncio.Event()  # and may say so
        self.answers.set()

    async def add(self, replica_id: str, **engine: Any) -> Owner:
        owner = Owner(replica_id, self.controller.begin(replica_id, 1))
        made = self.engines[owner] = hash_engine(**({"pages": 64} | engine))
        actor = self.actors[owner] = ReplicaActor(*owner, EngineOptions(), b"key", build=lambda options, key, progress: made, die=lambda code: None)
        while (raw := await actor.report())["info"] is None:  # noqa: ASYNC110 (it is built by another thread)
            await asyncio.sleep(0.005)
        self.controller.reported(Report(**{**raw, "info": ModelInfo(*raw["info"]), "stats": EngineStats(*raw["stats"])}))
        return owner

    # the controller's port

    async def serving(self) -> list[Serving]:
        if self.away:
            raise ReplicaLost("the controller is away")
        ready = [r for r in self.controller.replicas() if r.state is ReplicaState.READY]
        return [Serving(r.replica_id, r.epoch, r.report.info) for r in ready if r.report and r.report.info]

    async def admit(self, sequences: int) -> Route:
        return self.routes.pop(0) if self.routes else self.controller.admit(sequences)

    def port(self, owner: Owner) -> Port:
        return Port(self, owner)


class Port:
    """A replica's port without Ray."""

    def __init__(self, town: Town, owner: Owner) -> None:
        self._town = town
        self._actor = town.actors[owner]
        self._epoch = owner.epoch

    def frames(self, connection: str) -> AsyncIterator[list[bytes]]:
        return self._actor.frames(connection)

    async def submit(self, connection: str, data: bytes) -> None:
        reply = await self._actor.submit(connection, self._epoch, data)
        self._town.taken.set()
        await self._town.answers.wait()
        raise_reply(reply)

    def abort(self, request_id: str, choice: int | None) -> None:
        self._town.tasks = asyncio.ensure_future(self._actor.abort(self._epoch, request_id, choice))

    def renew(self, connection: str) -> None:
        self._town.renewed.append(connection)


@asynccontextmanager
async def following(town: Town) -> AsyncIterator[RemoteEngineClient]:
    client = RemoteEngineClient(town, town.port, time.monotonic)
    client.start()
    try:
        await client.ready(WAIT_S)
        yield client
    finally:
        await client.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "FOLLOW_S", 0.01)
    monkeypatch.setattr(remote_client, "RENEW_S", 0.02)
    monkeypatch.setattr(remote_client, "CONNECT_TIMEOUT_S", 0.5)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


async def text(stream: Any) -> list[int]:
    return [t async for o in stream for t in o.tokens]


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 (other threads make it true)
        await asyncio.sleep(0.005)


WANT = expected_output([1, 2, 3], 1, 5, ignore_eos=True)


def test_requests_run_and_load_is_seen() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        async with following(town) as client:
            streams = [await client.submit(request(f"r{k}")) for k in range(4)]
            assert [await text(s) for s in streams] == [WANT] * 4
            assert (await client.info()).name == "hash"
            assert client.stats().keys() == {"a"}
            assert client.silent_s() < WAIT_S
            await until(lambda: len(set(town.renewed)) == 1)

    run(scenario)


def test_refusals_reach_the_caller_as_they_are() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a", max_running=1, max_waiting=1)
        async with following(town) as client:
            with pytest.raises(BadRequest, match="max_tokens"):
                await client.submit(request("a", max_tokens=10**9))
            answers = await asyncio.gather(*(client.submit(request(f"o{k}", max_tokens=None)) for k in range(4)), return_exceptions=True)
            assert [type(a) for a in answers].count(Overloaded) == 2

    run(scenario)


def test_a_stale_route_is_taken_once_more() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a")
        stale = Route("a", owner.epoch - 1)
        async with following(town) as client:
            town.routes = [stale]
            assert await text(await client.submit(request("a"))) == WANT
            town.routes = [stale, stale]
            with pytest.raises(ReplicaLost, match="cannot be reached"):
                await client.submit(request("b"))

    run(scenario)


def test_streams_go_on_while_the_controller_is_away() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=60))
            town.away = True
            assert len(await text(stream)) == 60
            assert (await client.info()).name == "hash"

    run(scenario)


def test_a_dead_engine_is_reported_to_every_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a", pages=2000)
        monkeypatch.setattr("quire.worker.actor.LAST_WORDS_S", 0.0)
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=None))
            assert (await anext(stream)).tokens
            monkeypatch.setattr(town.engines[owner].scheduler, "plan", lambda: 1 / 0)
            town.controller.died("a", owner.epoch, "dead")
            with pytest.raises(ReplicaLost):
                await text(stream)
            with pytest.raises(ReplicaLost, match="no replica is ready"):
                await client.submit(request("b"))

    run(scenario)


def test_a_new_life_of_a_replica_is_connected_to() -> None:
    async def scenario() -> None:
        town = Town()
        old = await town.add("a")
        async with following(town) as client:
            assert await text(await client.submit(request("a"))) == WANT
            town.controller.died("a", old.epoch, "killed")
            new = await town.add("a")
            assert new.epoch > old.epoch
            stream = await client.submit(request("b"))
            assert stream.owner == new
            assert await text(stream) == WANT

    run(scenario)


def test_a_client_that_closes_leaves_nothing_running() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a", pages=2000)
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=None))
            await anext(stream)
        await until(lambda: town.engines[owner].idle())

    run(scenario)


def test_an_abort_and_a_caller_that_gives_up_reach_the_replica() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a", pages=2000, max_running=4)
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=None))
            await anext(stream)
            await stream.abort()
            await until(lambda: town.engines[owner].idle())
            town.taken.clear()
            town.answers.clear()
            submitting = asyncio.create_task(client.submit(request("b", max_tokens=None)))
            await town.taken.wait()
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submitting
            town.answers.set()
            assert await text(await client.submit(request("c"))) == WANT
            await until(lambda: town.engines[owner].idle())

    run(scenario)
