"""The questions of ingresses: asked once, answered as often as asked, forgotten when nobody asks."""

from __future__ import annotations

from quire.cluster.admissions import KEPT_S, Admissions
from quire.cluster.messages import AdmitRequest

ROUTE = ("route", "replica-0", 1)


def request(name: str = "a", attempt: int = 0) -> AdmitRequest:
    return AdmitRequest(name, attempt, "", 0, 0.0, None, 1, 3, 5, 8)


def test_a_question_is_new_once_and_its_answer_can_be_fetched_again() -> None:
    admissions = Admissions()
    assert admissions.ask(request(), 0.0)
    assert not admissions.ask(request(), 5.0)
    assert admissions.fetch("a", 0) is None
    admissions.decide("a", 0, ROUTE)
    assert not admissions.ask(request(), 6.0)
    assert admissions.fetch("a", 0) == ROUTE
    assert admissions.fetch("a", 0) == ROUTE


def test_a_later_attempt_takes_the_place_of_an_earlier_one() -> None:
    admissions = Admissions()
    admissions.ask(request(attempt=0), 0.0)
    assert admissions.ask(request(attempt=1), 1.0)
    admissions.decide("a", 0, ROUTE)  # decided too late
    assert (admissions.fetch("a", 0), admissions.fetch("a", 1)) == (None, None)
    assert (admissions.superseded("a", 0), admissions.superseded("a", 1)) == (True, False)
    assert not admissions.ask(request(attempt=0), 2.0)
    admissions.decide("a", 1, ROUTE)
    assert admissions.fetch("a", 1) == ROUTE


def test_asking_for_an_earlier_attempt_keeps_nothing_open() -> None:
    admissions = Admissions()
    admissions.ask(request(attempt=1), 0.0)
    assert not admissions.ask(request(attempt=0), KEPT_S)
    assert admissions.expire(KEPT_S + 0.1) == ["a"]
    assert admissions.ask(request(attempt=0), KEPT_S + 0.2)


def test_a_withdrawn_question_is_closed() -> None:
    admissions = Admissions()
    admissions.ask(request(), 0.0)
    admissions.withdraw("a")
    admissions.decide("a", 0, ROUTE)
    assert admissions.superseded("a", 0)
    assert admissions.ask(request(), 1.0)


def test_what_nobody_asks_any_more_is_forgotten_and_named_unless_its_answer_was_fetched() -> None:
    admissions = Admissions()
    for name in ("open", "unheard", "heard", "young"):
        admissions.ask(request(name), 10.0 if name == "young" else 0.0)
    admissions.decide("unheard", 0, ROUTE)
    admissions.decide("heard", 0, ROUTE)
    admissions.fetch("heard", 0)
    assert not admissions.ask(request("young"), 12.0)
    assert admissions.expire(KEPT_S) == []
    assert admissions.expire(KEPT_S + 0.1) == ["open", "unheard"]
    assert admissions.superseded("heard", 0)
    assert admissions.expire(KEPT_S + 11.0) == []  # it was asked again at 12
    assert admissions.expire(KEPT_S + 12.1) == ["young"]
