"""The event log with exact changes, the speeds with given times, and what an engine tells of itself."""

import pytest
from paged_memory import hash_engine

from quire.worker.events import IDLE_TENANTS, Changes, EventLog, Speeds
from quire.worker.page_hash import prefix_hashes
from quire.worker.page_pool import PagePool
from quire.worker.protocol import GenerateRequest, SamplingParams, pack_events, unpack_events

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), tenant: str = "", priority: int = 0, resume=None, **params) -> GenerateRequest:
    given = SamplingParams(**({"max_tokens": 4, "ignore_eos": True, "seed": 1} | params))
    return GenerateRequest(name, (prompt,), given, priority, tenant, resume=resume)


def test_only_net_changes_are_told():
    log = EventLog()
    log.stored(A)  # 0
    log.started("r", "t")  # 1
    log.stored(B)  # 2
    log.removed(A)  # 3
    log.ended("r", "t", 7, 7)  # 4
    log.stored(A)  # 5
    log.removed(B)  # 6
    assert log.next == 7
    assert log.since(0) == Changes((A,), (), (), (("r", 7),))
    assert log.since(3) == Changes((), (B,), (), (("r", 7),))  # A went and came back
    assert log.since(1) == Changes((), (), (), (("r", 7),))  # B came and went
    assert log.since(2) == Changes((), (), (), (("r", 7),))
    assert log.since(7) == Changes((), (), (), ())


def test_an_id_that_is_used_again_has_ended_and_started():
    log = EventLog()
    log.started("r", "t")
    log.ended("r", "t", 3, 3)
    log.started("r", "t")
    assert log.since(0) == Changes((), (), ("r",), (("r", 3),))
    assert log.since(1) == Changes((), (), ("r",), (("r", 3),))


def test_a_request_that_moves_away_is_told_apart_from_one_that_is_over():
    log = EventLog()
    log.started("r", "t")
    log.ended("r", "t", 3, 3, moved=True)
    assert log.since(0) == Changes((), (), (), (("r", 3),), ("r",))
    log.started("r", "t")  # it comes back
    log.ended("r", "t", 5, 2)
    assert log.since(0) == Changes((), (), (), (("r", 3), ("r", 5)), ())


def test_who_is_too_far_behind_or_ahead_or_new_gets_no_changes():
    log = EventLog(capacity=2)
    for page_hash in (A, B, C):
        log.stored(page_hash)
    assert log.since(0) is None
    assert log.since(1) == Changes((B, C), (), (), ())
    assert log.since(4) is None
    assert log.since(None) is None


def test_tokens_are_counted_by_tenant_and_idle_tenants_are_told_once():
    log = EventLog()
    log.started("a", "x")
    log.started("b", "y")
    assert log.served(0, {"x": 2, "y": 1}) == {"x": 2, "y": 1}
    log.ended("a", "x", 5, 3)  # 2: came with two tokens from elsewhere
    assert log.served(2, {"y": 4}) == {"x": 3, "y": 4}
    assert log.served(3, {"y": 5}) == {"y": 5}  # who asks from 3 on has heard of it
    assert log.served(None, {"y": 5}) == {"x": 3, "y": 5}
    log.started("c", "x")
    assert log.served(3, {"x": 1, "y": 5}) == {"x": 4, "y": 5}  # the count goes on
    for i in range(IDLE_TENANTS + 1):
        log.started("r", f"tenant {i}")
        log.ended("r", f"tenant {i}", 1, 1)
    assert len(log.served(None, {})) == IDLE_TENANTS + 2
    assert "tenant 0" not in log.served(None, {})


def test_speeds_are_smoothed_ratios_of_tokens_and_seconds():
    speeds = Speeds()
    assert (speeds.prefill_tokens_per_s, speeds.decode_step_s) == (0.0, 0.0)
    speeds.count(100, 0.5)
    assert speeds.prefill_tokens_per_s == pytest.approx(200)
    speeds.count(400, 0.5)
    assert speeds.prefill_tokens_per_s == pytest.approx((0.9 * 100 + 400) / (0.9 * 0.5 + 0.5))
    before = speeds.prefill_tokens_per_s
    speeds.count(15, 10.0)  # too few to say anything of either
    assert (speeds.prefill_tokens_per_s, speeds.decode_step_s) == (before, 0.0)


