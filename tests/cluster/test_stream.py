"""The stream table: what an ingress makes of frames that come twice, late, from the wrong owner, or not at all."""

from __future__ import annotations

import pytest

from quire.cluster.commands import Abort, Ask, Command, Lost
from quire.cluster.journal import Journal, Patience
from quire.cluster.messages import Route
from quire.cluster.stream import ABORT_AGAIN_S, StreamTable
from quire.cluster.succession import Owner
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
_LATER = (4, 3, 2, 1, {"out": 9}, 0.25, {"swap": 0.5}, {"swap": 0.75})
STATS = EngineStats(3, 1, 0, 10, 5, 2, 3, 0, 7, 8, 0, 0, 0, {"recompute": 1}, 0.5, *_LATER)


class Ingress:
    """A table with a connection to `ONE`, and requests that run there."""

    def __init__(self) -> None:
        self.table = StreamTable()
        self.table.connect("c", ONE)
        self.now_s = 100.0
        self.number = 0

    def open(self, request_id: str = "r", n: int = 1, owner: Owner = ONE) -> Journal:
        request = GenerateRequest(request_id, ((1, 2),), SamplingParams(n=n, max_tokens=9))
        journal = Journal(request, lambda prompt_len: 100, (), self.now_s, Patience())
        self.table.open(journal)
        journal.start(self.now_s)
        journal.routed(0, Route(*owner), self.now_s)
        journal.taken(owner, 0)
        return journal

    def feed(self, *outputs: SequenceOutput, number: int | None = None, stats: EngineStats | None = None) -> list[Command]:
        number = self.number if number is None else number
        self.number = number + 1
        return self.table.feed("c", pack_frame(Frame(*ONE, number, outputs, stats)), self.now_s)


@pytest.fixture
def ingress() -> Ingress:
    return Ingress()


def tokens(journal: Journal) -> dict[int, tuple[int, ...]]:
    return {choice: output.tokens for choice, output in journal.unread.items()}


def test_choices_are_kept_apart_and_the_request_ends_with_the_last_of_them(ingress: Ingress) -> None:
    journal = ingress.open(n=2)
    ingress.feed(SequenceOutput("r", 0, 0, (5,)), SequenceOutput("r", 1, 0, (6,)))
    ingress.feed(SequenceOutput("r", 0, 1, (7,), FinishReason.LENGTH))
    assert ingress.table.live() == [journal]
    ingress.feed(SequenceOutput("r", 1, 1, (8,), FinishReason.STOP))
    assert tokens(journal) == {0: (5, 7), 1: (6, 8)}
    assert journal.over
    assert ingress.table.live() == []


def test_unread_outputs_are_merged_into_one_for_each_choice(ingress: Ingress) -> None:
    journal = ingress.open()
    lps = [TokenLogprob(t, -0.5, ((t, -0.5),)) for t in (5, 6)]
    ingress.feed(SequenceOutput("r", 0, 0, (5,), cached_tokens=32, logprobs=(lps[0],), prompt_logprobs=(lps[1],)))
    ingress.feed(SequenceOutput("r", 0, 1, (6,), FinishReason.STOP, 6, logprobs=(lps[1],)))
    assert journal.unread == {0: SequenceOutput("r", 0, 0, (5, 6), FinishReason.STOP, 6, 32, tuple(lps), (lps[1],))}


def test_repeated_frames_and_repeated_tokens_are_dropped(ingress: Ingress) -> None:
    journal = ingress.open()
    ingress.feed(SequenceOutput("r", 0, 0, (5, 6)))
    ingress.feed(SequenceOutput("r", 0, 2, (9,)), number=0)  # a frame number that was there already
    ingress.feed(SequenceOutput("r", 0, 0, (5, 6)))  # the same tokens in a new frame
    ingress.feed(SequenceOutput("r", 0, 1, (6, 7), FinishReason.LENGTH))  # half of it known
    ingress.feed(SequenceOutput("r", 0, 3, (8,), FinishReason.LENGTH))  # after the end
    assert tokens(journal) == {0: (5, 6, 7)}


def test_a_gap_in_the_tokens_sends_that_request_elsewhere_and_no_other(ingress: Ingress) -> None:
    broken, whole = ingress.open("a"), ingress.open("b")
    ingress.feed(SequenceOutput("a", 0, 0, (5,)), SequenceOutput("b", 0, 0, (5,)))
    commands = ingress.feed(SequenceOutput("a", 0, 2, (7,)), SequenceOutput("b", 0, 1, (6,), FinishReason.LENGTH))
    reason = "replica-0: token 2 of choice 0 came where 1 was due"
    assert commands[:2] == [Abort(ONE, "a", 0, None), Lost("a", ONE, reason)]
    assert isinstance(commands[2], Ask)
    assert (commands[2].request.attempt, commands[2].request.resumed, commands[2].request.avoid) == (1, True, ("replica-0",))
    assert tokens(broken) == {0: (5,)}
    assert tokens(whole) == {0: (5, 6)}


def test_a_missing_frame_is_reported_to_the_caller(ingress: Ingress) -> None:
    ingress.feed()
    with pytest.raises(ReplicaLost, match="frame 2 came where 1 was due"):
        ingress.feed(number=2)


