"""The router: frames in order and out of it, the ledger at work, and who gets a request."""

from __future__ import annotations

from collections import Counter

import pytest

from quire.cluster.messages import AdmitRequest
from quire.cluster.policies import POLICIES
from quire.cluster.routing import DEFAULT_TOKENS_PER_S, Router
from quire.worker.protocol import EventFrame, LiveRequest, ModelInfo, ReplicaLoad

INFO = ModelInfo("m", "", 1000, 100, (), 0, page_size=10, pool_tokens=1000, max_sequences=64, max_running=16)
IDLE = ReplicaLoad(0, 0, 100, 100, 0, 0, 0, 0, 0, -(2**31), 1000.0, 0.01, 1)
A, B, C, D = (bytes([i]) * 16 for i in range(4))


def request(name: str = "q", attempt: int = 0, tokens: int = 45, hashes=(), **fields) -> AdmitRequest:
    usual = {
        "tenant": "t",
        "priority": 0,
        "waited_s": 0.0,
        "deadline_s": None,
        "sequences": 1,
        "max_tokens": 5,
        "longest_tokens": tokens + 5,
    }
    return AdmitRequest(name, attempt, prompt_tokens=tokens, hashes=tuple(hashes), **usual | fields)


def frame(replica_id: str, after: int, until: int, epoch: int = 1, dump: bool = False, **fields) -> EventFrame:
    usual = {"stored": (), "removed": (), "started": (), "ended": (), "served": {}, "load": IDLE}
    return EventFrame(replica_id, epoch, after, until, dump, **usual | fields)


def live(name: str) -> LiveRequest:
    return LiveRequest(name, "t", 0, "running", 1, 45, 0, 5)


def router(*replicas: str, policy: str = "cost") -> Router:
    made = Router(policy)
    for name in replicas:
        made.add(name, 1, INFO)
        made.events(frame(name, 0, 0, dump=True), 0.0)
    return made


def snapshot(of: Router, replica_id: str):
    return next(s for s in of.snapshots() if s.replica_id == replica_id)


# --- what is known ---


def test_a_new_replica_is_asked_for_a_dump_and_may_take_requests_before_it():
    r = Router("cost")
    assert r.choose(request(), 0.0) is None
    assert (r.largest_tokens(), r.resync_point("r0", 1)) == (0, None)
    r.add("r0", 1, INFO)
    assert r.resync_point("r0", 1) is None
    choice = r.choose(request(), 0.0)
    assert (choice.replica_id, choice.epoch, choice.cached_tokens) == ("r0", 1, 0)
    assert choice.predicted_ttft_s == pytest.approx(45 / DEFAULT_TOKENS_PER_S)


def test_frames_in_order_are_taken_in_and_a_duplicate_is_not():
    r = router("r0")
    r.events(frame("r0", 0, 3, stored=(A, B)), 0.0)
    assert r.resync_point("r0", 1) == 3
    r.events(frame("r0", 3, 5, removed=(B,)), 0.0)
    for again in (frame("r0", 0, 3, stored=(A, B)), frame("r0", 3, 5, removed=(A,))):
        r.events(again._replace(load=IDLE._replace(running=9)), 0.0)
        assert r.resync_point("r0", 1) == 5
    assert r.choose(request(hashes=(A, B)), 0.0).cached_tokens == 10
    assert snapshot(r, "r0").load.running == 0


def test_a_frame_without_news_brings_the_load():
    r = router("r0")
    r.events(frame("r0", 0, 3), 0.0)
    r.events(frame("r0", 3, 3, load=IDLE._replace(running=9)), 0.0)
    assert (r.resync_point("r0", 1), snapshot(r, "r0").load.running) == (3, 9)


def test_a_gap_asks_for_a_dump_which_replaces_all_that_was_known():
    r = router("r0")
    r.events(frame("r0", 0, 3, stored=(A,)), 0.0)
    r.events(frame("r0", 5, 7, stored=(B,)), 0.0)
    assert r.resync_point("r0", 1) is None
    r.events(frame("r0", 3, 6, stored=(B,)), 0.0)  # too late: what lay between is not known
    assert r.resync_point("r0", 1) is None
    assert r.choose(request("x", hashes=(A, B)), 0.0).cached_tokens == 10
    r.events(frame("r0", 0, 9, dump=True, stored=(B, C)), 0.0)
    assert r.resync_point("r0", 1) == 9
    assert r.choose(request("y", hashes=(A, B)), 0.0).cached_tokens == 0
    assert r.choose(request("z", hashes=(B, C)), 0.0).cached_tokens == 20
    r.events(frame("r0", 0, 8, dump=True), 0.0)  # a dump that was overtaken
    assert snapshot(r, "r0").indexed_pages == 2


