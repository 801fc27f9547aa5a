"""The journal of one request: what an ingress does next, for everything that can happen to it."""

from __future__ import annotations

from typing import Any

import pytest

from quire.cluster.commands import Abort, Ask, Command, Lost, Resumed, Submit, Withdraw
from quire.cluster.journal import Journal, Patience
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.succession import Owner
from quire.worker.protocol import (
    BadRequest,
    DeadlineExceeded,
    FinishReason,
    GenerateRequest,
    Overloaded,
    ReplicaLost,
    RequestFailed,
    SamplingParams,
    SequenceOutput,
    TokenLogprob,
)

A, B = Owner("a", 1), Owner("b", 5)
ROOM = 100
PATIENCE = Patience(controller_s=10, queue_s=50, resume_s=20, refusals=2, deaths=3)
LP = TokenLogprob(1, -1.0, ())


def journal(prompts: tuple[tuple[int, ...], ...] = ((1, 2, 3),), deadline_ms: int | None = None, **params: Any) -> Journal:
    request = GenerateRequest("r", prompts, SamplingParams(**({"max_tokens": 8} | params)), tenant="t", deadline_ms=deadline_ms, seed=4)
    return Journal(request, lambda prompt_len: ROOM - prompt_len, (b"h",), 0.0, PATIENCE)


def running(owner: Owner = A, **kinds: Any) -> Journal:
    j = journal(**kinds)
    j.start(0.0)
    j.routed(0, Route(*owner), 0.0)
    j.taken(owner, 0)
    return j


def only(commands: list[Command], kind: type[Any]) -> Any:
    found = [c for c in commands if isinstance(c, kind)]
    assert len(found) == 1, commands
    return found[0]


def out(index: int, *tokens: int, choice: int = 0, **more: Any) -> SequenceOutput:
    return SequenceOutput("r", choice, index, tokens, **more)


def test_it_asks_submits_and_runs() -> None:
    j = journal(n=2)
    assert j.start(0.0) == [Ask(AdmitRequest("r", 0, "t", 0, 0.0, None, 2, 3, 16, 11, (b"h",)), 0.0)]
    again = only(j.queued(0, 5.0), Ask).request
    assert (again.attempt, again.waited_s) == (0, 5.0)
    submit = only(j.routed(0, Route(*A), 6.0), Submit)
    assert submit.owner == A
    assert (submit.request.attempt, submit.request.resume, submit.request.seed) == (0, None, 4)
    assert j.taken(A, 0) == []
    j.take(A, out(0, 7, 8, finish=FinishReason.LENGTH), 7.0)
    j.take(A, out(0, 9, choice=1, finish=FinishReason.STOP), 7.0)
    assert j.over
    assert j.failure is None


def test_max_tokens_left_open_are_what_there_is_room_for() -> None:
    asked = journal(max_tokens=None).start(0.0)[0]
    assert isinstance(asked, Ask)
    assert (asked.request.max_tokens, asked.request.longest_tokens) == (97, 100)


def test_a_lost_stream_goes_on_from_what_was_delivered() -> None:
    j = running(prompts=((1, 2, 3), (4, 5)), n=2, prompt_logprobs=0)
    for choice, tokens in ((0, (7, 8)), (1, (9,)), (2, (6,))):
        j.take(A, out(0, *tokens, choice=choice, cached_tokens=2, prompt_logprobs=(LP,)), 1.0)
    j.take(A, out(1, 5, choice=1, finish=FinishReason.STOP), 1.0)
    lost, ask = j.lost(A, "it died", 2.0)
    assert lost == Lost("r", A, "it died")
    assert isinstance(ask, Ask)
    # Choice 1 has ended. Both prompts are needed again, with 3 output tokens; 6 + 7 + 8 may still come.
    assert ask.request == AdmitRequest("r", 1, "t", 0, 2.0, None, 3, 5 + 3, 6 + 7 + 8, 11, (b"h",), True, ("a",))
    first = only(j.routed(1, Route(*B), 2.5), Submit).request
    assert first.resume == {0: (7, 8), 2: (6,), 3: ()}
    assert first.params.prompt_logprobs == 0  # choice 3 has none yet
    assert j.take(A, out(2, 66), 2.6) == [Abort(A, "r", 0, None)]  # a former owner
    assert j.take(B, out(2, 66), 2.6) == [Abort(B, "r", 0, None)]  # a former attempt
    j.unread.clear()
    (resumed,) = j.take(B, out(2, 5, cached_tokens=4, prompt_logprobs=(LP,), attempt=1), 3.5)
    assert resumed == Resumed("r", B, 1.5, 8)
    assert j.unread == {0: out(2, 5, attempt=1)}  # what is said once has been said
    assert j.take(B, out(0, 3, choice=3, cached_tokens=4, prompt_logprobs=(LP,), attempt=1), 3.6) == []
    assert j.unread[3].prompt_logprobs == (LP,)
    assert only(j.lost(B, "it died, too", 9.0), Ask).request.avoid == ("b",)
    assert only(j.routed(2, Route(*A), 9.0), Submit).request.params.prompt_logprobs is None


