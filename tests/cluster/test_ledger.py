"""The dispatch ledger: what is on its way is counted once, and leaves for every reason there is."""

from __future__ import annotations

import pytest

from quire.cluster.ledger import NOTHING, Ledger, Sent, Totals


def sent(request_id: str = "a", attempt: int = 0, replica_id: str = "r0", sent_s: float = 0.0) -> Sent:
    return Sent(request_id, attempt, replica_id, sequences=2, tokens=100, pages=5, sent_s=sent_s)


ONE = Totals(2, 100, 5)


def test_what_is_sent_is_counted_until_its_replica_reports_it():
    ledger = Ledger()
    ledger.enter(sent("a"))
    ledger.enter(sent("b"))
    assert ledger.of("r0") == Totals(4, 200, 10)
    ledger.settle("r1", "a")  # another replica's word, of an earlier attempt
    assert ledger.of("r0") == Totals(4, 200, 10)
    ledger.settle("r0", "a")
    ledger.settle("r0", "a")
    assert ledger.of("r0") == ONE
    ledger.settle("r0", "b")
    assert (ledger.of("r0"), len(ledger)) == (NOTHING, 0)


def test_a_later_attempt_replaces_an_earlier_one_and_not_the_other_way_round():
    ledger = Ledger()
    ledger.enter(sent("a", 0, "r0"))
    ledger.enter(sent("a", 1, "r1"))
    assert (ledger.of("r0"), ledger.of("r1")) == (NOTHING, ONE)
    ledger.enter(sent("a", 0, "r0"))
    assert (ledger.of("r0"), ledger.of("r1")) == (NOTHING, ONE)
    ledger.enter(sent("a", 1, "r1"))
    assert ledger.of("r1") == ONE


def test_what_is_never_reported_expires_oldest_first():
    ledger = Ledger(ttl_s=30)
    ledger.enter(sent("a", 0, sent_s=0))
    ledger.enter(sent("b", 0, sent_s=10))
    ledger.enter(sent("a", 1, sent_s=20))  # its time starts again
    ledger.expire(39.9)
    assert len(ledger) == 2
    ledger.expire(40)
    assert ledger.of("r0") == ONE
    ledger.expire(50)
    assert ledger.of("r0") == NOTHING


@pytest.mark.parametrize("leave", [lambda ledger: ledger.drop("a"), lambda ledger: ledger.forget("r0")])
def test_it_is_dropped_with_its_client_and_with_its_replica(leave):
    ledger = Ledger()
    ledger.enter(sent("a"))
    ledger.enter(sent("b", replica_id="r1"))
    leave(ledger)
    leave(ledger)
    assert (ledger.of("r0"), ledger.of("r1"), len(ledger)) == (NOTHING, ONE, 1)