def test_an_earlier_life_is_ignored_and_a_later_one_starts_from_nothing():
    r = router("r0")
    r.events(frame("r0", 0, 3, stored=(A,)), 0.0)
    r.events(frame("r0", 3, 4, epoch=0, removed=(A,)), 0.0)
    r.add("r0", 0, INFO)
    r.remove("r0", 0)
    assert r.choose(request("a", hashes=(A,)), 0.0).cached_tokens == 10
    r.events(frame("r0", 3, 4, epoch=2, stored=(B,)), 0.0)
    assert (r.resync_point("r0", 1), r.resync_point("r0", 2)) == (None, None)
    choice = r.choose(request("b", hashes=(A,)), 0.0)
    assert (choice.epoch, choice.cached_tokens) == (2, 0)
    assert snapshot(r, "r0").sent.sequences == 1  # what was sent to the life before is not on its way to this one
    r.add("r0", 3, INFO)
    assert r.choose(request("c"), 0.0).epoch == 3


def test_adding_a_known_life_again_changes_nothing():
    r = router("r0")
    r.events(frame("r0", 0, 3, stored=(A,)), 0.0)
    r.add("r0", 1, INFO)
    assert r.resync_point("r0", 1) == 3
    assert r.choose(request(hashes=(A,)), 0.0).cached_tokens == 10


def test_a_removed_replica_takes_nothing_and_is_forgotten():
    r = router("r0", "r1")
    r.events(frame("r0", 0, 3, stored=(A,)), 0.0)
    r.remove("r0", 1)
    assert r.choose(request(hashes=(A,)), 0.0).replica_id == "r1"
    r.events(frame("r0", 3, 4, stored=(B,)), 0.0)
    assert [s.replica_id for s in r.snapshots()] == ["r1"]
    r.add("r0", 2, INFO)
    assert r.choose(request(hashes=(A, B)), 0.0).cached_tokens == 0


def test_the_largest_replica_says_what_can_ever_fit():
    r = Router("cost")
    r.add("r0", 1, INFO._replace(pool_tokens=300))
    r.add("r1", 1, INFO._replace(pool_tokens=700))
    r.add("r2", 1, INFO._replace(max_model_len=500))
    assert r.largest_tokens() == 700
    assert r.choose(request(longest_tokens=600), 0.0).replica_id == "r1"
    assert r.choose(request(longest_tokens=701), 0.0) is None


# --- the ledger ---


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_burst_spreads_over_equal_replicas_before_any_of_them_reports(policy: str):
    r = router("r0", "r1", "r2", "r3", policy=policy)
    chosen = Counter(r.choose(request(f"q{i}"), 0.0).replica_id for i in range(16))
    if policy == "power_of_two":
        assert set(chosen) == {"r0", "r1", "r2", "r3"}
        assert max(chosen.values()) <= 6
    else:
        assert chosen == {"r0": 4, "r1": 4, "r2": 4, "r3": 4}


def test_a_burst_fills_the_replicas_and_the_rest_waits_until_they_report():
    r = router("r0", "r1")
    chosen = [r.choose(request(f"q{i}", tokens=300), 0.0) for i in range(6)]
    # 512 tokens may be ahead: 300 sent leaves room for one more, 600 does not.
    assert [c.replica_id if c else None for c in chosen] == ["r0", "r1", "r0", "r1", None, None]
    r.events(frame("r0", 0, 2, started=(live("q0"), live("q2")), load=IDLE._replace(running=2, pending_tokens=100)), 0.1)
    assert r.choose(request("q4", tokens=300), 0.1).replica_id == "r0"


@pytest.mark.parametrize("report", [{"started": (live("a"),)}, {"ended": (("a", 5),)}])
def test_what_a_replica_reports_leaves_the_ledger(report: dict):
    r = router("r0")
    r.choose(request("a"), 0.0)
    assert snapshot(r, "r0").sent == (1, 45, 6)
    r.events(frame("r0", 0, 1, **report), 0.1)
    assert snapshot(r, "r0").sent == (0, 0, 0)


def test_what_will_not_arrive_leaves_the_ledger():
    r = router("r0", "r1")
    assert r.choose(request("a", 0), 0.0).replica_id == "r0"
    assert r.choose(request("a", 1, avoid=("r0",)), 0.0).replica_id == "r1"
    assert (snapshot(r, "r0").sent.tokens, snapshot(r, "r1").sent.tokens) == (0, 45)
    r.forget("a")
    assert snapshot(r, "r1").sent.tokens == 0
    r.choose(request("b"), 1.0)
    r.choose(request("c", longest_tokens=5000), 31.0)
    assert sum(s.sent.tokens for s in r.snapshots()) == 0


