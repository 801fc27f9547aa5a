"""The client over real replicas, all as plain objects in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from paged_memory import expected_output, hash_engine

from quire.cluster import journal, remote_client
from quire.cluster.journal import Patience
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.remote_client import IngressOptions, RemoteEngineClient, Serving, ServingNow
from quire.cluster.succession import Owner
from quire.worker.actor import ReplicaActor, raise_reply
from quire.worker.config import EngineOptions
from quire.worker.page_hash import prefix_hashes
from quire.worker.protocol import (
    BadRequest,
    DeadlineExceeded,
    GenerateRequest,
    ModelInfo,
    Overloaded,
    ReplicaLost,
    RequestFailed,
    SamplingParams,
)

WAIT_S = 120.0
KEY = b"k" * 32


def request(name: str, **params: Any) -> GenerateRequest:
    return GenerateRequest(name, ((1, 2, 3),), SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "seed": 1} | params)))


class Town:
    """A controller's port and its replicas, and what goes wrong with them."""

    def __init__(self) -> None:
        self.ready: dict[str, Owner] = {}  # in the order in which requests go to them
        self.actors: dict[Owner, ReplicaActor] = {}
        self.engines: dict[Owner, Any] = {}
        self.away = False  # the controller does not answer
        self.asked: list[AdmitRequest] = []
        self.withdrawn: list[str] = []
        self.answers_to: list[Route | Exception | None] = []  # said instead of the controller's, while there are any
        self.renewed: list[str] = []
        self.asleep: ModelInfo | None = None  # what would be served, while no replica is to be
        self.taken = asyncio.Event()  # a replica has taken a request
        self.answers = asyncio.Event()  # and may say so
        self.answers.set()

    async def add(self, replica_id: str, epoch: int = 1, **engine: Any) -> Owner:
        owner = Owner(replica_id, epoch)
        made = self.engines[owner] = hash_engine(**({"pages": 64} | engine))
        actor = self.actors[owner] = ReplicaActor(*owner, EngineOptions(), KEY, build=lambda *_, **__: made, die=lambda code: None)
        while (await actor.report())["info"] is None:  # noqa: ASYNC110 (it is built by another thread)
            await asyncio.sleep(0.005)
        self.ready[replica_id] = owner
        return owner

    def kill(self, owner: Owner, steps: int, noticed: bool = True) -> None:
        """It will die in the step after so many more with something to compute; the controller may notice."""
        scheduler = self.engines[owner].scheduler
        plan, left = scheduler.plan, steps

        def dying() -> Any:
            nonlocal left
            planned = plan()
            left -= planned is not None
            if left >= 0:
                return planned
            if noticed:
                self.ready.pop(owner.replica_id, None)
            raise MemoryError("killed")

        scheduler.plan = dying

    # the controller's port

    async def serving(self) -> ServingNow:
        if self.away:
            raise ReplicaLost("the controller is away")
        return ServingNow(KEY, [Serving(*owner, self.engines[owner].info) for owner in self.ready.values()], self.asleep)

    async def admit(self, request: AdmitRequest) -> Route | None:
        self.asked.append(request)
        if self.away:
            raise ReplicaLost("the controller is away")
        if self.answers_to:
            said = self.answers_to.pop(0)
            if isinstance(said, Exception):
                raise said
            return said
        owners = sorted(self.ready.values(), key=lambda owner: owner.replica_id in request.avoid)
        if not owners:
            await asyncio.sleep(0.01)
            return None
        return Route(*owners[0])

    def withdraw(self, request_id: str) -> None:
        self.withdrawn.append(request_id)

    def port(self, owner: Owner) -> Port:
        return Port(self, owner)


class Port:
    """A replica's port without Ray."""

    def __init__(self, town: Town, owner: Owner) -> None:
        self._town = town
        self._actor = town.actors[owner]
        self._epoch = owner.epoch

    def frames(self, connection: str) -> AsyncGenerator[list[bytes], None]:
        return self._actor.frames(connection)

    async def submit(self, connection: str, data: bytes) -> None:
        reply = await self._actor.submit(connection, self._epoch, data)
        self._town.taken.set()
        await self._town.answers.wait()
        raise_reply(reply)

    def abort(self, request_id: str, attempt: int, choice: int | None) -> None:
        self._town.tasks = asyncio.ensure_future(self._actor.abort(self._epoch, request_id, choice, attempt))

    def renew(self, connection: str) -> None:
        self._town.renewed.append(connection)


