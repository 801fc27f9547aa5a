"""Room, predictions and policies over snapshots, with exact numbers."""

from __future__ import annotations

import pytest

from quire.cluster.ledger import NOTHING, Totals
from quire.cluster.messages import Route
from quire.cluster.policies import (
    DECODE_TOKENS,
    LOOKAHEAD_S,
    LOOKAHEAD_TOKENS,
    POLICIES,
    URGENT_AHEAD,
    Candidate,
    Demand,
    ReplicaSnapshot,
    can_ever,
    cost,
    has_pages,
    has_seats,
    least_loaded,
    may_displace,
    missing_pages,
    power_of_two,
    predict,
    round_robin,
    snapshot,
)
from quire.worker.protocol import ModelInfo, ReplicaLoad

INFO = ModelInfo("m", "", 1000, 100, (), 0, page_size=10, pool_tokens=1000, max_sequences=64, max_running=16)
IDLE = ReplicaLoad(
    running=0,
    waiting=0,
    pages_total=100,
    pages_free=100,
    pages_cached=0,
    pages_active=0,
    pages_reserved=0,
    pages_host=0,
    pending_tokens=0,
    lowest_priority=-(2**31),
    prefill_tokens_per_s=1000.0,
    decode_step_s=0.01,
    steps=1,
)
DEMAND = Demand(sequences=1, prompt_tokens=200, longest_tokens=250, priority=0, usual_tokens_per_s=500.0)


def replica(name: str = "r0", sent: Totals = NOTHING, last_choice: int = 0, info: ModelInfo = INFO, **load) -> ReplicaSnapshot:
    return snapshot(Route(name, 1), info, IDLE._replace(**load), sent, 0, last_choice)


def candidate(name: str = "r0", cached: int = 0, **state) -> Candidate:
    return Candidate(replica(name, **state), cached)


def test_what_can_never_fit_is_told_from_what_must_wait():
    assert can_ever(replica(), DEMAND._replace(longest_tokens=1000, sequences=64))
    assert not can_ever(replica(), DEMAND._replace(longest_tokens=1001))
    assert not can_ever(replica(), DEMAND._replace(sequences=65))
    assert not can_ever(replica(info=INFO._replace(pool_tokens=240)), DEMAND)


@pytest.mark.parametrize(
    ("state", "sequences", "room"),
    [
        ({}, 1, True),
        ({}, 64, True),  # more than run at once: an idle replica takes them
        ({"running": 15}, 1, True),
        ({"running": 16}, 1, True),  # nobody waits: it is next
        ({"running": 16, "waiting": 1}, 1, False),
        ({"running": 14, "waiting": 1, "sent": Totals(1, 0, 0)}, 1, True),  # 17 = 16 and one ahead
        ({"running": 15, "waiting": 1, "sent": Totals(1, 0, 0)}, 1, False),
        ({"running": 16, "sent": Totals(1, 0, 0)}, 1, False),
        ({"running": 1}, 63, True),  # nobody waits: a wide request need not wait for an idle replica
        ({"running": 2}, 63, False),  # the replica would refuse it: 64 sequences at most
        ({"running": 1, "pending_tokens": LOOKAHEAD_TOKENS}, 1, True),
        ({"running": 1, "pending_tokens": LOOKAHEAD_TOKENS, "sent": Totals(1, 1, 0)}, 1, False),  # what is sent counts
        ({"running": 1, "pending_tokens": 1200, "prefill_tokens_per_s": 6000.0}, 1, True),  # 0.2 s of work
        ({"running": 1, "pending_tokens": 1201, "prefill_tokens_per_s": 6000.0}, 1, False),
        ({"running": 1, "pending_tokens": 600, "prefill_tokens_per_s": 0.0}, 1, False),  # unmeasured: as the others
    ],
)
def test_seats(state: dict, sequences: int, room: bool):
    assert LOOKAHEAD_S == 0.2
    assert has_seats(replica(**state), DEMAND._replace(sequences=sequences)) is room


def test_what_is_cached_may_be_waited_for():
    busy = replica(running=1, pending_tokens=LOOKAHEAD_TOKENS + 40)
    assert has_seats(busy, DEMAND, slack_tokens=40)
    assert not has_seats(busy, DEMAND, slack_tokens=39)


@pytest.mark.parametrize(
    ("state", "cached", "missing"),
    [
        ({}, 0, 21 - 100),
        ({}, 150, 6 - 100),
        ({"pages_free": 5, "pages_cached": 16}, 0, 0),
        ({"pages_free": 5, "pages_cached": 16, "running": 4}, 0, 1),  # a page for four of them to grow
        ({"pages_free": 21, "pending_tokens": 11}, 0, 2),
        ({"pages_free": 21, "sent": Totals(1, 30, 4)}, 0, 4),
    ],
)
def test_missing_pages(state: dict, cached: int, missing: int):
    assert missing_pages(candidate(cached=cached, **state), DEMAND) == missing


