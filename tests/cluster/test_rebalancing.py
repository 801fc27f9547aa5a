"""What moves where: a table of clusters, and the exact moves."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from quire.cluster.ledger import Totals
from quire.cluster.messages import Route
from quire.cluster.policies import snapshot
from quire.cluster.rebalancing import Move, Need, Place, Reason, Relief, Role, looked_at, place, plan, relief, size
from quire.worker.protocol import LiveRequest, ModelInfo, ReplicaLoad

A, B, C = Route("a", 1), Route("b", 1), Route("c", 1)


def at(route: Route, left: int, **more: object) -> Place:
    usual = {"page_size": 10, "total": 100, "seats": 8, "running": 4, "waiting": 0}
    return Place(route, left=left, **(usual | more))  # type: ignore[arg-type]


def runs(name: str, pages: int, state: str = "running", priority: int = 0, sequences: int = 1) -> LiveRequest:
    """A request of so many full pages; it takes one more for each sequence where it goes."""
    return LiveRequest(name, "", priority, state, sequences, pages * 10, 0, pages if state == "running" else 0)


class Case(NamedTuple):
    places: list[Place]
    requests: dict[Route, list[LiveRequest]]
    moves: list[tuple[str, Route, Reason]]
    need: Need | None = None
    cooling: tuple[str, ...] = ()


CASES = {
    "balanced": Case([at(A, 40), at(B, 50)], {A: [runs("x", 5)]}, []),
    "rebalance: what halves the gap goes": Case(
        [at(A, 20), at(B, 80)], {A: [runs("small", 4), runs("half", 29), runs("huge", 70)]}, [("half", B, Reason.REBALANCE)]
    ),
    "rebalance: as long as the gap is worth it": Case(
        [at(A, 20), at(B, 80)],
        {A: [runs("p", 9), runs("q", 9), runs("r", 9), runs("s", 9)]},
        [("p", B, Reason.REBALANCE), ("q", B, Reason.REBALANCE), ("r", B, Reason.REBALANCE)],
    ),
    "rebalance: a move that swaps the roles of the two is none": Case([at(A, 20), at(B, 90)], {A: [runs("all", 79)]}, []),
    "rebalance: from the fullest to the emptiest": Case(
        [at(A, 50), at(B, 10), at(C, 60)], {B: [runs("x", 20)], A: [runs("y", 20)]}, [("x", C, Reason.REBALANCE)]
    ),
    "rebalance: not while even the fullest has room for all": Case([at(A, 55), at(B, 99)], {A: [runs("x", 20)]}, []),
    "rebalance: unless it lets some wait for a seat": Case(
        [at(A, 55, waiting=1), at(B, 99)], {A: [runs("x", 20)]}, [("x", B, Reason.REBALANCE)]
    ),
    "rebalance: not twice within the cooldown": Case([at(A, 20), at(B, 80)], {A: [runs("x", 20)]}, [], cooling=("x",)),
    "rebalance: not without seats": Case([at(A, 20), at(B, 80, seats=1)], {A: [runs("x", 20, sequences=2)]}, []),
    "fill: the newcomer gets its share": Case(
        [at(A, 20), at(B, 100, ready_s=3.0, running=0)], {A: [runs("x", 30)]}, [("x", B, Reason.FILL)]
    ),
    "drain: all goes, urgent first, to whoever has most left": Case(
        [at(A, 50, draining=True), at(B, 60), at(C, 57)],
        {A: [runs("x", 9), runs("y", 4), runs("first", 1, priority=-1), runs("later", 2, "waiting")]},
        [("first", B, Reason.DRAIN), ("x", B, Reason.DRAIN), ("y", C, Reason.DRAIN), ("later", C, Reason.DRAIN)],
    ),
    "drain: what fits nowhere stays, also within the cooldown the rest goes": Case(
        [at(A, 50, draining=True), at(B, 10)], {A: [runs("x", 30), runs("y", 4)]}, [("y", B, Reason.DRAIN)], cooling=("y",)
    ),
    "drain: nobody gives to who is leaving": Case([at(A, 90, draining=True, running=0), at(B, 5)], {B: [runs("x", 40)]}, []),
    "disaggregate: what has begun": Case(
        [at(A, 50, role=Role.PREFILL), at(B, 60, role=Role.DECODE)],
        {A: [runs("x", 9), runs("y", 4, "waiting")]},
        [("x", B, Reason.DISAGGREGATE)],
    ),
    "disaggregate: without room it goes on where it is": Case(
        [at(A, 50, role=Role.PREFILL), at(B, 5, role=Role.DECODE)], {A: [runs("x", 9)]}, []
    ),
    "disaggregate: never to another that prefills": Case(
        [at(A, 50, role=Role.PREFILL), at(B, 90, role=Role.PREFILL)], {A: [runs("x", 9)]}, []
    ),
    "defragment: somebody makes way for what waits in the controller": Case(
        [at(A, 30), at(B, 35), at(C, 34)],
        {A: [runs("x", 20)], B: [runs("y", 9), runs("z", 15)], C: [runs("w", 30)]},
        [("z", C, Reason.DEFRAGMENT)],
        Need(50, 600),
    ),
    "defragment: not when the cluster has not got the pages": Case(
        [at(A, 20), at(B, 25)], {A: [runs("x", 30)], B: [runs("y", 30)]}, [], Need(60, 600)
    ),
    "defragment: not for what no replica could ever hold": Case([at(A, 45), at(B, 45)], {A: [runs("x", 9)], B: []}, [], Need(50, 1001)),
    "defragment: what waits at a replica goes where the pages are": Case(
        [at(A, -10, waiting=1), at(B, 0), at(C, 30)], {A: [runs("long", 20, "waiting"), runs("x", 4)]}, [("long", C, Reason.DEFRAGMENT)]
    ),
    "defragment: or its neighbours make way": Case(
        [at(A, -12, waiting=1), at(B, 10), at(C, 8)],
        {A: [runs("long", 40, "waiting"), runs("x", 4), runs("y", 7), runs("z", 6)]},
        [("y", B, Reason.DEFRAGMENT), ("z", C, Reason.DEFRAGMENT)],
    ),
    "isolate: the least urgent make way for headroom": Case(
        [at(A, 4), at(B, 12)],
        {A: [runs("urgent", 20, priority=-1), runs("x", 9, priority=1), runs("y", 5, priority=2)]},
        [("y", B, Reason.ISOLATE)],
    ),
    "isolate: nothing urgent, nothing moves": Case([at(A, 4), at(B, 12)], {A: [runs("x", 5, priority=1), runs("y", 5)]}, []),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_moves(case: Case) -> None:
    moves = plan(case.places, case.requests, lambda name: name in case.cooling, case.need)
    assert [(m.request_id, m.destination, m.reason) for m in moves] == case.moves
    sources = {r.request_id: route for route, some in case.requests.items() for r in some}
    assert all(m.source == sources[m.request_id] for m in moves)
    assert {m.source for m in moves} <= set(looked_at(case.places, case.need))


def test_rebalancing_settles() -> None:
    """What has been moved is not moved back: after at most a few rounds there is nothing to do."""
    places = {A: at(A, 0), B: at(B, 100), C: at(C, 70)}
    requests = {A: [runs(f"a{i}", 3 + i % 5) for i in range(16)], B: [], C: [runs(f"c{i}", 4) for i in range(6)]}
    gaps = []
    for _ in range(6):
        moves = plan(places.values(), requests, lambda _: False)
        for move in moves:
            (request,) = (r for r in requests[move.source] if r.request_id == move.request_id)
            requests[move.source].remove(request)
            requests[move.destination].append(request)
            places[move.source] = places[move.source]._replace(left=places[move.source].left + move.pages)
            places[move.destination] = places[move.destination]._replace(left=places[move.destination].left - move.pages)
        usage = sorted(p.usage for p in places.values())
        gaps.append(usage[-1] - usage[0])
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.15
    assert not moves


def test_a_move_says_what_it_takes() -> None:
    assert plan([at(A, 20), at(B, 80)], {A: [runs("x", 20, sequences=2)]}, lambda _: False) == [Move("x", A, B, Reason.REBALANCE, 22, 2)]
    assert size(LiveRequest("w", "", 0, "waiting", 2, 25, 6, 0), 10) == 4 + 2


def test_nothing_is_looked_at_while_nothing_is_to_be_done() -> None:
    assert looked_at([at(A, 40), at(B, 50)]) == []
    assert looked_at([at(A, 60), at(B, 90)]) == []
    assert looked_at([at(A, 40), at(B, 90)]) == [A]
    assert looked_at([at(A, 40), at(B, 50, waiting=1)]) == [B]
    assert looked_at([at(A, 40), at(B, 50, role=Role.PREFILL)]) == [B]
    assert looked_at([at(A, 5)]) == []  # there is nowhere to go
    assert looked_at([at(A, 40, draining=True), at(B, 50)]) == [A]
    assert looked_at([at(A, 40), at(B, 50)], Need(60, 700)) == [A, B]


def test_a_place_is_what_routing_knows_less_what_is_leaving() -> None:
    load = ReplicaLoad(6, 1, 100, 10, 20, 70, 0, 0, 30, 0, 0.0, 0.0, 9)
    info = ModelInfo("m", "", 1000, 9, (), 0, page_size=10, pool_tokens=1000, max_running=16)
    shot = snapshot(A, info, load, Totals(2, 40, 5))
    assert place(shot, Role.BOTH, False) == at(A, 30 - 3 - 5 - 1, seats=16 - 6 - 3, running=6, waiting=1)
    assert place(shot, Role.BOTH, False, leaving_pages=8, leaving_sequences=1).left == 29


def test_relief_is_where_there_is_room_and_for_one_alone() -> None:
    places = [at(A, 5), at(B, 2), at(C, 40)]
    assert relief(places) == {B: Relief(C, 30), A: None, C: None}
    assert relief([at(A, 2), at(B, 20)]) == {A: Relief(B, 10), B: None}  # nearly full, both, and one of them less so
    assert relief([at(A, 5), at(B, 12)]) == {A: None, B: None}
    assert relief([at(A, 5), at(B, 9)]) == {A: None, B: None}
    assert relief([at(A, -40), at(B, 9)]) == {A: None, B: None}
    assert relief([at(A, 2), at(B, 60, role=Role.PREFILL)]) == {A: None, B: None}
    assert relief([at(A, 5), at(B, 90, draining=True)]) == {A: None, B: None}
