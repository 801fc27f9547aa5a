"""Streams that migrate: whatever comes first, and whoever is lost, the reader sees every token once, and nothing of the move."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from quire.cluster.commands import Abort, Ask, Command, Lost, Submit
from quire.cluster.journal import Journal, Patience
from quire.cluster.messages import Route
from quire.cluster.succession import MAX_PARKED, Owner, Succession
from quire.worker.protocol import FinishReason, GenerateRequest, ReplicaLost, SamplingParams, SequenceOutput, TokenLogprob

A, B, C, D = Owner("a", 1), Owner("b", 5), Owner("c", 2), Owner("d", 9)
Word = tuple[Owner, SequenceOutput]


def running(n: int = 1, taken: bool = True, **params: int) -> Journal:
    request = GenerateRequest("r", ((1, 2, 3),), SamplingParams(n=n, max_tokens=50, **params), seed=4)
    j = Journal(request, lambda _: 100, (), 0.0, Patience())
    j.start(0.0)
    j.routed(0, Route(*A), 0.0)
    if taken:
        j.taken(A, 0)
    return j


def said(index: int, *tokens: int, choice: int = 0, attempt: int = 0, finish: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput("r", choice, index, tokens, finish, attempt=attempt)


def moved(index: int, to: Owner, choice: int = 0) -> SequenceOutput:
    return SequenceOutput("r", choice, index, (), FinishReason.MOVED, peer=tuple(to))


def came(index: int, source: Owner, choice: int = 0) -> SequenceOutput:
    return SequenceOutput("r", choice, index, (), peer=tuple(source))


def orders(streams: dict[Owner, list[SequenceOutput]]) -> Iterator[list[Word]]:
    """Every way in which the streams may arrive, each of them in its own order."""
    if not any(streams.values()):
        yield []
    for owner, words in streams.items():
        if words:
            for rest in orders(streams | {owner: words[1:]}):
                yield [(owner, words[0]), *rest]


def hear(j: Journal, words: list[Word], before: dict[int, list[int]] | None = None) -> tuple[dict[int, list[int]], list[Command]]:
    """What the reader has got then, output by output, after what it had before; and all commands."""
    got = {choice: list(tokens) for choice, tokens in (before or {}).items()}
    commands: list[Command] = []
    for owner, output in words:
        commands += j.take(owner, output, 1.0)
        for choice, unread in j.unread.items():
            assert unread.index == len(got.setdefault(choice, []))
            assert unread.peer is None
            assert unread.finish is not FinishReason.MOVED
            got[choice] += unread.tokens
        j.unread.clear()
    return got, commands


ONE_MOVE = {
    A: [said(0, 10), said(1, 11), moved(2, B)],
    B: [came(2, A), said(2, 12), said(3, 13, finish=FinishReason.LENGTH)],
}
TWO_CHOICES = {
    A: [said(0, 10), said(0, 20, choice=1), said(1, 11, finish=FinishReason.STOP), moved(1, B, 1)],
    B: [came(1, A, 1), said(1, 21, choice=1, finish=FinishReason.STOP)],
}
BOTH_MOVE = {
    A: [said(0, 20, choice=1), moved(0, B), moved(1, B, 1)],
    B: [came(0, A), came(1, A, 1), said(0, 10, finish=FinishReason.STOP), said(1, 21, choice=1, finish=FinishReason.STOP)],
}
CHAIN = {
    A: [said(0, 10), moved(1, B)],
    B: [came(1, A), said(1, 11), moved(2, C)],
    C: [came(2, B), said(2, 12, finish=FinishReason.STOP)],
}
UNBEGUN_CHAIN = {A: [moved(0, B)], B: [came(0, A), moved(0, C)], C: [came(0, B), said(0, 10, finish=FinishReason.STOP)]}
THERE_AND_BACK = {
    A: [said(0, 10), moved(1, B), came(2, B), said(2, 12), moved(3, C)],
    B: [came(1, A), said(1, 11), moved(2, A)],
    C: [came(3, A), said(3, 13, finish=FinishReason.STOP)],
}
TWICE_BACK = {
    A: [moved(0, B), came(0, B), moved(0, B), came(1, B), said(1, 11, finish=FinishReason.STOP)],
    B: [came(0, A), moved(0, A), came(0, A), said(0, 10), moved(1, A)],
}


@pytest.mark.parametrize(
    ("streams", "tokens", "last"),
    [
        (ONE_MOVE, {0: [10, 11, 12, 13]}, B),
        (TWO_CHOICES, {0: [10, 11], 1: [20, 21]}, B),
        (BOTH_MOVE, {0: [10], 1: [20, 21]}, B),
        (CHAIN, {0: [10, 11, 12]}, C),
        (UNBEGUN_CHAIN, {0: [10]}, C),
        (THERE_AND_BACK, {0: [10, 11, 12, 13]}, C),
        (TWICE_BACK, {0: [10, 11]}, A),
    ],
    ids=["one move", "one of two choices has ended", "two choices", "chain", "before the first token", "there and back", "twice"],
)
def test_every_order_of_arrival_gives_the_same_stream(
    streams: dict[Owner, list[SequenceOutput]], tokens: dict[int, list[int]], last: Owner
) -> None:
    for words in orders(streams):
        j = running(n=len(tokens))
        got, commands = hear(j, words)
        assert (got, commands, j.over, j.failure, j.owner, j.attempt) == (tokens, [], True, None, last, 0), words


def test_an_heir_that_is_early_waits_for_the_last_tokens_of_the_owner() -> None:
    j = running()
    got, commands = hear(j, [(A, said(0, 10)), (B, came(2, A)), (B, said(2, 12))])
    assert (got, commands, j.owner) == ({0: [10]}, [], A)
    got, commands = hear(j, [(A, said(1, 11))], got)  # before the owner has said that it has moved
    assert (got, commands, j.owner) == ({0: [10, 11, 12]}, [], B)
    assert hear(j, [(A, moved(2, B))]) == ({}, [])


def test_logprobs_and_usage_do_not_notice() -> None:
    j = running(logprobs=0)
    lps = [TokenLogprob(t, -0.5, ()) for t in (10, 11)]
    j.take(A, said(0, 10)._replace(logprobs=(lps[0],), cached_tokens=2), 1.0)
    j.take(A, moved(1, B), 1.0)
    j.take(B, came(1, A), 1.0)
    j.take(B, said(1, 11, finish=FinishReason.STOP)._replace(logprobs=(lps[1],), cached_tokens=3), 1.0)
    assert j.unread == {0: SequenceOutput("r", 0, 0, (10, 11), FinishReason.STOP, cached_tokens=2, logprobs=tuple(lps))}


@pytest.mark.parametrize("heard", range(5))
def test_the_owner_is_lost(heard: int) -> None:
    """After so many words of A, C, B in turn. C is an heir of B, who is A's; who has not got it yet must stop, and it is resumed."""
    words = [(A, said(0, 10)), (C, came(3, B)), (C, said(3, 13)), (B, came(2, A)), (B, said(2, 12))][:heard]
    j = running()
    got, _ = hear(j, words)
    commands = j.lost(A, "it died", 2.0)
    heirs = [who for who in (C, B) if any(owner == who for owner, _ in words)]
    assert commands[:-1] == [Lost("r", A, "it died"), *(Abort(heir, "r", 0, None) for heir in heirs)]
    assert isinstance(commands[-1], Ask)
    (submit,) = j.routed(1, Route(*D), 3.0)
    assert isinstance(submit, Submit)
    assert submit.request.resume == ({0: (10,)} if got else None)
    for heir in heirs:  # whatever they still say
        assert j.take(heir, said(4, 14), 3.0) == [Abort(heir, "r", 0, None)]
    rest = said(len(got), *range(10 + len(got), 15), attempt=1, finish=FinishReason.STOP)
    assert hear(j, [(D, rest)], got)[0] == {0: [10, 11, 12, 13, 14]}


