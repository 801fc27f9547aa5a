"""The books of migrations: what moves is not moved twice, what fails is not tried at once, and all of it is counted."""

from __future__ import annotations

from quire.cluster.admin import MoveRow
from quire.cluster.ledger import NOTHING
from quire.cluster.messages import Route
from quire.cluster.mobility import KEPT, RETRY_S, Mobility, Moved, by_hand
from quire.cluster.policies import ReplicaSnapshot, snapshot
from quire.cluster.rebalancing import COOLDOWN_S, FRESH_S, Move, Reason, Role
from quire.worker.protocol import LiveRequest, MigrationResult, ModelInfo, Outcome, ReplicaLoad

A, B = Route("replica-0", 1), Route("replica-1", 1)
INFO = ModelInfo("m", "", 1000, 9, (), 0, page_size=10, pool_tokens=1000, max_running=16)
X = LiveRequest("x", "", 0, "running", 1, 80, 5, 9)


def shot(route: Route, active: int, running: int = 2) -> ReplicaSnapshot:
    return snapshot(route, INFO, ReplicaLoad(running, 0, 100, 100 - active, 0, active, 0, 0, 0, 0, 0.0, 0.0, 1), NOTHING)


def test_what_is_under_way_is_where_it_goes_and_is_not_planned_again() -> None:
    books = Mobility()
    places = books.places([shot(A, 80), shot(B, 10)], [], 100.0)
    assert [p.left for p in places] == [20, 90]
    (move,) = books.plan(places, {A: [X]}, None, True, 100.0)
    assert move == Move("x", A, B, Reason.FILL, 10, 1)
    books.begin(move)
    places = books.places([shot(A, 80), shot(B, 10)], [], 100.0)
    assert [(p.left, p.seats) for p in places] == [(30, 15), (90, 14)]  # what comes stands in the router's ledger
    assert books.plan(places, {A: [X]}, None, True, 100.0) == []


def test_a_request_that_has_moved_rests_and_one_that_could_not_is_tried_later() -> None:
    books = Mobility()
    place_a, place_b = books.places([shot(A, 80), shot(B, 10)], ["replica-0"], 0.0)
    places = [place_a, place_b]
    move = by_hand(X, place_a, place_b)
    assert move == Move("x", A, B, Reason.OPERATOR, 10, 1)
    books.drain("replica-0", True)
    books.begin(move)
    books.ended(move, MigrationResult(Outcome.REFUSED, reason="no seat"), 10.0)
    assert books.plan(places, {A: [X]}, None, True, 10.0) == []
    assert len(books.plan(places, {A: [X]}, None, True, 10.0 + RETRY_S)) == 1  # a drain does not wait for the cooldown
    calm = [place_a._replace(draining=False), place_b]
    assert books.plan(calm, {A: [X]}, None, True, 10.0 + RETRY_S) == []
    assert len(books.plan(calm, {A: [X]}, None, True, 10.0 + COOLDOWN_S)) == 1
    books.ended(move, MigrationResult(Outcome.MOVED, 9, 900, 12.5), 20.0)
    books.ended(move, MigrationResult(Outcome.MOVED, 1, 100, 2.5), 20.0)
    assert books.counts() == {("operator", "refused"): 1, ("operator", "moved"): 2}
    assert books.total == books.drained("replica-0") == Moved(2, 10, 1000, 15.0, 12.5)
    books.drain("replica-0", False)
    assert books.drained("replica-0") == Moved()


def test_operators_see_what_moves_and_what_has_moved_lately() -> None:
    books = Mobility()
    place_a, place_b = books.places([shot(A, 80), shot(B, 10)], [], 0.0)
    move = by_hand(X, place_a, place_b)
    books.begin(move)
    assert (books.moving(), books.moved(5.0)) == ((MoveRow("x", "replica-0", "replica-1", "operator", "", 10),), ())
    row = books.ended(move, MigrationResult(Outcome.MOVED, 9, 900, 12.5), 10.0)
    assert row == MoveRow("x", "replica-0", "replica-1", "operator", "moved", 9, 900, 12.5)
    assert (books.moving(), books.moved(12.0)) == ((), ((2.0, row),))
    for i in range(KEPT):
        books.ended(move, MigrationResult(Outcome.REFUSED, reason="no seat"), 20.0 + i)
    assert len(books.moved(100.0)) == KEPT  # and the first is forgotten
    assert {row.outcome for _, row in books.moved(100.0)} == {"refused"}


def test_between_full_rounds_only_drains_and_prefills_are_seen_to() -> None:
    books = Mobility(prefill_replicas=1)
    assert [books.role(name) for name in ("replica-0", "replica-1")] == [Role.PREFILL, Role.DECODE]
    c = Route("replica-2", 1)
    places = books.places([shot(A, 20), shot(B, 80), shot(c, 10)], [], 0.0)
    assert books.looked_at(places, None, leisure=False) == [A]
    assert books.looked_at(places, None, leisure=True) == [A, B]
    y = X._replace(request_id="y")
    quick = books.plan(places, {A: [X], B: [y]}, None, False, FRESH_S)
    assert [(m.request_id, m.reason) for m in quick] == [("x", Reason.DISAGGREGATE)]