@asynccontextmanager
async def following(town: Town, **patience: Any) -> AsyncIterator[RemoteEngineClient]:
    options = IngressOptions("ingress-0", patience=Patience(**patience))
    client = RemoteEngineClient(town, town.port, time.monotonic, options)
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
    monkeypatch.setattr(remote_client, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(journal, "LONGEST_DELAY_S", 0.02)
    monkeypatch.setattr("quire.worker.actor.LAST_WORDS_S", 0.0)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


async def text(stream: Any) -> list[int]:
    return [t async for o in stream for t in o.tokens]


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 (other threads make it true)
        await asyncio.sleep(0.005)


WANT = expected_output([1, 2, 3], 1, 5, ignore_eos=True)
LONG = expected_output([1, 2, 3], 1, 60, ignore_eos=True)


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
            assert client.recovery() == (0, 0, 0, 0.0)
            await until(lambda: len(set(town.renewed)) == 1)

    run(scenario)


def test_the_controller_is_told_what_it_needs_to_know() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        prompt = tuple(range(1, 10))
        async with following(town) as client:
            await text(await client.submit(GenerateRequest("a", (prompt,), SamplingParams(max_tokens=4, seed=1), tenant="t")))
            await text(await client.submit(GenerateRequest("b", (prompt,), SamplingParams(max_tokens=4, seed=1, prompt_logprobs=0))))
        assert town.asked[0]._replace(waited_s=0.0) == AdmitRequest(
            "a", 0, "t", 0, 0.0, None, 1, 9, 4, 13, prefix_hashes(KEY, "t", prompt, 4)
        )
        assert town.asked[1].hashes == ()  # it reads no cached page

    run(scenario)


def test_refusals_reach_the_reader_as_they_are() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        async with following(town) as client:
            with pytest.raises(BadRequest, match="max_tokens"):
                await client.submit(request("a", max_tokens=10**9))
            assert town.asked == []
            for error in (Overloaded("full", 3.0), DeadlineExceeded("late"), BadRequest("max_tokens", "never")):
                town.answers_to = [None, error]
                with pytest.raises(type(error)):
                    await text(await client.submit(request("b")))
        assert town.withdrawn == []

    run(scenario)


def test_a_full_replica_is_passed_over_and_in_the_end_the_refusal_is_told() -> None:
    async def scenario() -> None:
        town = Town()
        full = await town.add("a", max_running=1, max_waiting=0, pages=2000)
        async with following(town, refusals=3) as client:
            first = await client.submit(request("a", max_tokens=None))
            await anext(first)
            with pytest.raises(Overloaded):
                await text(await client.submit(request("b")))
            assert [r.attempt for r in town.asked[1:]] == [0, 1, 2, 3]
            await town.add("b")
            assert await text(await client.submit(request("c"))) == WANT
            assert not town.engines[full].idle()

    run(scenario)


def test_a_stale_route_is_asked_again() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a")
        stale = Route("a", owner.epoch - 1)
        async with following(town) as client:
            town.answers_to = [stale]
            assert await text(await client.submit(request("a"))) == WANT
            assert [r.attempt for r in town.asked] == [0, 1]

    run(scenario)


def test_streams_go_on_while_the_controller_is_away_and_others_wait_for_it() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=60))
            await anext(stream)
            town.away = True
            waiting = asyncio.create_task(text(await client.submit(request("b"))))
            await text(stream)
            await until(lambda: len(town.asked) > 3)
            assert {(r.request_id, r.attempt) for r in town.asked} == {("a", 0), ("b", 0)}
            town.away = False
            assert await waiting == WANT

    run(scenario)