def test_a_replica_without_pages_takes_one_that_waits_and_no_more():
    full = {"running": 5, "pages_free": 0}
    assert has_pages(candidate(**full), DEMAND)
    assert not has_pages(candidate(waiting=1, **full), DEMAND)
    assert not has_pages(candidate(sent=Totals(1, 10, 1), **full), DEMAND)


def test_only_strictly_higher_priority_displaces_and_a_few_at_a_time():
    busy = {"running": 16, "lowest_priority": 1}
    assert may_displace(replica(**busy), DEMAND)
    assert not may_displace(replica(**busy), DEMAND._replace(priority=1))
    assert not may_displace(replica(), DEMAND._replace(priority=-(2**31)))  # nothing runs
    assert not may_displace(replica(sent=Totals(URGENT_AHEAD, 0, 0), **busy), DEMAND)
    assert not may_displace(replica(waiting=16, **busy), DEMAND)
    assert not may_displace(replica(**busy), DEMAND._replace(sequences=49))


def test_predicted_time_is_the_line_and_what_is_not_cached_over_the_measured_speed():
    assert predict(candidate(), DEMAND).ttft_s == pytest.approx(0.2)
    assert predict(candidate(cached=150, pending_tokens=300, sent=Totals(1, 50, 5)), DEMAND).ttft_s == pytest.approx(0.4)
    assert predict(candidate(running=1), DEMAND).ttft_s == pytest.approx(0.21)
    assert predict(candidate(prefill_tokens_per_s=0.0), DEMAND).ttft_s == pytest.approx(0.4)


def test_pressure_is_recompute_of_missing_pages_and_slow_decodes():
    assert predict(candidate(), DEMAND).pressure_s == 0.0
    assert predict(candidate(running=3), DEMAND).pressure_s == pytest.approx(DECODE_TOKENS * 0.01)
    assert predict(candidate(running=3), DEMAND._replace(sequences=2)).pressure_s == pytest.approx(2 * DECODE_TOKENS * 0.01)
    assert predict(candidate(pages_free=16), DEMAND).pressure_s == pytest.approx(5 * 10 / 1000)


def test_round_robin_takes_the_one_passed_over_for_longest():
    turns = [candidate("a", last_choice=7), candidate("b", last_choice=2), candidate("c", last_choice=5)]
    assert round_robin(turns, DEMAND, 0).replica.replica_id == "b"


def test_least_loaded_counts_pages_and_tokens_against_the_size_of_the_pool():
    a = candidate("a", pages_active=30)
    assert least_loaded([a, candidate("b", pages_active=20, pending_tokens=50, sent=Totals(1, 40, 4))], DEMAND, 0).replica.replica_id == "b"
    assert least_loaded([a, candidate("b", pages_active=20, pending_tokens=50, sent=Totals(1, 60, 6))], DEMAND, 0).replica.replica_id == "a"
    large = candidate("b", pages_active=50, info=INFO._replace(pool_tokens=2000))
    assert least_loaded([a, large], DEMAND, 0).replica.replica_id == "b"


def test_power_of_two_draws_two_different_ones_and_takes_the_less_loaded():
    loaded = [candidate(name, pages_active=10 * i) for i, name in enumerate("abcd")]
    chosen = {power_of_two(loaded, DEMAND, (high << 32) + low).replica.replica_id for high in range(3) for low in range(4)}
    assert chosen == {"a", "b", "c"}  # every pair is drawn, and the fullest wins none
    assert power_of_two(loaded, DEMAND, (1 << 32) + 1).replica.replica_id == "b"  # of b and d
    assert power_of_two(loaded[:1], DEMAND, 5).replica.replica_id == "a"


def test_cost_stays_with_the_pages_until_waiting_there_takes_longer():
    here = {"name": "a", "cached": 190, "running": 1}
    elsewhere = candidate("b", running=1)
    assert cost([elsewhere, candidate(**here)], DEMAND, 0).replica.replica_id == "a"
    assert cost([elsewhere, candidate(pending_tokens=189, **here)], DEMAND, 0).replica.replica_id == "a"
    assert cost([elsewhere, candidate(pending_tokens=191, **here)], DEMAND, 0).replica.replica_id == "b"


def test_cost_prefers_fast_decodes_and_spreads_ties():
    slow, fast = candidate("a", running=4, decode_step_s=0.02), candidate("b", running=2, decode_step_s=0.01)
    assert cost([slow, fast], DEMAND, 0).replica.replica_id == "b"
    assert cost([candidate("a", last_choice=4), candidate("b", last_choice=3)], DEMAND, 0).replica.replica_id == "b"
    assert cost([candidate("b"), candidate("a")], DEMAND, 0).replica.replica_id == "a"


def test_the_table_names_what_the_option_offers():
    from quire.worker.config import ClusterOptions

    (routing,) = [f for f in ClusterOptions.__dataclass_fields__.values() if f.name == "routing"]
    assert tuple(POLICIES) == routing.metadata["choices"]
