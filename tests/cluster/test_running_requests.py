"""What has been sent and has not ended: an attempt is counted once, wherever replicas still name an earlier one."""

from __future__ import annotations

from itertools import permutations

import pytest

from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.running_requests import START_TIMEOUT_S, RunningRequests
from quire.cluster.tenants import TenantTable
from quire.worker.protocol import EventFrame, LiveRequest, ReplicaLoad

LOAD = ReplicaLoad(1, 0, 10, 9, 0, 1, 0, 0, 0, 0, 0.0, 0.0, 1)


def test_a_later_attempt_replaces_one_that_a_replica_has_named_since() -> None:
    tenants = TenantTable(())
    running = RunningRequests(lambda name: tenants.tenant(name, 0.0))
    live = LiveRequest("r", "", 0, "running", 1, 5, 2, 1)
    running.take(EventFrame("a", 1, 0, 1, True, (), (), (live,), (), {"": 2}, LOAD), 0.0)  # it still runs the first attempt
    later = AdmitRequest("r", 1, "", 0, 0.0, None, 1, 7, 9, 14, resumed=True)
    running.send(later, Route("b", 1), 0.0)
    tenant = tenants.tenant("", 0.0)
    assert tenant.running == 1
    running.take(EventFrame("a", 1, 1, 2, False, (), (), (), (("r", 2),), {"": 2}, LOAD._replace(steps=2)), 1.0)
    assert tenant.running == 1  # it is b's now
    assert running.known("r") == (1, Route("b", 1))
    running.release("r", 9)
    assert (tenant.running, tenant.pages) == (0, 0)


class Books:
    """A tenant's counts, fed by replicas that have all reported once."""

    def __init__(self, *replicas: str, sent_to: str | None = "a") -> None:
        table = TenantTable(())
        self.running = RunningRequests(lambda name: table.tenant(name, 0.0))
        self.tenant = table.tenant("", 0.0)
        self.numbers = dict.fromkeys(replicas, 0)
        for replica in replicas:
            self.report(replica, dump=True)
        if sent_to is not None:
            self.running.send(AdmitRequest("r", 3, "", 0, 0.0, None, 1, 40, 9, 49), Route(sent_to, 1), 0.0)
            self.report(sent_to, "started")

    def report(self, replica: str, *news: str, dump: bool = False, served: int = 0) -> None:
        before, self.numbers[replica] = self.numbers[replica], self.numbers[replica] + 1
        started = (LiveRequest("r", "", 0, "running", 1, 40, 2, 2),) if "started" in news else ()
        ended = (("r", 2),) if {"moved", "ended"}.intersection(news) else ()
        moved = ("r",) if "moved" in news else ()
        load = LOAD._replace(steps=before + 1)
        frame = EventFrame(replica, 1, before, before + 1, dump, (), (), started, ended, {"": served} if served else {}, load, moved)
        self.running.take(frame, 5.0)

    def counts(self) -> tuple[int, int]:
        return self.tenant.running, self.tenant.pages


STEPS = {
    "a": [("moved",)],
    "b": [("started",), ("moved",)],
    "c": [("started",), ("ended",)],
}


def in_their_order(steps: dict[str, list[tuple[str, ...]]]) -> list[list[tuple[str, tuple[str, ...]]]]:
    names = [name for name, words in steps.items() for _ in words]
    found = []
    for order in sorted(set(permutations(names))):
        words = {name: iter(said) for name, said in steps.items()}
        found.append([(name, next(words[name])) for name in order])
    return found


@pytest.mark.parametrize("order", in_their_order(STEPS), ids=lambda order: "".join(name for name, _ in order))
def test_a_request_that_migrates_is_counted_once_whatever_is_heard_first(order: list[tuple[str, tuple[str, ...]]]) -> None:
    books = Books("a", "b", "c")
    over = False
    for name, news in order:
        assert books.counts() == (1, 2) or over, (order, name)
        books.report(name, *news)
        over |= news == ("ended",)
        if not over and books.running.known("r") is not None:
            assert books.running.known("r")[0] == 3
    for request_id in books.running.never_arrived(5.0 + START_TIMEOUT_S):
        books.running.release(request_id)
    assert books.counts() == (0, 0)


def test_what_it_has_generated_goes_with_it() -> None:
    books = Books("a", "b")
    books.report("a", served=30)
    assert books.counts() == (1, 3)
    books.report("b", "started")
    books.report("a", "moved")
    assert books.tenant.output_tokens == 2  # as the source said of the request; the rest was miscounted and ends with the last one there
    books.report("b", served=40)
    assert books.tenant.output_tokens == 42
    books.report("b", "ended")
    assert books.counts() == (0, 0)


@pytest.mark.parametrize("hears", ["before", "after"])
def test_it_may_end_before_anybody_has_said_that_it_had_come(hears: str) -> None:
    books = Books("a", "b")
    for name, news in [("a", "moved"), ("b", "ended")] if hears == "after" else [("b", "ended"), ("a", "moved")]:
        books.report(name, news)
    assert books.counts() == (0, 0)


def test_a_source_that_dies_leaves_it_to_whom_it_has_gone() -> None:
    books = Books("a", "b")
    books.report("b", "started")
    books.running.lost("a", 1)
    assert (books.counts(), books.running.known("r")) == ((1, 2), (3, Route("b", 1)))
    books.running.lost("b", 1)
    assert books.counts() == (0, 0)


def test_a_destination_that_dies_before_it_speaks_is_waited_for_and_then_not() -> None:
    books = Books("a", "b")
    books.report("a", "moved")
    assert books.running.never_arrived(4.0 + START_TIMEOUT_S) == []
    assert books.running.never_arrived(5.0 + START_TIMEOUT_S) == ["r"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_controller_that_begins_in_the_middle_of_a_move_counts_it_once(first: str) -> None:
    books = Books("a", "b", sent_to=None)
    second = "b" if first == "a" else "a"
    books.report(first, "started", dump=True)
    books.report(second, "started", dump=True)
    assert books.counts() == (1, 3)  # with the tokens that it had then
    books.report("a", "moved")
    assert books.counts() == (1, 3)
    books.report("b", "ended")
    assert books.counts() == (0, 0)


def test_one_that_comes_back_is_where_it_was() -> None:
    books = Books("a", "b")
    books.report("a", "moved")
    books.report("a", "started")
    assert books.running.known("r") == (3, Route("a", 1))
    books.report("b", "moved")
    assert books.running.never_arrived(100.0) == []
    books.report("a", "ended")
    assert books.counts() == (0, 0)