def test_a_decode_step_is_a_mean_that_one_hiccup_does_not_spoil():
    speeds = Speeds()
    speeds.count(0, 0.030)
    speeds.count(0, 0.010)
    assert speeds.decode_step_s == pytest.approx(0.020)  # a plain mean at first
    for _ in range(200):
        speeds.count(0, 0.010)
    assert speeds.decode_step_s == pytest.approx(0.010)
    speeds.count(0, 60.0)
    assert speeds.decode_step_s == pytest.approx(0.013)  # counted as four times the mean
    for _ in range(200):
        speeds.count(0, 0.100)  # but what stays is believed
    assert speeds.decode_step_s == pytest.approx(0.100)


def test_a_pool_tells_which_pages_can_be_found():
    pool = PagePool(3, 2)
    root = pool.root("")
    pages = pool.allocate(2)
    first = pool.register(pages[0], root, [1, 2])
    second = pool.register(pages[1], first, [3, 4])
    pool.register(pool.allocate(1)[0], root, [1, 2])  # the same content again
    assert pool.events.since(0) == Changes((first, second), (), (), ())
    assert pool.page_map() == b"aaa"
    pool.release([2])
    pool.retain([0])
    pool.release([1])
    assert pool.page_map() == b"scf"
    assert pool.reserve(2) == [2, 1]  # the free one, then the one that is evicted
    assert pool.page_map() == b"srr"
    assert pool.page_map(moving=[0]) == b"mrr"
    for _ in range(300):  # more holders than a byte can count
        pool.retain([0])
    assert pool.page_map() == b"srr"
    pool.release([0] * 300)
    assert pool.events.since(2) == Changes((), (second,), (), ())
    assert pool.findable() == (first,)


def test_an_engine_tells_of_its_requests_its_pages_and_its_load():
    engine = hash_engine(pages=16, page_size=4, max_batch_tokens=6)
    engine.submit(request("a", tuple(range(1, 10)), tenant="x", priority=3))
    engine.submit(request("b", tenant="y"))
    engine.submit(request("c", tenant="y", n=2))
    frame = engine.events("r0", 5, 0)
    assert (frame.replica_id, frame.epoch, frame.after, frame.next, frame.dump) == ("r0", 5, 0, 3, False)
    assert [(r.request_id, r.tenant, r.priority, r.state, r.sequences) for r in frame.started] == [
        ("a", "x", 3, "waiting", 1),
        ("b", "y", 0, "waiting", 1),
        ("c", "y", 0, "waiting", 2),
    ]
    assert frame.load.pending_tokens == 9 + 3 + 3  # what follows a leader is the leader's
    assert frame.load.lowest_priority == -(2**31)
    engine.step()
    engine.step()  # the decodes of b and c, c's follower, and three tokens of a
    frame = engine.events("r0", 5, 3)
    assert frame.started == frame.ended == ()
    assert len(frame.stored) == 1  # three tokens of y's prompt and the first of its output
    assert frame.served == {"x": 0, "y": 5}
    assert frame.load.lowest_priority == 3
    assert frame.load.pending_tokens == 6
    assert (engine.has_news(3), engine.has_news(frame.next), engine.has_news(None)) == (True, False, True)
    while not engine.idle():
        engine.step()
    frame = engine.events("r0", 5, 3)
    assert dict(frame.ended) == {"a": 4, "b": 4, "c": 8}
    assert frame.served == {"x": 4, "y": 12}
    assert set(prefix_hashes(b"key", "x", tuple(range(1, 10)), 4)) <= set(frame.stored)
    dump = engine.events("r0", 5, None)
    assert dump.dump
    assert set(dump.stored) == set(frame.stored)
    assert unpack_events(pack_events(dump)) == dump
    assert engine.requests() == []


def test_what_a_resumed_request_came_with_is_not_served_here():
    engine = hash_engine(pages=16)
    engine.submit(request("a", tenant="x", resume={0: (7, 8)}, max_tokens=5))
    assert engine.requests()[0].output_tokens == 2
    while not engine.idle():
        engine.step()
    frame = engine.events("r0", 5, 0)
    assert frame.ended == (("a", 5),)
    assert frame.served == {"x": 3}
    assert engine.stats().output_tokens == 3
