"""Which replica goes when there are too many. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable

from .rebalancing import Place, Role


def cheapest_to_empty(places: Iterable[Place], among: Container[str] | None = None) -> Place | None:
    """The one with the fewest pages to move, whose sequences find seats and pages at those that stay; None: there is none.

    `among` are the replicas that may go; None: any.
    What replicas that are being emptied still have needs room there, too. Each sequence takes a page to grow into. What prefills stays, and
    so does the last of all.
    """
    known = list(places)
    open_ = [p for p in known if not p.draining and p.role is not Role.PREFILL]
    going = [p for p in known if p.draining]
    candidates = [p for p in open_ if among is None or p.route.replica_id in among]
    for place in sorted(candidates, key=_cost):
        stay = [p for p in open_ if p is not place]
        pages = sum(_pages(p) + p.running + p.waiting for p in (place, *going))
        sequences = sum(p.running + p.waiting for p in (place, *going))
        if stay and pages <= sum(max(p.left, 0) for p in stay) and sequences <= sum(max(p.seats, 0) for p in stay):
            return place
    return None


def least_held(places: Iterable[Place], among: Container[str]) -> Place | None:
    """Of the replicas `among` the one with the fewest pages to move, whether or not they find room."""
    return min((p for p in places if not p.draining and p.route.replica_id in among), key=_cost, default=None)


def idle(places: Iterable[Place]) -> Place | None:
    """One that holds nothing, the last of them."""
    empty = [p for p in places if not p.draining and p.running + p.waiting == 0 and p.role is not Role.PREFILL]
    return max(empty, key=_number, default=None)


def _cost(place: Place) -> tuple[int, int, int]:
    return _pages(place), place.running + place.waiting, -_number(place)


def _pages(place: Place) -> int:
    """Pages that are spoken for; none when it holds nothing."""
    return place.total - place.left if place.running + place.waiting else 0


def _number(place: Place) -> int:
    return int(place.route.replica_id.rpartition("-")[2])
