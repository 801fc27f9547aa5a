"""The stream table: what an ingress makes of frames that come twice, late, from the wrong owner, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from quire.cluster.stream import Owner, StreamTable, TableStream
from quire.worker.protocol import (
    EngineStats,
    FinishReason,
    Frame,
    GenerateRequest,
    ReplicaLost,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
    pack_frame,
)

ONE = Owner("replica-0", 1)
STATS = EngineStats(3, 1, 0, 10, 5, 2, 3, 0, 7, 8, 0, 0, 0, {"recompute": 1}, 0.5)


class Ingress:
    """A table with its abort calls and its clock in plain sight."""

    def __init__(self) -> None:
        self.aborted: list[tuple[Owner, str, int | None]] = []
        self.now_s = 100.0
        self.table = StreamTable(self._abort, lambda: self.now_s)
        self.table.connect(ONE)
        self.numbers: dict[Owner, int] = {}

    async def _abort(self, owner: Owner, request_id: str, choice: int | None) -> None:
        self.aborted.append((owner, request_id, choice))

    def open(self, request_id: str = "r", n: int = 1, prompts: int = 1) -> TableStream:
        return self.table.register(GenerateRequest(request_id, ((1, 2),) * prompts, SamplingParams(n=n)), ONE)

    def feed(self, *outputs: SequenceOutput, owner: Owner = ONE, number: int | None = None, stats: EngineStats | None = None) -> None:
        number = self.numbers.get(owner, 0) if number is None else number
        self.numbers[owner] = number + 1
        self.table.feed(pack_frame(Frame(owner.replica_id, owner.epoch, number, outputs, stats)))


def run(scenario: Callable[[Ingress], object]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scenario(Ingress()), 10)  # type: ignore[arg-type]

    asyncio.run(main())


async def collect(stream: TableStream) -> dict[int, list[int]]:
    """Tokens by choice; checks that every output goes on exactly where the last one of its choice ended."""
    tokens: dict[int, list[int]] = {}
    async for output in stream:
        have = tokens.setdefault(output.choice, [])
        assert output.index == len(have)
        have.extend(output.tokens)
    return tokens


def test_choices_are_kept_apart_and_the_stream_ends_with_the_last_of_them() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open(n=2)
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        ingress.feed(SequenceOutput("r", 0, 0, (5,)), SequenceOutput("r", 1, 0, (6,)))
        await asyncio.sleep(0)
        ingress.feed(SequenceOutput("r", 0, 1, (7,), FinishReason.LENGTH), SequenceOutput("other", 0, 0, (9,)))
        assert ingress.table.live() == 1
        ingress.feed(SequenceOutput("r", 1, 1, (8,), FinishReason.STOP))
        assert await reader == {0: [5, 7], 1: [6, 8]}
        assert ingress.table.live() == 0

    run(scenario)


def test_unread_outputs_are_merged_into_one_for_each_choice() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open()
        lps = [TokenLogprob(t, -0.5, ((t, -0.5),)) for t in (5, 6)]
        ingress.feed(SequenceOutput("r", 0, 0, (5,), cached_tokens=32, logprobs=(lps[0],), prompt_logprobs=(lps[1],)))
        ingress.feed(SequenceOutput("r", 0, 1, (6,), FinishReason.STOP, 6, logprobs=(lps[1],)))
        whole = await anext(stream)
        assert whole == SequenceOutput("r", 0, 0, (5, 6), FinishReason.STOP, 6, 32, tuple(lps), (lps[1],))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(scenario)


def test_repeated_frames_and_repeated_tokens_are_dropped() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open()
        ingress.feed(SequenceOutput("r", 0, 0, (5, 6)))
        ingress.feed(SequenceOutput("r", 0, 0, (5, 6)), number=0)  # the same frame again
        ingress.feed(SequenceOutput("r", 0, 0, (5, 6)))  # the same tokens in a new frame
        ingress.feed(SequenceOutput("r", 0, 1, (6, 7), FinishReason.LENGTH))  # half of it known
        ingress.feed(SequenceOutput("r", 0, 3, (8,), FinishReason.LENGTH))  # after the end
        assert await collect(stream) == {0: [5, 6, 7]}

    run(scenario)


def test_a_gap_in_the_tokens_fails_that_stream_alone() -> None:
    async def scenario(ingress: Ingress) -> None:
        broken, whole = ingress.open("a"), ingress.open("b")
        ingress.feed(SequenceOutput("a", 0, 0, (5,)), SequenceOutput("b", 0, 0, (5,)))
        ingress.feed(SequenceOutput("a", 0, 2, (7,)), SequenceOutput("b", 0, 1, (6,), FinishReason.LENGTH))
        assert (await anext(broken)).tokens == (5,)
        with pytest.raises(ReplicaLost, match="token 2 of choice 0 came where 1 was due"):
            await anext(broken)
        assert await collect(whole) == {0: [5, 6]}

    run(scenario)


def test_a_missing_frame_is_reported_to_the_caller() -> None:
    async def scenario(ingress: Ingress) -> None:
        ingress.feed()
        with pytest.raises(ReplicaLost, match="frame 2 came where 1 was due"):
            ingress.feed(number=2)

    run(scenario)


def test_only_the_owner_in_its_own_epoch_may_emit() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open()
        stale = Owner("replica-0", 0)
        ingress.table.connect(stale)
        ingress.feed(SequenceOutput("r", 0, 0, (66,)), owner=stale)
        ingress.feed(SequenceOutput("r", 0, 0, (66,)), owner=Owner("replica-9", 1))  # never connected
        ingress.feed(SequenceOutput("r", 0, 0, (5,), FinishReason.LENGTH))
        assert await collect(stream) == {0: [5]}

    run(scenario)


def test_a_lost_replica_wakes_its_readers_and_nobody_else() -> None:
    async def scenario(ingress: Ingress) -> None:
        two = Owner("replica-1", 4)
        ingress.table.connect(two)
        lost = ingress.open("a")
        kept = ingress.table.register(GenerateRequest("b", ((1,),)), two)
        reader = asyncio.create_task(anext(lost))
        await asyncio.sleep(0)
        ingress.table.drop(ONE, "replica-0 died")
        with pytest.raises(ReplicaLost, match="replica-0 died"):
            await reader
        ingress.feed(SequenceOutput("b", 0, 0, (5,), FinishReason.LENGTH), owner=two)
        assert await collect(kept) == {0: [5]}
        with pytest.raises(ReplicaLost, match="not connected"):
            ingress.open("c")

    run(scenario)


def test_abort_ends_a_choice_at_once_and_tells_the_owner_once() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open(n=3)
        ingress.feed(*(SequenceOutput("r", c, 0, (5,)) for c in range(3)))
        await stream.abort(1)
        await stream.abort(1)
        ingress.feed(SequenceOutput("r", 1, 1, (6,), FinishReason.ABORT), SequenceOutput("r", 0, 1, (6,), FinishReason.LENGTH))
        assert (await anext(stream)).choice in (0, 2)
        assert (await anext(stream)).choice in (0, 2)
        await stream.abort()
        await stream.abort()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert ingress.aborted == [(ONE, "r", 1), (ONE, "r", None)]
        assert ingress.table.live() == 0

    run(scenario)


def test_abort_wakes_a_reader_that_waits() -> None:
    async def scenario(ingress: Ingress) -> None:
        stream = ingress.open()
        reader = asyncio.create_task(collect(stream))
        await asyncio.sleep(0)
        await stream.abort()
        assert await reader == {}

    run(scenario)


def test_heartbeats_carry_stats_and_silence_is_measured() -> None:
    async def scenario(ingress: Ingress) -> None:
        assert ingress.table.silent_s() == float("inf")
        ingress.feed(stats=STATS)
        ingress.now_s += 3
        assert ingress.table.stats() == {"replica-0": STATS}
        assert ingress.table.silent_s() == ingress.table.silent_s("replica-0") == 3
        assert ingress.table.silent_s("replica-1") == float("inf")
        ingress.table.drop(ONE, "gone")
        assert ingress.table.stats() == {}

    run(scenario)


def test_a_request_id_is_unique_among_live_requests() -> None:
    async def scenario(ingress: Ingress) -> None:
        ingress.open()
        with pytest.raises(ValueError, match="in use"):
            ingress.open()
        ingress.table.withdraw("r")
        ingress.open()

    run(scenario)
