"""Which replica goes: a table of clusters."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from quire.cluster.messages import Route
from quire.cluster.rebalancing import Place, Role
from quire.cluster.scale_in import cheapest_to_empty, least_held


def at(number: int, left: int, running: int = 4, **more: object) -> Place:
    usual = {"page_size": 10, "total": 100, "seats": 8, "waiting": 0}
    return Place(Route(f"replica-{number}", 1), left=left, running=running, **(usual | more))  # type: ignore[arg-type]


class Case(NamedTuple):
    places: list[Place]
    goes: int | None


CASES = {
    "none": Case([], None),
    "the last of all stays while it holds something": Case([at(0, 60)], None),
    "the fewest pages": Case([at(0, 60), at(1, 70), at(2, 50)], 1),
    "of equals the fewest sequences": Case([at(0, 60, 4), at(1, 60, 3), at(2, 60, 5)], 1),
    "of equals the latest": Case([at(0, 100, 0), at(1, 100, 0), at(2, 100, 0)], 2),
    "what it holds does not fit elsewhere": Case([at(0, 30), at(1, 30)], None),
    "and a page for each of its sequences": Case([at(0, 52), at(1, 51)], None),
    "fits exactly": Case([at(0, 52), at(1, 52)], 1),
    "no seats": Case([at(0, 60, seats=3), at(1, 70, seats=3)], None),
    "what is being emptied needs the room, too": Case([at(0, 60), at(1, 70), at(2, 50, draining=True)], None),
    "the next cheapest, since the cheapest is where the room is": Case([at(0, 95, 1), at(1, 90, 20, seats=30), at(2, 93, 9, seats=0)], 0),
    "what prefills stays": Case([at(0, 90, role=Role.PREFILL), at(1, 60, role=Role.DECODE), at(2, 70, role=Role.DECODE)], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_goes(name: str) -> None:
    places, goes = CASES[name]
    found = cheapest_to_empty(places)
    assert (found and found.route.replica_id) == (None if goes is None else f"replica-{goes}")


def test_among_some() -> None:
    places = [at(0, 60), at(1, 70), at(2, 50)]
    found = cheapest_to_empty(places, {"replica-0", "replica-2"})
    assert found is not None
    assert found.route.replica_id == "replica-0"
    assert cheapest_to_empty(places, set()) is None


def test_the_least_held_goes_even_where_nothing_fits() -> None:
    places = [at(0, 30), at(1, 40), at(2, 10), at(3, 90, draining=True)]
    assert cheapest_to_empty(places) is None
    found = least_held(places, {"replica-0", "replica-2", "replica-3"})
    assert found is not None
    assert found.route.replica_id == "replica-0"
    assert least_held(places, set()) is None