def test_a_controller_that_stays_away_is_waited_for_only_so_long() -> None:
    async def scenario() -> None:
        town = Town()
        await town.add("a")
        async with following(town, controller_s=0.05) as client:
            town.away = True
            with pytest.raises(ReplicaLost, match="controller does not answer"):
                await text(await client.submit(request("a")))

    run(scenario)


def test_a_stream_goes_on_at_another_replica_as_if_nothing_had_happened() -> None:
    async def scenario() -> None:
        town = Town()
        first = await town.add("a")
        second = await town.add("b")
        async with following(town) as client:
            town.kill(first, steps=20)
            stream = await client.submit(request("a", max_tokens=60, n=2))
            tokens: dict[int, list[int]] = {0: [], 1: []}
            async for output in stream:
                assert output.index == len(tokens[output.choice])
                tokens[output.choice] += output.tokens
            assert tokens[0] == LONG
            assert len(tokens[1]) == 60
            assert stream.journal.owner == second
            lost, resumed, replayed, pause_s = client.recovery()
            assert (lost, resumed) == (1, 1)
            assert 3 <= replayed <= 3 + 2 * 20  # the prompt, and what two choices had delivered of 20 steps
            assert pause_s > 0
            await until(lambda: town.engines[second].idle())

    run(scenario)


def test_a_stream_waits_for_a_replica_to_come_back() -> None:
    async def scenario() -> None:
        town = Town()
        old = await town.add("a")
        async with following(town) as client:
            town.kill(old, steps=20)
            stream = await client.submit(request("a", max_tokens=60))
            await until(lambda: len(town.asked) > 3)
            new = await town.add("a", epoch=2)
            assert await text(stream) == LONG
            assert stream.journal.owner == new

    run(scenario)


def test_while_no_replica_is_to_be_requests_wait_and_nothing_is_amiss() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a")
        del town.ready["a"]
        town.asleep = town.engines[owner].info
        async with following(town) as client:
            await until(lambda: client.silent_s() == 0)
            assert await client.info() == town.asleep
            stream = await client.submit(request("a"))
            await until(lambda: len(town.asked) > 1)
            town.ready["a"], town.asleep = owner, None
            assert await text(stream) == WANT

    run(scenario)


def test_a_request_that_kills_every_replica_is_given_up() -> None:
    async def scenario() -> None:
        town = Town()
        owners = [await town.add(name) for name in "abcd"]
        async with following(town) as client:
            for owner in owners[:3]:
                town.kill(owner, steps=0, noticed=False)
            with pytest.raises(RequestFailed, match="3 replicas in a row"):
                await text(await client.submit(request("a")))
            assert town.withdrawn == ["a"]

    run(scenario)


def test_seeds_are_chosen_once_and_differ() -> None:
    async def scenario() -> None:
        town = Town()
        first = await town.add("a")
        await town.add("b")
        async with following(town) as client:
            town.kill(first, steps=20)
            tokens = await text(await client.submit(request("a", seed=None, max_tokens=60)))
            assert client.recovery().resumed == 1
            two = await text(await client.submit(request("b", seed=None, max_tokens=60)))
        async with following(town) as client:  # the same ingress once more, undisturbed
            assert await text(await client.submit(request("a", seed=None, max_tokens=60))) == tokens
            assert tokens != two

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


def test_a_reader_that_leaves_is_withdrawn_from_the_queue_and_aborted_on_the_replica() -> None:
    async def scenario() -> None:
        town = Town()
        owner = await town.add("a", pages=2000, max_running=4)
        async with following(town) as client:
            stream = await client.submit(request("a", max_tokens=None))
            await anext(stream)
            await stream.abort()
            await until(lambda: town.engines[owner].idle())
            del town.ready["a"]
            queued = await client.submit(request("b"))
            await queued.abort()
            assert town.withdrawn == ["b"]
            town.ready["a"] = owner
            town.taken.clear()
            town.answers.clear()
            submitting = await client.submit(request("c", max_tokens=None))
            await town.taken.wait()
            await submitting.abort()
            town.answers.set()
            assert await text(await client.submit(request("d"))) == WANT
            await until(lambda: town.engines[owner].idle())

    run(scenario)