def test_only_the_owner_in_its_own_epoch_on_its_own_connection_may_emit(ingress: Ingress) -> None:
    journal = ingress.open()
    stale, other = Owner("replica-0", 0), Owner("replica-9", 1)
    ingress.table.connect("stale", stale)
    wrong = SequenceOutput("r", 0, 0, (66,))
    assert ingress.table.feed("stale", pack_frame(Frame(*stale, 0, (wrong,))), 100.0) == [Abort(stale, "r", 0, None)]
    assert ingress.table.feed("stale", pack_frame(Frame(*ONE, 1, (wrong,))), 100.0) == []  # it speaks for another
    assert ingress.table.feed("never opened", pack_frame(Frame(*other, 0, (wrong,))), 100.0) == []
    assert tokens(journal) == {}


def test_what_is_computed_for_nobody_is_aborted_once_in_a_while(ingress: Ingress) -> None:
    output = SequenceOutput("gone", 0, 7, (5,), attempt=2)
    assert ingress.feed(output) == [Abort(ONE, "gone", 2, None)]
    assert ingress.feed(output._replace(index=8)) == []  # that abort is under way
    ingress.now_s += ABORT_AGAIN_S
    assert ingress.feed(output._replace(index=9)) == [Abort(ONE, "gone", 2, None)]
    assert ingress.feed(output._replace(index=10, finish=FinishReason.ABORT)) == []


def test_a_lost_connection_moves_its_requests_and_no_others(ingress: Ingress) -> None:
    two = Owner("replica-1", 4)
    ingress.table.connect("d", two)
    ingress.open("a")
    kept = ingress.open("b", owner=two)
    assert [type(c) for c in ingress.table.drop("c", "replica-0 died", 101.0)] == [Lost, Ask]
    assert ingress.table.drop("c", "again", 102.0) == []
    ingress.table.feed("d", pack_frame(Frame(*two, 0, (SequenceOutput("b", 0, 0, (5,), FinishReason.LENGTH),))), 103.0)
    assert tokens(kept) == {0: (5,)}


def test_heartbeats_carry_stats_and_silence_is_measured(ingress: Ingress) -> None:
    assert ingress.table.silent_s(100.0) == float("inf")
    ingress.feed(stats=STATS)
    assert ingress.table.stats() == {"replica-0": STATS}
    assert ingress.table.silent_s(103.0) == ingress.table.silent_s(103.0, "replica-0") == 3
    assert ingress.table.silent_s(103.0, "replica-1") == float("inf")
    ingress.table.drop("c", "gone", 103.0)
    assert ingress.table.stats() == {}


def test_a_request_id_is_unique_among_live_requests(ingress: Ingress) -> None:
    journal = ingress.open()
    with pytest.raises(ValueError, match="in use"):
        ingress.open()
    journal.abort(None)
    ingress.table.forget_ended("r")
    ingress.open()


def test_missing_frames_a_reader_given_up_and_a_connection_without_frames_are_no_death(ingress: Ingress) -> None:
    journal = ingress.open()
    ingress.table.drop("c", "never came up", 100.0)
    assert journal.deaths == 0
    journal.routed(1, Route(*ONE), 100.0)
    ingress.table.connect("d", ONE)
    ingress.table.feed("d", pack_frame(Frame(*ONE, 0, ())), 100.0)
    with pytest.raises(ReplicaLost):
        ingress.table.feed("d", pack_frame(Frame(*ONE, 2, ())), 100.0)
    ingress.table.drop("d", "a gap", 100.0)
    assert journal.deaths == 0
    journal.routed(2, Route(*ONE), 100.0)
    ingress.table.connect("e", ONE)
    ingress.table.feed("e", pack_frame(Frame(*ONE, 0, ())), 100.0)
    ingress.table.drop("e", "the lease was not renewed", 100.0, died=False)
    assert journal.deaths == 0
    journal.routed(3, Route(*ONE), 100.0)
    ingress.table.connect("f", ONE)
    ingress.table.feed("f", pack_frame(Frame(*ONE, 0, ())), 100.0)
    ingress.table.drop("f", "it died", 100.0)
    assert journal.deaths == 1


def test_requests_that_may_be_poison_are_tried_one_at_a_time(ingress: Ingress) -> None:
    journals = [ingress.open(name) for name in "abc"]
    fresh = ingress.open("d")
    asks: dict[str, Ask] = {}
    for attempt in range(2):
        for journal in journals:
            (ask,) = (c for c in journal.lost(ONE, "it died", 100.0) if isinstance(c, Ask))
            asks[journal.request_id] = ask
            if attempt == 0:
                assert ingress.table.may_ask(ask)
                journal.routed(1, Route(*ONE), 100.0)
    (other,) = (c for c in fresh.lost(ONE, "it died", 100.0) if isinstance(c, Ask))
    assert [ingress.table.may_ask(ask) for ask in (asks["a"], asks["b"], asks["c"], other)] == [True, False, False, True]
    assert ingress.table.may_ask(asks["a"])  # the same question once more
    assert ingress.table.released() == []
    journals[0].routed(2, Route(*ONE), 100.0)
    journals[1].abort(None)  # its reader has left meanwhile
    ingress.table.forget_ended("b")
    assert journals[0].lost(ONE, "it died", 100.0)  # for the third time
    ingress.table.forget_ended("a")
    assert ingress.table.released() == [asks["c"]]
    assert ingress.table.may_ask(asks["c"])