@pytest.mark.parametrize("heard", range(len(CHAIN[A]) + len(CHAIN[B]) + 1))
@pytest.mark.parametrize("lost", [A, B, C])
def test_whoever_is_lost_the_stream_goes_on_or_is_asked_for_again(heard: int, lost: Owner) -> None:
    """A connection ends after so many words, in any order of all; what had not come from it never comes."""
    for order in orders(CHAIN):
        j = running()
        got, commands = hear(j, order[:heard])
        commands += j.lost(lost, "it died", 2.0)
        got, more = hear(j, [word for word in order[heard:] if word[0] != lost], got)
        tokens = got.get(0, [])
        assert tokens == [10, 11, 12][: len(tokens)]
        asked = [c for c in commands + more if isinstance(c, Ask)]
        if not j.over:
            more += j.overdue(100.0)
            asked = [c for c in commands + more if isinstance(c, Ask)]
            assert len(asked) == 1, (order, heard)  # nothing is left hanging
            assert j.attempt == 1
        else:
            assert tokens == [10, 11, 12]
            assert not asked
        stopped = {c.owner for c in commands + more if isinstance(c, Abort)}
        talked = {who for who, output in order if output.attempt == 0 and who != lost}
        assert j.over or lost == C or C in stopped or C not in talked, (order, heard)