def test_three_deaths_without_a_token_in_between_fail_it() -> None:
    j = running()
    for attempt in range(2):
        j.lost(A, "it died", 1.0)
        j.routed(attempt + 1, Route(*A), 1.0)
        j.taken(A, attempt + 1)
    j.take(A, out(0, 5, attempt=2), 1.0)  # a token: it is not the culprit
    for attempt in range(2, 4):
        assert only(j.lost(A, "it died", 1.0), Ask)
        j.routed(attempt + 1, Route(*A), 1.0)
    assert [type(c) for c in j.lost(A, "it died", 1.0)] == [Lost, Withdraw]
    assert isinstance(j.failure, RequestFailed)
    assert "3 replicas in a row" in str(j.failure)
    assert j.over
    assert list(j.unread) == [0]  # which its reader gets before the failure


def test_a_route_that_is_stale_or_too_full_is_taken_elsewhere_and_not_for_ever() -> None:
    j = journal()
    j.start(0.0)
    full = Overloaded("full", 3.0)
    j.routed(0, Route(*A), 0.0)
    ask = only(j.turned_away(A, 0, full, 0.1), Ask)
    assert (ask.request.attempt, ask.request.avoid, ask.request.resumed) == (1, ("a",), False)
    assert ask.delay_s > 0
    j.routed(1, Route(*B), 0.2)
    maybe = j.turned_away(B, 1, ReplicaLost("no answer"), 0.3)  # it may run there all the same
    assert maybe[0] == Abort(B, "r", 1, None)
    assert only(maybe, Ask).request.avoid == ("a", "b")
    j.routed(2, Route(*A), 0.4)
    assert j.turned_away(A, 2, full, 0.5) == [Withdraw("r")]
    assert j.failure is full
    assert j.deaths == 0


def test_a_refusal_that_another_replica_would_repeat_ends_it() -> None:
    j = journal()
    j.start(0.0)
    j.routed(0, Route(*A), 0.0)
    wrong = BadRequest("n", "no")
    j.turned_away(A, 0, wrong, 0.1)
    assert j.failure is wrong


def test_outputs_may_be_quicker_than_the_answer_and_an_answer_may_come_late() -> None:
    j = journal()
    j.start(0.0)
    j.routed(0, Route(*A), 0.0)
    j.take(A, out(0, 5), 0.1)
    assert j.turned_away(A, 0, ReplicaLost("no answer"), 5.0) == []
    j.lost(A, "it died", 6.0)
    assert j.taken(A, 0) == [Abort(A, "r", 0, None)]
    assert j.turned_away(A, 0, ReplicaLost("no answer"), 7.0) == [Abort(A, "r", 0, None)]
    assert j.lost(A, "it died", 7.0) == []
    assert j.routed(0, Route(*B), 7.0) == []  # the answer to the former question once more
    assert j.attempt == 1


def test_without_a_controller_it_waits_and_then_fails() -> None:
    j = journal()
    j.start(0.0)
    assert only(j.unanswered(0, "away", 1.0), Ask).request.attempt == 0
    assert only(j.unanswered(0, "away", 11.0), Ask)
    j.queued(0, 11.5)  # it is back
    assert only(j.unanswered(0, "away", 12.0), Ask)
    assert j.unanswered(0, "away", 22.5) == [Withdraw("r")]
    with pytest.raises(ReplicaLost, match="controller does not answer"):
        raise j.failure or ValueError


@pytest.mark.parametrize(("lost", "limit_s"), [(False, 50.0), (True, 20.0)])
def test_without_room_it_waits_and_then_fails(lost: bool, limit_s: float) -> None:
    j = running()
    if lost:
        j.lost(A, "it died", 0.0)
    else:
        j = journal()
        j.start(0.0)
    assert only(j.queued(int(lost), limit_s), Ask)
    assert j.queued(int(lost), limit_s + 0.1) == [Withdraw("r")]
    assert isinstance(j.failure, ReplicaLost)


def test_a_refusal_of_the_controller_ends_it_unless_it_runs_already() -> None:
    full = Overloaded("full", 3.0)
    j = journal()
    j.start(0.0)
    assert j.refused(0, full, 0.0) == []
    assert j.failure is full
    j = running()
    j.lost(A, "it died", 1.0)
    assert only(j.refused(1, full, 2.0), Ask).delay_s == 1.0
    j.refused(1, full, 22.0)
    assert j.failure is full


