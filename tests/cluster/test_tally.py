"""What operators see counted."""

from __future__ import annotations

from itertools import product

import pytest

from quire.cluster import tally
from quire.cluster.tally import Tally
from quire.cluster.tenants import CountedTenants, RateLimited
from quire.worker.protocol import BadRequest, DeadlineExceeded, EventFrame, Overloaded, ReplicaLoad, ReplicaLost

LOAD = ReplicaLoad(1, 0, 8, 4, 0, 4, 0, 0, 0, 0, 0.0, 0.0, 1)


def frame(served: dict[str, int], epoch: int = 1) -> EventFrame:
    return EventFrame("replica-0", epoch, 0, 0, False, (), (), (), (), served, LOAD)


def test_refusals_are_counted_by_reason_and_expiries_apart() -> None:
    counted = Tally()
    errors = (Overloaded("full", 1.0), RateLimited("slower", 1.0), BadRequest("n", "too many"), DeadlineExceeded(), ReplicaLost())
    for tenant, error in (*product("ab", errors), ("a", errors[0])):
        counted.refused(tenant, error)
    figures = counted.figures(3, 70)
    assert (figures.refused, figures.expired) == (
        {("a", "overloaded"): 2, ("b", "overloaded"): 1} | {(t, why): 1 for t in "ab" for why in ("rate", "too_large")},
        2,
    )
    assert (figures.queue_requests, figures.queue_tokens) == (3, 70)


def test_tokens_are_counted_once_over_frames_and_lives() -> None:
    counted = Tally()
    for served in ({"a": 5}, {"a": 8, "b": 1}, {"a": 8, "b": 1}):
        counted.served(frame(served))
    counted.ended("replica-0", 1)
    counted.served(frame({"a": 2}, epoch=2))
    assert counted.figures(0, 0).served_tokens == {"a": 10, "b": 1}


def test_tenants_without_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "CountedTenants", lambda: CountedTenants(2))
    counted = Tally()
    counted.served(frame({"a": 1, "b": 2, "c": 3, "d": 4}))
    counted.served(frame({"a": 2, "b": 2, "c": 4, "d": 4}))
    counted.refused("e", Overloaded("full", 1.0))
    assert counted.figures(0, 0).served_tokens == {"a": 2, "b": 2, "others": 8}
    assert counted.figures(0, 0).refused == {("others", "overloaded"): 1}