def test_an_heir_that_was_lost_before_its_turn_is_lost_when_it_comes() -> None:
    j = running()
    hear(j, [(B, came(1, A)), (B, said(1, 11))])
    assert j.lost(B, "it died", 2.0) == []  # the owner may yet say that it has kept it
    commands = j.take(A, said(0, 10), 2.5)
    assert [type(c) for c in commands] == [Lost, Ask]
    assert j.deaths == 1
    (submit,) = j.routed(1, Route(*C), 3.0)
    assert isinstance(submit, Submit)
    assert submit.request.resume == {0: (10, 11)}


def test_frames_that_begin_again_are_as_good_as_before() -> None:
    j = running()
    j.lost(B, "the way was lost", 1.0, died=False)
    assert hear(j, [(A, said(0, 10)), (B, came(1, A)), (A, moved(1, B)), (B, said(1, 11))]) == ({0: [10, 11]}, [])


def test_an_heir_that_is_never_heard_of_is_lost_after_a_while() -> None:
    j = running()
    hear(j, [(A, said(0, 10)), (A, moved(1, B))])
    assert j.overdue(11.0) == []
    commands = j.overdue(11.1)
    assert commands[0] == Abort(B, "r", 0, None)
    assert [type(c) for c in commands[1:]] == [Lost, Ask]
    assert j.overdue(30.0) == []


def test_a_source_that_gives_up_after_its_heir_has_begun_changes_nothing() -> None:
    j = running()
    late = said(1, finish=FinishReason.ABORT)
    assert hear(j, [(A, said(0, 10)), (B, came(1, A)), (A, late), (B, said(1, 11))]) == ({0: [10, 11]}, [])
    j = running()
    _, commands = hear(j, [(A, said(0, 10)), (A, late), (B, came(1, A))])
    assert [type(c) for c in commands] == [Lost, Ask, Abort]  # too late: it is asked for again, and the heir stops


def test_the_answer_to_the_submission_may_come_after_the_move() -> None:
    for late in (lambda j: j.taken(A, 0), lambda j: j.turned_away(A, 0, ReplicaLost("no answer"), 2.0)):
        j = running(taken=False)
        hear(j, [(B, came(0, A))])
        assert late(j) == []
        assert hear(j, [(B, said(0, 10))]) == ({0: [10]}, [])


def test_a_reader_that_leaves_tells_all_that_may_compute_it() -> None:
    j = running(n=2)
    hear(j, [(A, said(0, 10)), (B, came(2, A)), (B, came(0, A, 1))])
    assert j.abort(0) == [Abort(A, "r", 0, 0), Abort(B, "r", 0, 0)]
    _, commands = hear(j, [(A, said(1, 11)), (B, said(2, 12))])
    assert commands == [Abort(A, "r", 0, 0), Abort(B, "r", 0, 0), Abort(B, "r", 0, 0)]
    assert j.owner == B
    assert j.abort(None) == [Abort(B, "r", 0, None)]


def test_who_is_nobodys_heir_must_stop() -> None:
    j = running()
    assert j.take(C, said(0, 66), 1.0) == [Abort(C, "r", 0, None)]
    assert j.take(A, SequenceOutput("r", 0, 0, (), FinishReason.MOVED), 1.0)[0] == Lost("r", A, "a gave it up")  # it says not to whom


def test_what_is_parked_is_bounded() -> None:
    j = running()
    j.take(B, came(5, A), 1.0)
    words = (j.take(B, said(5 + i, i), 1.0) for i in range(MAX_PARKED))
    assert list(islice(words, MAX_PARKED - 1)) == [[]] * (MAX_PARKED - 1)
    commands = next(words)
    assert [type(c) for c in commands] == [Abort, Lost, Abort, Ask]


def test_heirs_are_named_once() -> None:
    s = Succession()
    s.park(B, came(1, A))
    s.hand(0, B)
    s.park(C, came(2, B))
    assert s.heirs() == (B, C)