def test_the_deadline_is_what_is_left_of_it_and_ends_with_the_first_output() -> None:
    j = journal(deadline_ms=2000)
    assert only(j.start(0.0), Ask).request.deadline_s == 2.0
    assert only(j.queued(0, 0.5), Ask).request.deadline_s == 1.5
    assert only(j.routed(0, Route(*A), 0.75), Submit).request.deadline_ms == 1250
    j.take(A, out(0, 5), 1.0)
    assert only(j.lost(A, "it died", 5.0), Ask).request.deadline_s is None
    assert only(j.routed(1, Route(*B), 5.0), Submit).request.deadline_ms is None
    late = journal(deadline_ms=2000)
    late.start(0.0)
    assert late.routed(0, Route(*A), 2.0) == [Withdraw("r")]
    assert isinstance(late.failure, DeadlineExceeded)


def test_a_deadline_that_passes_in_the_replicas_queue() -> None:
    j = running(deadline_ms=2000)
    assert j.take(A, out(0, finish=FinishReason.DEADLINE), 2.0) == [Abort(A, "r", 0, None)]
    assert isinstance(j.failure, DeadlineExceeded)


def test_a_replica_that_gives_it_up_counts_as_lost() -> None:
    j = running()
    assert [type(c) for c in j.take(A, out(0, finish=FinishReason.ABORT), 1.0)] == [Lost, Ask]
    assert j.deaths == 0


@pytest.mark.parametrize("when", ["asking", "sending", "running"])
def test_a_reader_that_leaves(when: str) -> None:
    j = journal(n=2)
    j.start(0.0)
    if when != "asking":
        j.routed(0, Route(*A), 0.0)
    if when == "running":
        j.taken(A, 0)
    one = [] if when == "asking" else [Abort(A, "r", 0, 1)]
    rest = [Withdraw("r")] if when == "asking" else [Abort(A, "r", 0, None)]
    assert j.abort(1) == one
    assert j.abort(1) == []
    assert j.abort(None) == rest
    assert j.abort(None) == []
    assert j.over
    # Whatever comes later finds nobody, and is told so.
    assert j.queued(0, 1.0) == j.routed(0, Route(*B), 1.0) == [Withdraw("r")]
    assert j.taken(A, 0) == [Abort(A, "r", 0, None)]
    assert j.take(A, out(0, 5), 1.0) == [Abort(A, "r", 0, None)]
    assert j.lost(A, "it died", 1.0) == []


def test_an_aborted_choice_is_not_resumed() -> None:
    j = running(n=2)
    j.take(A, out(0, 5), 1.0)
    j.abort(1)
    assert j.take(A, out(0, 6, choice=1), 1.0) == [Abort(A, "r", 0, 1)]
    j.lost(A, "it died", 1.0)
    assert only(j.routed(1, Route(*B), 1.0), Submit).request.resume == {0: (5,)}
    assert j.abort(0) == [Abort(B, "r", 1, None)]


def test_a_replica_that_dies_before_it_says_whether_it_took_the_request_counts() -> None:
    j = journal()
    j.start(0.0)
    for attempt in range(2):
        j.routed(attempt, Route(*A), 0.0)
        assert only(j.turned_away(A, attempt, ReplicaLost("no answer"), 0.1), Ask)
        assert j.deaths == attempt
        j.lost(A, "it died", 0.2)  # the news of it come later, when it asks already
        assert j.lost(A, "it died", 0.2) == []
        assert j.deaths == attempt + 1
    assert j.on_trial
    j.routed(2, Route(*A), 0.3)
    j.turned_away(A, 2, ReplicaLost("no answer"), 0.4)
    j.routed(3, Route(*B), 0.5)
    j.taken(B, 3)
    assert j.lost(A, "it died", 0.6) == [Lost("r", A, "it died"), Abort(B, "r", 3, None), Withdraw("r")]
    assert isinstance(j.failure, RequestFailed)


def test_a_way_that_is_lost_is_no_death() -> None:
    j = running()
    for attempt in range(5):
        assert only(j.lost(A, "frames are missing", 1.0, died=False), Ask).request.resumed
        j.routed(attempt + 1, Route(*A), 1.0)
    assert j.deaths == 0
    assert j.lost(A, "frames are missing", 21.1, died=False)[1:] == [Withdraw("r")]
    assert isinstance(j.failure, ReplicaLost)


def test_stale_routes_are_followed_for_a_while() -> None:
    j = journal()
    j.start(0.0)
    for attempt in range(20):
        j.routed(attempt, Route(*A), 1.0 + attempt)
        assert only(j.turned_away(A, attempt, ReplicaLost("not here"), 1.0 + attempt), Ask)
    j.routed(20, Route(*A), 21.0)
    j.turned_away(A, 20, ReplicaLost("not here"), 21.1)
    assert isinstance(j.failure, ReplicaLost)
