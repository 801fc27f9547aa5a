"""The cluster's queue, over a router that says where there is room: order, limits, refusals, lost answers, lost replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from quire.cluster.global_scheduler import Decision, GlobalScheduler
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.queue_gate import QueueLimits
from quire.cluster.routing import Choice
from quire.cluster.running_requests import START_TIMEOUT_S
from quire.cluster.tenants import TenantLimits, TenantTable
from quire.worker.protocol import BadRequest, DeadlineExceeded, EventFrame, LiveRequest, Overloaded, ReplicaLoad

PAGE = 16
A1 = Route("a", 1)


@dataclass
class Rooms:
    """A router with so many rooms on replica `a`; `cached` prompt tokens of every request."""

    rooms: int = 0
    largest: int = 1000
    cached: int = 0
    place: Route = A1
    chosen: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    removed: list[tuple[str, int]] = field(default_factory=list)
    frames: int = 0

    def choose(self, request: AdmitRequest, now_s: float) -> Choice | None:
        if not self.rooms:
            return None
        self.rooms -= 1
        self.chosen.append(request.request_id)
        return Choice(*self.place, self.cached, 0.0)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def remove(self, replica_id: str, epoch: int) -> None:
        self.removed.append((replica_id, epoch))

    def events(self, frame: EventFrame, now_s: float) -> None:
        self.frames += 1

    def largest_tokens(self) -> int:
        return self.largest


def asked(request_id: str, tenant: str = "t", **fields: object) -> AdmitRequest:
    request = AdmitRequest(request_id, 0, tenant, 0, 0.0, None, 1, 10, 10, 20)._replace(**fields)
    return request._replace(longest_tokens=request.prompt_tokens + request.max_tokens)


def live(request_id: str, tenant: str = "t", prompt: int = 10, output: int = 0) -> LiveRequest:
    return LiveRequest(request_id, tenant, 0, "running", 1, prompt, output, 1)


class Bench:
    """A scheduler, its router, and replica `a` as it reports."""

    def __init__(self, *tenants: TenantLimits, order: str = "fair", limits: QueueLimits = QueueLimits(100, 10_000)) -> None:  # noqa: B008
        self.router = Rooms()
        self.scheduler = GlobalScheduler(self.router, TenantTable(tenants, PAGE), limits, order)
        self.now_s = 0.0
        self._next = 0

    def offer(self, *requests: AdmitRequest) -> None:
        for request in requests:
            self.scheduler.offer(request, self.now_s)

    def sent(self, rooms: int) -> list[str]:
        """The ids that leave when there are so many rooms."""
        self.router.rooms = rooms
        return [d.request_id for d in self.dispatch() if isinstance(d.outcome, Route)]

    def dispatch(self) -> list[Decision]:
        return self.scheduler.dispatch(self.now_s)

    def report(
        self,
        started: tuple[LiveRequest, ...] = (),
        ended: tuple[tuple[str, int], ...] = (),
        served: dict[str, int] | None = None,
        *,
        route: Route = A1,
        dump: bool = False,
        steps: int = 0,
    ) -> None:
        after, self._next = self._next, self._next + len(started) + len(ended)
        load = ReplicaLoad(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, steps)
        frame = EventFrame(route.replica_id, route.epoch, after, self._next, dump, (), (), started, ended, served or {}, load)
        self.scheduler.events(frame, self.now_s)

    def status(self, tenant: str = "t") -> tuple[int, int, int]:
        """(waiting, running, pages)"""
        found = next((s for s in self.scheduler.tenants() if s.name == tenant), None)
        return (found.waiting, found.running, found.pages) if found else (0, 0, 0)

    def served(self, tenant: str) -> float:
        return next(s.served for s in self.scheduler.tenants() if s.name == tenant)


# --- order ---


def test_resumed_then_priority_then_arrival() -> None:
    b = Bench()
    b.offer(asked("late"), asked("early", waited_s=5.0), asked("urgent", priority=-1), asked("batch", priority=7))
    b.offer(asked("lost", attempt=1, resumed=True, priority=9))
    assert b.sent(0) == []
    assert b.sent(9) == ["lost", "urgent", "early", "late", "batch"]
    assert b.dispatch() == []


def test_tenants_take_turns_by_what_they_have_been_served() -> None:
    b = Bench()
    b.offer(*(asked(f"flood-{i}", "flood") for i in range(4)), asked("small-0", "small"), asked("small-1", "small"))
    assert b.sent(9) == ["flood-0", "small-0", "flood-1", "small-1", "flood-2", "flood-3"]


def test_by_arrival_the_flood_goes_first() -> None:
    b = Bench(order="fcfs")
    b.offer(*(asked(f"flood-{i}", "flood") for i in range(4)), asked("small-0", "small"))
    assert b.sent(9) == ["flood-0", "flood-1", "flood-2", "flood-3", "small-0"]


def test_weights_and_prompt_lengths_count() -> None:
    b = Bench(TenantLimits("heavy", weight=2.0))
    b.offer(*(asked(f"h{i}", "heavy") for i in range(4)), *(asked(f"l{i}", "light") for i in range(2)))
    assert b.sent(9) == ["h0", "l0", "h1", "h2", "l1", "h3"]
    b = Bench()
    b.offer(asked("long", "a", prompt_tokens=40), asked("a1", "a"), *(asked(f"b{i}", "b") for i in range(5)))
    assert b.sent(9) == ["long", "b0", "b1", "b2", "b3", "a1", "b4"]


def test_cached_tokens_are_free() -> None:
    b = Bench()
    b.router.cached = 8
    b.offer(asked("x", prompt_tokens=10))
    assert b.sent(1) == ["x"]
    assert b.served("t") == 2.0


def test_output_is_charged_as_it_is_reported_and_once() -> None:
    b = Bench()
    b.offer(asked("x"))
    b.sent(1)
    b.report(served={"t": 100, "u": 7}, dump=True)
    assert b.served("t") == 10.0, "what a life has served before it was known is not charged here"
    b.report((live("x"),), served={"t": 104}, steps=1)
    b.report(served={"t": 104}, steps=1)
    assert b.served("t") == 18.0
    b.report(served={"t": 90}, steps=0)
    assert b.served("t") == 18.0, "an overtaken frame"
    b._next = 0
    b.report(served={"t": 90}, steps=1)
    assert b.served("t") == 18.0, "and one that only its number tells"
    b._next = 1
    b.report(served={"t": 105, "new": 3}, steps=2)
    assert b.served("t") == 20.0
    assert b.served("new") == 6.0
    b.report(served={"t": 2}, steps=3)
    assert b.served("t") == 24.0, "the replica had forgotten the tenant, and starts from 0"


def test_whoever_is_next_is_waited_for() -> None:
    b = Bench()
    b.offer(asked("large", "a", prompt_tokens=500), asked("small", "b", prompt_tokens=1))
    assert b.sent(0) == []
    assert b.sent(1) == ["large"]


def test_a_resumed_request_pays_nothing_again() -> None:
    b = Bench()
    b.offer(asked("x"))
    b.sent(1)
    b.report(dump=True)
    b.scheduler.replica_lost("a", 1, 0.0)
    assert b.router.removed == [("a", 1)]
    assert b.status() == (0, 0, 0)
    b.router.place = Route("b", 5)
    b.offer(asked("x", attempt=1, resumed=True, prompt_tokens=15))
    assert b.sent(1) == ["x"]
    assert b.served("t") == 10.0
    assert b.status() == (0, 1, 1)


def test_a_stale_route_asked_again_pays_nothing_again() -> None:
    b = Bench()
    b.offer(asked("x"))
    b.sent(1)
    b.offer(asked("x", attempt=1, avoid=("a",)))
    assert b.router.forgotten == ["x"]
    assert b.status() == (1, 0, 0)
    assert b.sent(1) == ["x"]
    assert b.served("t") == 10.0


# --- asking again ---


def test_the_same_question_again_changes_nothing() -> None:
    b = Bench()
    b.offer(asked("x"), asked("y"))
    b.now_s = 3.0
    b.offer(asked("x", waited_s=3.0))
    assert [r.request_id for r in b.scheduler.waiting()] == ["x", "y"]
    assert b.sent(9) == ["x", "y"]


def test_a_lost_answer_is_given_again_until_the_request_has_ended() -> None:
    b = Bench()
    b.offer(asked("x"))
    b.router.rooms = 1
    first = b.dispatch()
    assert first == [Decision("x", 0, A1)]
    b.offer(asked("x"))
    assert b.scheduler.next_s(0.0) == 0.0
    assert b.dispatch() == first
    assert b.dispatch() == []
    assert b.router.chosen == ["x"]
    b.offer(asked("x"))
    b.scheduler.withdraw("x")
    assert b.dispatch() == []


def test_an_earlier_attempt_that_comes_late_says_nothing() -> None:
    b = Bench()
    b.offer(asked("x", attempt=2))
    b.offer(asked("x", attempt=1))
    b.router.rooms = 5
    assert b.dispatch() == [Decision("x", 2, A1)]
    b.offer(asked("x", attempt=1))
    assert b.dispatch() == []


def test_who_leaves_is_forgotten_wherever_it_is() -> None:
    b = Bench()
    b.offer(asked("waits"), asked("goes"))
    b.scheduler.withdraw("waits")
    assert b.sent(9) == ["goes"]
    assert b.status() == (0, 1, 1)
    b.scheduler.withdraw("goes")
    b.scheduler.withdraw("never seen")
    assert b.router.forgotten == ["goes"]
    assert b.status() == (0, 0, 0)
    assert b.scheduler.next_s(0.0) is None


# --- refusals ---


def test_what_no_replica_can_hold_is_refused_at_once() -> None:
    b = Bench()
    b.offer(asked("fits", prompt_tokens=990))
    with pytest.raises(BadRequest, match="max_tokens: prompt and output of 1001 tokens; a replica can hold 1000"):
        b.offer(asked("never", prompt_tokens=991))
    b.router.largest = 0
    b.offer(asked("nobody knows", prompt_tokens=9000))


def test_what_no_replica_can_hold_any_more_keeps_nobody_waiting() -> None:
    b = Bench()
    b.offer(asked("large", prompt_tokens=900), asked("small"))
    b.router.largest, b.router.rooms = 500, 1
    large, small = b.dispatch()
    assert isinstance(large.outcome, BadRequest)
    assert small == Decision("small", 0, A1)


def test_a_full_queue_refuses_by_requests_and_by_tokens() -> None:
    b = Bench(limits=QueueLimits(2, 100))
    b.offer(asked("x", prompt_tokens=60))
    with pytest.raises(Overloaded, match="the queue is full: 1 requests with 60 prompt tokens wait") as refused:
        b.offer(asked("y", prompt_tokens=41))
    assert refused.value.retry_after_s == 1.0
    b.offer(asked("y", prompt_tokens=1))
    with pytest.raises(Overloaded, match="2 requests"):
        b.offer(asked("z", prompt_tokens=1))
    assert b.scheduler.queued_tokens() == 61
    assert b.sent(2) == ["x", "y"]
    b.offer(asked("alone", prompt_tokens=900))


def test_retry_after_is_the_backlog_over_the_drain_rate() -> None:
    b = Bench(limits=QueueLimits(40, 10**6, 1e9))
    b.offer(*(asked(f"r{i}") for i in range(40)))
    b.sent(0)
    for second in range(1, 31):
        b.now_s = float(second)
        assert len(b.sent(4)) == 4
        b.offer(*(asked(f"{second}-{i}") for i in range(4)))
        b.sent(0)
    with pytest.raises(Overloaded) as refused:
        b.offer(asked("x"))
    assert refused.value.retry_after_s == pytest.approx(10.0, rel=0.1)


def test_who_would_wait_too_long_is_told_at_once() -> None:
    b = Bench(limits=QueueLimits(10**6, 10**9, 5.0), order="fcfs")
    b.offer(*(asked(f"r{i}") for i in range(8)))
    b.sent(0)
    for second in range(1, 31):
        b.now_s = float(second)
        b.sent(1)
        b.offer(asked(f"s{second}", attempt=1))  # keeps the line at eight; it has been let in before
    with pytest.raises(Overloaded, match=r"would wait about 7\.\d s for its turn, longer than 5\.0 s") as refused:
        b.offer(asked("x"))
    assert 7.0 < refused.value.retry_after_s < 8.0
    assert b.sent(6) != []
    b.offer(asked("y"))
    with pytest.raises(Overloaded, match=r"would wait about 2\.\d s for its turn, too long for a deadline in 4\.0 s"):
        b.offer(asked("z", deadline_s=4.0))
    b.offer(asked("z", deadline_s=8.0))


def test_only_its_own_line_stands_before_a_tenant() -> None:
    b = Bench(limits=QueueLimits(10**6, 10**9, 3.0))
    b.offer(*(asked(f"r{i}", "flood") for i in range(8)))
    b.sent(0)
    for second in range(1, 31):
        b.now_s = float(second)
        b.sent(1)
        b.offer(asked(f"s{second}", "flood", attempt=1))
    with pytest.raises(Overloaded):
        b.offer(asked("x", "flood"))
    b.offer(asked("first", "small"))
    b.offer(asked("urgent", "flood", priority=-1))


def test_a_flood_keeps_nobody_out_of_a_full_queue() -> None:
    b = Bench(limits=QueueLimits(4, 10_000))
    b.offer(*(asked(f"f{i}", "flood") for i in range(4)))
    b.offer(asked("s0", "small"), asked("s1", "small"))
    with pytest.raises(Overloaded):
        b.offer(asked("s2", "small"))
    with pytest.raises(Overloaded):
        b.offer(asked("f4", "flood"))
    with pytest.raises(Overloaded):
        b.offer(asked("low", "other", priority=1))  # whoever comes later goes after all of them
    decisions = b.dispatch()
    assert [d.request_id for d in decisions] == ["f3", "f2"]
    assert all(isinstance(d.outcome, Overloaded) for d in decisions)
    assert b.sent(9) == ["f0", "s0", "f1", "s1"]


def test_a_high_priority_finds_room_in_a_full_queue_and_what_was_lost_keeps_its_own() -> None:
    b = Bench(limits=QueueLimits(2, 10_000), order="fcfs")
    b.offer(asked("lost", resumed=True, attempt=1), asked("batch", priority=1))
    with pytest.raises(Overloaded):
        b.offer(asked("batch-2", priority=1))
    b.offer(asked("normal"))
    with pytest.raises(Overloaded):
        b.offer(asked("normal-2"))
    assert [d.request_id for d in b.dispatch()] == ["batch"]
    b.offer(asked("urgent", priority=-5))
    assert [d.request_id for d in b.dispatch()] == ["normal"]
    b.offer(asked("lost-2", resumed=True, attempt=1))  # over the bound: it has been let in before
    assert b.sent(9) == ["lost", "lost-2", "urgent"]


def test_nobody_is_sent_away_for_a_request_that_does_not_fit_even_so() -> None:
    b = Bench(limits=QueueLimits(10, 100))
    b.offer(asked("f0", "flood", prompt_tokens=30), asked("f1", "flood", prompt_tokens=30), asked("f2", "flood", prompt_tokens=30))
    with pytest.raises(Overloaded):
        b.offer(asked("s", "small", prompt_tokens=80))
    assert b.dispatch() == []
    assert len(b.scheduler.waiting()) == 3


# --- deadlines ---


def test_an_expired_request_is_told_what_it_waited_for() -> None:
    b = Bench()
    b.offer(asked("x", waited_s=0.5, deadline_s=1.0), asked("y", deadline_s=3.0), asked("z"))
    assert b.scheduler.next_s(0.0) == 1.0
    b.now_s = 0.99
    assert b.dispatch() == []
    b.now_s = 1.0
    (decision,) = b.dispatch()
    assert decision.request_id == "x"
    assert isinstance(decision.outcome, DeadlineExceeded)
    assert str(decision.outcome) == "deadline_ms: the request has waited 1500 ms for its turn; it had 1500 ms"
    assert b.scheduler.next_s(1.0) == 2.0
    assert b.sent(9) == ["y", "z"]
    assert b.scheduler.next_s(1.0) == START_TIMEOUT_S


def test_a_deadline_that_has_passed_on_the_way_and_one_that_was_met_before() -> None:
    b = Bench()
    with pytest.raises(DeadlineExceeded, match="has waited 2000 ms for its turn; it had 1500 ms"):
        b.offer(asked("x", waited_s=2.0, deadline_s=-0.5))
    b.offer(asked("lost", attempt=1, resumed=True, deadline_s=-0.5))
    b.now_s = 50.0
    assert b.sent(1) == ["lost"]


# --- tenants' limits ---


def test_a_tenant_at_its_own_limit_is_passed_over_and_goes_on_when_one_of_its_ends() -> None:
    b = Bench(TenantLimits("t", max_concurrent=1))
    b.offer(asked("t0"), asked("t1"), asked("t2"), asked("u0", "u"))
    assert b.sent(9) == ["t0", "u0"]
    b.report(dump=True)
    b.report((live("t0"),))
    assert b.sent(9) == []
    b.report(ended=(("t0", 5),))
    assert b.sent(9) == ["t1"]
    b.scheduler.withdraw("t1")
    assert b.sent(9) == ["t2"]
    assert b.scheduler.waiting() == []


def test_who_waits_for_its_own_limit_saves_nothing_up() -> None:
    b = Bench(TenantLimits("t", max_concurrent=1))
    b.offer(asked("t0"), asked("t1"), asked("u0", "u"))
    b.sent(2)
    for i in range(1, 9):
        b.offer(asked(f"u{i}", "u"))
        b.sent(1)
    b.offer(asked("u9", "u"), asked("u10", "u"))
    b.report(dump=True)
    b.report(ended=(("t0", 0),))
    assert b.served("t") == b.served("u") == 90.0
    assert b.sent(3) == ["t1", "u9", "u10"]


def test_pages_are_counted_as_sequences_grow_and_given_back() -> None:
    b = Bench(TenantLimits("t", max_pages=5))
    b.report(dump=True)
    b.offer(asked("t0", prompt_tokens=32), asked("t1", prompt_tokens=32))
    assert b.sent(1) == ["t0"]
    b.report((live("t0"),), served={"t": 20}, steps=1)
    assert b.status() == (1, 1, 4)
    assert b.sent(1) == []
    b.report(ended=(("t0", 20),), served={"t": 20}, steps=2)
    assert b.status() == (1, 0, 0)
    assert b.sent(1) == ["t1"]


def test_a_request_that_alone_needs_more_pages_is_refused() -> None:
    b = Bench(TenantLimits("t", max_pages=5))
    with pytest.raises(BadRequest, match="may hold 5"):
        b.offer(asked("x", prompt_tokens=71))
    b.offer(asked("x", prompt_tokens=70))


def test_rates_are_taken_once_and_only_by_what_gets_in() -> None:
    b = Bench(TenantLimits("t", requests_per_s=1.0), limits=QueueLimits(1, 1000))
    b.offer(asked("other", "u", priority=-1))
    with pytest.raises(Overloaded, match="full"):
        b.offer(asked("x"))
    assert b.sent(1) == ["other"]
    b.offer(asked("x"))
    b.offer(asked("x"))
    b.offer(asked("x", attempt=1))
    with pytest.raises(Overloaded, match="may send 1 requests a second") as refused:
        b.offer(asked("y"))
    assert refused.value.retry_after_s == 1.0
    b.now_s = 1.0
    assert b.sent(1) == ["x"]
    b.offer(asked("y"))


def test_output_counts_against_tokens_a_minute() -> None:
    b = Bench(TenantLimits("t", tokens_per_min=100))
    b.report(dump=True)
    b.offer(asked("x"))
    b.sent(1)
    b.report((live("x"),), served={"t": 100}, steps=1)
    with pytest.raises(Overloaded, match="100 tokens a minute") as refused:
        b.offer(asked("y"))
    assert refused.value.retry_after_s == pytest.approx(12.0)


# --- what replicas say ---


def test_a_controller_that_knows_nothing_learns_from_dumps() -> None:
    b = Bench(TenantLimits("t", max_concurrent=2))
    b.report((live("x", output=20), live("y")), served={"t": 5000}, dump=True)
    assert b.status() == (0, 2, 4)
    b.offer(asked("z"))
    assert b.sent(1) == []
    b.report((live("y"),), served={"t": 5010}, dump=True, steps=1)
    assert b.sent(1) == ["z"], "x is not in the dump: it has ended"
    assert b.served("t") == 30.0
    b.offer(asked("y", attempt=1, resumed=True))
    assert b.status() == (1, 1, 1)


def test_a_request_that_starts_and_ends_between_two_polls_has_ended() -> None:
    b = Bench()
    b.report(dump=True)
    b.offer(asked("x"))
    b.sent(1)
    b.report(ended=(("x", 3),), served={"t": 3}, steps=1)
    assert b.status() == (0, 0, 0)
    assert b.served("t") == 16.0


def test_what_does_not_arrive_is_given_up() -> None:
    b = Bench(TenantLimits("t", max_concurrent=1))
    b.offer(asked("x"), asked("y"))
    assert b.sent(2) == ["x"]
    assert b.scheduler.next_s(0.0) == START_TIMEOUT_S
    b.now_s = START_TIMEOUT_S
    assert b.sent(1) == ["y"]
    assert b.router.forgotten == ["x"]
    b.report((live("x"),), dump=True)  # it comes after all
    assert b.status() == (0, 2, 2)


def test_news_of_an_ended_life_changes_nothing() -> None:
    b = Bench()
    b.report(dump=True)
    b.offer(asked("x"))
    b.sent(1)
    b.scheduler.replica_lost("a", 1, 0.0)
    b.report((live("x"), live("ghost")), served={"t": 99}, steps=1)
    assert b.status() == (0, 0, 0)
    assert b.served("t") == 10.0
    b.router.place = Route("a", 2)
    b.offer(asked("x", attempt=1, resumed=True))
    assert b.sent(1) == ["x"]
    b.report(ended=(("x", 9),), steps=2)
    b.scheduler.replica_lost("a", 1, 0.0)
    assert b.status() == (0, 1, 1)
    b.report((live("ghost"),), route=Route("a", 3), dump=True)
    assert b.status() == (0, 1, 1), "the next life: x is gone, ghost is there"
    b.report(ended=(("ghost", 9),), route=Route("a", 3), steps=1)
    assert b.status() == (0, 0, 0)


def test_an_end_elsewhere_does_not_end_a_later_attempt() -> None:
    b = Bench()
    b.report(dump=True)
    b.offer(asked("x"))
    b.sent(1)
    b.router.place = Route("b", 1)
    b.offer(asked("x", attempt=1))
    assert b.sent(1) == ["x"]
    b.report((live("x"),))
    b.report(ended=(("x", 0),))
    assert b.status() == (0, 1, 1)


def test_books_are_empty_when_nothing_is_left() -> None:
    b = Bench(TenantLimits("t", max_concurrent=3))
    b.report(dump=True)
    for i in range(200):
        b.now_s = i * 0.1
        b.offer(asked(f"r{i}", "tu"[i % 2], deadline_s=1.0 if i % 3 else None))
        gone = b.sent(1)
        b.report(tuple(live(r, "tu"[int(r[1:]) % 2]) for r in gone), served={"t": i, "u": i}, steps=i)
        if i % 2:
            b.report(ended=tuple((r, 3) for r in gone), served={"t": i, "u": i}, steps=i)
        elif i % 5 == 0:
            b.scheduler.withdraw(gone[0] if gone else "none")
    for request in b.scheduler.waiting():
        b.scheduler.withdraw(request.request_id)
    b.scheduler.replica_lost("a", 1, b.now_s)
    assert {b.status("t"), b.status("u")} == {(0, 0, 0)}
    assert b.scheduler.next_s(b.now_s) in (None, 0.0)
    b.dispatch()
    assert b.scheduler.next_s(b.now_s) is None