def test_cached_tokens_are_not_on_their_way():
    r = router("r0")
    r.events(frame("r0", 0, 3, stored=(A, B, C)), 0.0)
    assert r.choose(request("a", hashes=(A, B, C, D)), 0.0).cached_tokens == 30
    assert snapshot(r, "r0").sent == (1, 15, 3)


# --- who gets it ---


def test_a_session_stays_where_its_pages_are_until_that_is_slower():
    r = router("r0", "r1")
    r.events(frame("r1", 0, 3, stored=(A, B, C, D)), 0.0)
    assert r.choose(request("a", hashes=(A, B, C, D)), 0.0).replica_id == "r1"
    r.events(frame("r1", 3, 4, started=(live("a"),), load=IDLE._replace(pending_tokens=60, running=1)), 0.0)
    assert r.choose(request("b", hashes=(A, B, C, D)), 0.0).replica_id == "r0"


@pytest.mark.parametrize(("policy", "replica_id"), [("cost", "r0"), ("least_loaded", "r1"), ("round_robin", "r1"), ("power_of_two", "r1")])
def test_a_longer_line_is_worth_it_where_many_pages_are(policy: str, replica_id: str):
    r = router("r0", "r1", policy=policy)
    pages = [i.to_bytes(16, "big") for i in range(90)]
    busy = IDLE._replace(pending_tokens=600, running=2, pages_active=30, pages_cached=70, pages_free=0)
    r.events(frame("r0", 0, 90, stored=tuple(pages), load=busy), 0.0)
    assert r.choose(request("a", tokens=910, hashes=pages), 0.0).replica_id == replica_id


def test_nobody_waits_in_a_replica_while_no_other_has_room():
    r = router("r0", "r1")
    busy = IDLE._replace(pending_tokens=600, running=1)
    r.events(frame("r0", 0, 1, load=busy), 0.0)
    r.events(frame("r1", 0, 90, stored=(A, B, C, D), load=busy), 0.0)
    assert r.choose(request("a", hashes=(A, B, C, D)), 0.0) is None


def test_a_replica_to_avoid_is_taken_only_when_there_is_no_other():
    r = router("r0", "r1")
    assert r.choose(request("a", avoid=("r0",)), 0.0).replica_id == "r1"
    r.events(frame("r1", 0, 1, load=IDLE._replace(running=16, waiting=9, pending_tokens=5000)), 0.0)
    assert r.choose(request("b", avoid=("r0",)), 0.0) is None  # r1 is only busy
    assert r.choose(request("c", avoid=("r0", "r1")), 0.0).replica_id == "r0"
    r.remove("r1", 1)
    assert r.choose(request("d", avoid=("r0",)), 0.0).replica_id == "r0"


def test_a_full_replica_takes_what_is_more_urgent_than_what_runs_there():
    r = router("r0", "r1")
    full = IDLE._replace(running=16, waiting=2, pages_free=0)
    r.events(frame("r0", 0, 1, load=full._replace(lowest_priority=1)), 0.0)
    r.events(frame("r1", 0, 1, load=full._replace(lowest_priority=0)), 0.0)
    assert r.choose(request("a", priority=1), 0.0) is None
    assert r.choose(request("b", priority=0), 0.0).replica_id == "r0"
    r.events(frame("r1", 1, 2), 0.0)
    assert r.choose(request("c", priority=0), 0.0).replica_id == "r1"  # room goes before displacing


def test_unmeasured_speed_is_taken_to_be_the_others_mean():
    r = router("r0", "r1", "r2")
    r.events(frame("r0", 0, 1, load=IDLE._replace(prefill_tokens_per_s=3000.0, pages_free=0)), 0.0)
    r.events(frame("r1", 0, 1, load=IDLE._replace(prefill_tokens_per_s=5000.0, pages_free=0)), 0.0)
    r.events(frame("r2", 0, 1, load=IDLE._replace(prefill_tokens_per_s=0.0)), 0.0)
    choice = r.choose(request(tokens=400, avoid=("r0", "r1")), 0.0)
    assert choice.predicted_ttft_s == pytest.approx(0.1)


def test_the_same_seed_draws_the_same_replicas_and_another_seed_others():
    def run(seed: int) -> list[str]:
        r = Router("power_of_two", seed)
        for i in range(8):
            r.add(f"r{i}", 1, INFO)
        return [r.choose(request(f"q{i}"), 0.0).replica_id for i in range(40)]

    assert run(1) == run(1)
    assert run(1) != run(2)
