"""The replica's actor as a plain object, with a real engine: frames, refusals as primitives, a lost reader, a death."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from paged_memory import expected_output, hash_engine

from quire.worker.actor import ReplicaActor, raise_reply, reply_to
from quire.worker.config import EngineOptions
from quire.worker.migration_wire import Committed, Envelope, Format, Offer, Peer, pack_message
from quire.worker.outbox import Outbox, ReaderGivenUp
from quire.worker.protocol import (
    BadRequest,
    DeadlineExceeded,
    EngineStats,
    GenerateRequest,
    Overloaded,
    ReplicaLost,
    SamplingParams,
    SequenceOutput,
    unpack_events,
    unpack_frame,
)
from quire.worker.snapshot import SequenceSnapshot

WAIT_S = 120.0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def request(name: str, **params: Any) -> GenerateRequest:
    return GenerateRequest(name, ((1, 2, 3),), SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "seed": 1} | params)))


def endless(name: str) -> GenerateRequest:
    return request(name, max_tokens=None)


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 (other threads make it true)
        await asyncio.sleep(0.005)


async def report_with(actor: ReplicaActor, true: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    report = await actor.report()
    while not true(report):
        await asyncio.sleep(0.005)
        report = await actor.report()
    return report


async def started(engine: Any = None, die: Callable[[int], None] = lambda code: None) -> ReplicaActor:
    made = engine or hash_engine(pages=64, max_waiting=2, max_running=2)
    actor = ReplicaActor("r0", 3, EngineOptions(), b"key", build=lambda options, key, progress, host: made, die=die)
    await report_with(actor, lambda report: report["info"])
    return actor


async def outputs_of(frames: AsyncIterator[list[bytes]], name: str) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    async for item in frames:
        outputs += [o for data in item for o in unpack_frame(data).outputs if o.request_id == name]
        if outputs and outputs[-1].finish:
            return outputs
    raise AssertionError("the frames ended before the request")


async def connected(actor: ReplicaActor, name: str) -> AsyncIterator[list[bytes]]:
    frames = actor.frames(name)
    assert unpack_frame((await anext(frames))[0]).number == 0
    return frames


def test_a_request_runs_and_its_tokens_come_as_frames() -> None:
    async def scenario() -> None:
        actor = await started()
        frames = await connected(actor, "i")
        assert await actor.submit("i", 3, request("a").to_wire()) == ("ok",)
        outputs = await outputs_of(frames, "a")
        assert [t for o in outputs for t in o.tokens] == expected_output([1, 2, 3], 1, 5, ignore_eos=True)
        report = await actor.report()
        assert (report["replica_id"], report["epoch"], report["failure"]) == ("r0", 3, None)
        assert EngineStats(*report["stats"]).pages_total == 64

    run(scenario)


def test_refusals_cross_as_primitives_and_come_back_as_what_they_were() -> None:
    for error in (BadRequest("n", "too many"), Overloaded("full", 2.5), DeadlineExceeded("late"), ReplicaLost("gone")):
        reply = reply_to(error)
        assert all(isinstance(part, str | float) for part in reply)
        with pytest.raises(type(error)) as caught:
            raise_reply(reply)
        assert str(caught.value) == str(error)
    raise_reply(reply_to(None))
    with pytest.raises(ReplicaLost, match="unknown reply"):
        raise_reply(("ok", 1))


def test_what_the_engine_refuses_is_refused_here() -> None:
    async def scenario() -> None:
        actor = await started()
        frames = await connected(actor, "i")
        assert (await actor.submit("i", 3, b"\xc1"))[0] == "bad_request"
        assert (await actor.submit("i", 3, request("b", max_tokens=10**9).to_wire()))[0] == "bad_request"
        assert (await actor.submit("i", 2, request("c").to_wire()))[0] == "lost"  # another life's request
        assert (await actor.submit("unknown", 3, request("d").to_wire()))[0] == "lost"
        # All at once: one after the other, the first could end before the last comes.
        replies = await asyncio.gather(*(actor.submit("i", 3, endless(f"e{k}").to_wire()) for k in range(8)))
        assert {reply[0] for reply in replies} == {"ok", "overloaded"}
        await frames.aclose()

    run(scenario)


def test_who_runs_does_not_wait_until_a_grammar_is_compiled() -> None:
    async def scenario() -> None:
        engine = hash_engine(pages=64)
        asked, compiled = threading.Event(), threading.Event()

        def prepare(grammar: str) -> None:
            asked.set()
            assert compiled.wait(WAIT_S)
            if grammar == "wrong":
                raise BadRequest("grammar", "no text satisfies it")

        engine.runner.prepare = prepare
        actor = await started(engine)
        frames = await connected(actor, "i")
        slow = asyncio.create_task(actor.submit("i", 3, request("slow", grammar="start: /a/").to_wire()))
        wrong = asyncio.create_task(actor.submit("i", 3, request("wrong", grammar="wrong").to_wire()))
        await until(asked.is_set)
        assert (await actor.submit("i", 3, request("huge", grammar="a" * 10**6).to_wire()))[:2] == ("bad_request", "grammar")
        assert await actor.submit("i", 3, request("b").to_wire()) == ("ok",)
        assert len(await outputs_of(frames, "b")) == 5
        assert not slow.done()
        compiled.set()
        assert await slow == ("ok",)
        assert await wrong == ("bad_request", "grammar", "no text satisfies it")

    run(scenario)


def test_what_another_replica_offers_is_compiled_before_the_engine_hears_of_it() -> None:
    async def scenario() -> None:
        engine = hash_engine(pages=64)
        actor = await started(engine)
        happened: list[object] = []
        assert actor._loop is not None
        actor._loop.heard = happened.append  # type: ignore[method-assign]

        def prepare(grammar: str) -> None:
            happened.append(grammar)
            raise BadRequest("grammar", "too complex")

        engine.runner.prepare = prepare
        snapshot = SequenceSnapshot("a", 0, 0, 0, (1, 2), 2, SamplingParams(grammar="start: /a/"), 10, 1, None, 0)
        offer = Offer(Format("m", 4, "f32"), 1, "", "i", "", None, 2, 0, (snapshot,), 0, 0)
        for message in (offer, Committed()):
            await actor.migration(pack_message(Envelope(Peer("r1@1", "r1", 1), "r1/1/x", message)))
        assert [type(one) for one in happened] == [str, bytes, bytes]

    run(scenario)


def test_nothing_is_taken_before_the_engine_is_there() -> None:
    async def scenario() -> None:
        go = threading.Event()

        def build(options: EngineOptions, hash_key: bytes, progress: Callable[[int, int], None], host: str) -> Any:
            progress(3, 7)
            go.wait(WAIT_S)
            return hash_engine()

        actor = ReplicaActor("r0", 3, EngineOptions(), b"key", build=build)
        report = await report_with(actor, lambda report: report["to_load"])
        assert (report["loaded"], report["to_load"]) == (3, 7)
        assert (await actor.submit("i", 3, request("a").to_wire()))[0] == "lost"
        with pytest.raises(ReplicaLost):
            await anext(actor.frames("i"))
        go.set()

    run(scenario)


def test_an_engine_that_cannot_be_built_says_why() -> None:
    async def scenario() -> None:
        def build(options: EngineOptions, hash_key: bytes, progress: Callable[[int, int], None], host: str) -> Any:
            raise ValueError("rope_type 'spiral' is not supported")

        actor = ReplicaActor("r0", 3, EngineOptions(), b"key", build=build)
        report = await report_with(actor, lambda report: report["failure"])
        assert report["failure"] == "rope_type 'spiral' is not supported"
        assert report["info"] is None

    run(scenario)


def test_a_reader_that_goes_away_takes_its_requests_along() -> None:
    async def scenario() -> None:
        engine = hash_engine(pages=64, max_running=2)
        actor = await started(engine)
        frames, others = await connected(actor, "i"), await connected(actor, "j")
        await actor.submit("i", 3, endless("a").to_wire())
        await actor.submit("j", 3, request("b").to_wire())
        await anext(frames)
        await frames.aclose()
        assert (await outputs_of(others, "b"))[-1].finish == "length"
        await until(lambda: engine.idle())
        assert await actor.renew("j")
        assert not await actor.renew("i")

    run(scenario)


def test_abort_ends_a_request_of_this_life_only() -> None:
    async def scenario() -> None:
        actor = await started(hash_engine(pages=512, max_running=2))
        frames = await connected(actor, "i")
        await actor.submit("i", 3, endless("a").to_wire())
        await actor.abort(2, "a", None)
        await actor.submit("i", 3, request("b").to_wire())
        seen = [o async for o in _until_finished(frames, "b")]
        assert not any(o.request_id == "a" and o.finish == "abort" for o in seen)
        await actor.abort(3, "a", None)
        assert (await outputs_of(frames, "a"))[-1].finish == "abort"

    run(scenario)


async def _until_finished(frames: AsyncIterator[list[bytes]], name: str) -> AsyncIterator[SequenceOutput]:
    async for item in frames:
        for data in item:
            for output in unpack_frame(data).outputs:
                yield output
                if output.request_id == name and output.finish:
                    return


def test_a_dead_engine_ends_its_frames_says_why_and_takes_the_process_along(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        codes: list[int] = []
        engine = hash_engine()
        actor = await started(engine, codes.append)
        frames = await connected(actor, "i")
        monkeypatch.setattr("quire.worker.actor.LAST_WORDS_S", 0.2)
        monkeypatch.setattr(engine.scheduler, "plan", lambda: 1 / 0)
        await actor.submit("i", 3, request("a").to_wire())
        with pytest.raises(ReplicaLost, match="ZeroDivisionError"):
            await outputs_of(frames, "a")
        assert "ZeroDivisionError" in (await actor.report())["failure"]
        assert (await actor.submit("i", 3, request("b").to_wire()))[0] == "lost"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                await until(lambda: codes)
        assert codes == [1]

    run(scenario)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_slow_reader_gets_several_frames_at_a_time() -> None:
    async def scenario() -> None:
        outbox = Outbox(asyncio.get_running_loop(), time.monotonic, lambda: None)
        thread = threading.Thread(target=lambda: [outbox.put(bytes([k])) for k in range(5)])
        thread.start()
        thread.join()
        assert await outbox.take(WAIT_S) == [bytes([k]) for k in range(5)]
        waiting = asyncio.create_task(outbox.take(WAIT_S))
        await asyncio.sleep(0)
        outbox.put(b"next")
        assert await waiting == [b"next"]
        with pytest.raises(TimeoutError):
            await outbox.take(0.01)

    run(scenario)


def test_a_reader_that_falls_too_far_behind_is_given_up_once() -> None:
    async def scenario() -> None:
        given_up: list[int] = []
        outbox = Outbox(asyncio.get_running_loop(), time.monotonic, lambda: given_up.append(1), max_bytes=10)
        outbox.put(b"12345")
        outbox.put(b"12345")
        assert not given_up
        outbox.put(b"1")
        outbox.put(b"1")
        assert given_up == [1]
        with pytest.raises(ReaderGivenUp, match="more than 10 bytes"):
            await outbox.take(WAIT_S)

    run(scenario)


def test_a_reader_that_does_not_renew_its_lease_is_given_up() -> None:
    async def scenario() -> None:
        given_up: list[int] = []
        clock = Clock()
        outbox = Outbox(asyncio.get_running_loop(), clock, lambda: given_up.append(1), lease_s=10)
        clock.now_s = 9
        outbox.renew()
        clock.now_s = 18
        outbox.put(b"1")
        assert not given_up
        clock.now_s = 20
        outbox.put(b"2")
        assert given_up == [1]
        with pytest.raises(ReaderGivenUp, match=r"not renewed for 11\.0 s"):
            await outbox.take(WAIT_S)

    run(scenario)


def test_events_come_as_soon_as_there_are_any_and_else_when_the_time_is_up() -> None:
    async def scenario() -> None:
        actor = await started()
        first = unpack_events(await actor.events(None, WAIT_S))
        assert (first.replica_id, first.epoch, first.dump, first.next) == ("r0", 3, True, 0)
        nothing = unpack_events(await actor.events(0, 0.01))
        assert (nothing.dump, nothing.next, nothing.started, nothing.load.pages_free) == (False, 0, (), 64)
        frames = await connected(actor, "i")
        waiting = asyncio.create_task(actor.events(0, WAIT_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        await actor.submit("i", 3, request("a").to_wire())
        news = unpack_events(await waiting)
        assert [r.request_id for r in news.started] == ["a"]
        await outputs_of(frames, "a")
        ended: list[tuple[str, int]] = []
        after = news.next
        while not ended:
            news = unpack_events(await actor.events(after, WAIT_S))
            ended, after = list(news.ended), news.next
        assert ended == [("a", 5)]
        assert news.served == {"": 5}

    run(scenario)


def test_operators_see_the_requests_and_the_pages() -> None:
    async def scenario() -> None:
        actor = await started(hash_engine(pages=512, max_running=2))
        assert await actor.requests() == []
        assert await actor.page_maps() == (b"f" * 512, b"")
        frames = await connected(actor, "i")
        await actor.submit("i", 3, endless("a").to_wire())
        while (rows := await actor.requests())[0][3] == "waiting":  # asked before the step that starts it
            pass
        ((name, _, _, state, sequences, prompt_tokens, _, pages),) = rows
        assert (name, state, sequences, prompt_tokens) == ("a", "running", 1, 3)
        assert pages >= 1
        assert b"a" in (await actor.page_maps())[0]
        await frames.aclose()

    run(scenario)


def test_an_engine_that_is_not_there_has_nothing_to_tell() -> None:
    async def scenario() -> None:
        go = threading.Event()

        def build(options: EngineOptions, hash_key: bytes, progress: Callable[[int, int], None], host: str) -> Any:
            go.wait(WAIT_S)
            return hash_engine()

        actor = ReplicaActor("r0", 3, EngineOptions(), b"key", build=build)
        for ask in (actor.events(None, 1.0), actor.requests(), actor.page_maps(), actor.decisions()):
            with pytest.raises(ReplicaLost, match="not ready"):
                await ask
        go.set()

    run(scenario)
