"""The one decision, as a table: who gives way, how, why, and what it is to cost."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from paged_memory import hash_engine
from test_scheduler import request, run

from quire.worker.candidates import CANDIDATES, candidates, shortage
from quire.worker.decisions import Decisions
from quire.worker.plan import Moved, MoveKind
from quire.worker.pressure import Action, Candidate, Costs, Reason, Relief, Shortage, make_way, prices, relieve, worth, worth_bringing
from quire.worker.protocol import SamplingParams
from quire.worker.sequence import Sequence

COSTS = Costs(
    prefill_tokens_per_s=1000.0, step_s=0.05, out_pages_per_s=100.0, in_pages_per_s=200.0, link_pages_per_s=50.0, handshake_s=0.01
)
SLOW_DISK = COSTS._replace(save_pages_per_s=20.0, load_pages_per_s=40.0)
RELIEF = Relief("replica-1", pages=20)
NEED = Shortage(pages=1, leaving=0, running=4)


def sequence(name: str, priority: int = 0) -> Sequence:
    return Sequence(0, name, 0, [1], 1, SamplingParams(), 8, 0, b"", (priority, 0, 0))


def victim(name: str, priority: int = 0, **known) -> Candidate:
    """Ten pages of 32 tokens, all its own, and a hundred tokens to go."""
    usual = {"frees": 10, "pages": 10, "lost_tokens": 320, "out_pages": 10, "remaining": 100, "returned": False}
    return Candidate(sequence(name, priority), **usual | known)


class Case(NamedTuple):
    who: str | None
    action: Action
    reason: Reason
    seconds: float
    candidates: list[Candidate]
    need: Shortage = NEED
    costs: Costs = COSTS
    mode: str = "decide"
    relief: Relief | None = None


TABLE = {
    # 320 tokens / 1000 = 0.32 s; swap 10/100 + 10/200 = 0.15 s
    "swap is cheaper": Case("b", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a"), victim("b")]),
    "recompute is cheaper": Case("a", Action.RECOMPUTE, Reason.CHEAPEST, 0.1, [victim("a", lost_tokens=100)]),
    # 320 tokens / 1000 x 0.25 = 0.08 s
    "most of what is dropped is found again": Case(
        "a", Action.RECOMPUTE, Reason.CHEAPEST, 0.08, [victim("a")], costs=COSTS._replace(again=0.25)
    ),
    "half of it is not": Case("a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a")], costs=COSTS._replace(again=0.5)),
    "a slow hand-shake": Case(
        "a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a")], costs=COSTS._replace(link_pages_per_s=100, handshake_s=0.2), relief=RELIEF
    ),
    "so is what others hold, or the host has": Case("a", Action.SWAP, Reason.CHEAPEST, 0.05, [victim("a", out_pages=0)]),
    "no room in host memory": Case("a", Action.RECOMPUTE, Reason.ONLY, 0.32, [victim("a", out_pages=None)]),
    # 10/20 + 10/40 = 0.75 s
    "the disk is cheaper": Case(
        "a",
        Action.SUSPEND,
        Reason.CHEAPEST,
        0.75,
        [victim("a", out_pages=None, disk_pages=10)],
        costs=SLOW_DISK._replace(prefill_tokens_per_s=400),
    ),
    "the disk is not cheaper": Case(
        "a", Action.RECOMPUTE, Reason.CHEAPEST, 0.32, [victim("a", out_pages=None, disk_pages=10)], costs=SLOW_DISK
    ),
    "the disk is busy": Case(
        "a",
        Action.RECOMPUTE,
        Reason.CHEAPEST,
        0.8,
        [victim("a", out_pages=None, disk_pages=10)],
        costs=SLOW_DISK._replace(prefill_tokens_per_s=400, save_queue=2),
    ),
    "told to swap, and only the disk has room": Case(
        "a", Action.SUSPEND, Reason.MODE, 0.75, [victim("a", out_pages=None, disk_pages=10)], costs=SLOW_DISK, mode="swap"
    ),
    "copies stand before it": Case(
        "a", Action.RECOMPUTE, Reason.CHEAPEST, 0.32, [victim("a")], costs=COSTS._replace(out_queue=10, in_queue=20)
    ),
    "the link is cheaper": Case(
        "a", Action.MIGRATE, Reason.CHEAPEST, 0.11, [victim("a")], costs=COSTS._replace(link_pages_per_s=100), relief=RELIEF
    ),
    "no room at the other end": Case(
        "a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a")], costs=COSTS._replace(link_pages_per_s=1000), relief=RELIEF._replace(pages=9)
    ),
    "not measured is tried": Case("a", Action.SWAP, Reason.CHEAPEST, 0.0, [victim("a")], costs=Costs(prefill_tokens_per_s=9.0)),
    "cheapest for what it frees": Case("a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a"), victim("b", frees=2, out_pages=8)]),
    "lowest priority first, whatever it costs": Case(
        "b", Action.RECOMPUTE, Reason.ONLY, 9.0, [victim("a"), victim("b", 1, lost_tokens=9000, out_pages=None)]
    ),
    "who ends soon is worth little": Case("a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a"), victim("b", remaining=3)]),
    "who has just come back stays": Case(
        "a", Action.RECOMPUTE, Reason.ONLY, 5.0, [victim("a", out_pages=None, lost_tokens=5000), victim("b", returned=True)]
    ),
    "unless all have": Case("b", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a", returned=True), victim("b", returned=True)]),
    "who frees nothing is no help": Case(
        "a", Action.RECOMPUTE, Reason.CHEAPEST, 0.1, [victim("a", lost_tokens=100), victim("b", frees=0, lost_tokens=0)]
    ),
    "unless nobody would": Case(
        "b",
        Action.RECOMPUTE,
        Reason.ONLY,
        0.0,
        [victim("a", frees=0, lost_tokens=0, out_pages=None), victim("b", frees=0, lost_tokens=0, out_pages=None)],
    ),
    "pages are leaving": Case(None, Action.WAIT, Reason.LEAVING, 0.0, [victim("a")], NEED._replace(leaving=1)),
    "but too few": Case("a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a")], NEED._replace(pages=2, leaving=1)),
    "nobody may give way": Case(None, Action.WAIT, Reason.LEAVING, 0.0, []),
    # 4 steps of 0.05 s, of one sequence in four
    "a neighbour ends soon": Case(None, Action.WAIT, Reason.ENDING, 0.05, [victim("a")], NEED._replace(ends_in=4)),
    "not soon enough": Case("a", Action.SWAP, Reason.CHEAPEST, 0.15, [victim("a")], NEED._replace(ends_in=8, running=2)),
    "told to recompute": Case("b", Action.RECOMPUTE, Reason.MODE, 0.32, [victim("a"), victim("b")], mode="recompute"),
    "told to swap": Case("b", Action.SWAP, Reason.MODE, 0.15, [victim("a"), victim("b", lost_tokens=1)], mode="swap"),
    "told to swap without room": Case("a", Action.RECOMPUTE, Reason.ONLY, 0.32, [victim("a", out_pages=None)], mode="swap"),
    "told to migrate": Case("a", Action.MIGRATE, Reason.MODE, 0.21, [victim("a")], mode="migrate", relief=RELIEF),
    "told to migrate with nowhere to go": Case("a", Action.RECOMPUTE, Reason.ONLY, 0.32, [victim("a")], mode="migrate"),
    "told to, it does not wait for a neighbour": Case(
        "a", Action.RECOMPUTE, Reason.MODE, 0.32, [victim("a")], NEED._replace(ends_in=1), mode="recompute"
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_is_done_when_pages_run_out(name: str) -> None:
    case = TABLE[name]
    who, decision = relieve(case.need, case.candidates, case.costs, case.mode, case.relief)
    assert (who.request_id if who else None, decision.action, decision.reason) == (case.who, case.action, case.reason)
    assert decision.predicted_s == pytest.approx(case.seconds)


def test_what_a_victim_is_worth_falls_towards_its_end() -> None:
    values = [worth(victim("a", remaining=remaining)) for remaining in (1000, 32, 1)]
    assert values == pytest.approx([10 * 1000 / 1032, 5.0, 10 / 33])
    assert worth(victim("a", frees=0)) > 0


@pytest.mark.parametrize(
    ("came_back", "again"),
    [
        ([], 1.0),  # not seen yet
        ([(100, 20)], 0.2),
        ([(100, 150)], 1.0),  # what others hold is gone, too: no more than was dropped counts
        ([(100, 0), (300, 60)], 60 / 390),  # by tokens
        ([(100, 100)] + [(100, 10)] * 40, pytest.approx(0.1, abs=0.01)),  # what was long ago is forgotten
    ],
)
def test_the_share_that_is_computed_again_is_learned_from_who_comes_back(came_back: list[tuple[int, int]], again: float) -> None:
    decisions = Decisions()
    for lost, computed in came_back:
        decisions.came_back(lost, computed)
    assert decisions.again == again


@pytest.mark.parametrize(("preemption", "prefix_cache"), [("recompute", True), ("recompute", False), ("swap", True), ("swap", False)])
def test_who_comes_back_tells_what_is_left_of_its_pages(preemption: str, prefix_cache: bool) -> None:
    """Whoever gave way by recompute, and also who was swapped out: so the share stays known while nobody recomputes."""
    engine = hash_engine(pages=8, page_size=4, host_pages=20, preemption=preemption, prefix_cache=prefix_cache)
    engine.scheduler.host.evict_ahead = lambda wanted, most: None  # what host memory has is not recomputed
    for i in range(3):
        engine.submit(request(f"r{i}", [i + 1] * 9, max_tokens=12))
    run(engine)
    decisions = engine.scheduler.decisions
    assert decisions.counts[preemption] > 0
    assert engine.scheduler.costs().again == decisions.again
    assert 0.0 < decisions.again < 1.0 if prefix_cache else decisions.again == 1.0


def test_a_hand_shake_is_what_a_migration_takes_beside_its_pages() -> None:
    scheduler = hash_engine(pages=8, page_size=4).scheduler
    assert scheduler.costs().handshake_s == 0.0
    scheduler.migrated(0, 0.5)
    assert scheduler.costs().handshake_s == 0.5
    scheduler.pool.reserve(4)
    move = scheduler.moves.start(MoveKind.SEND, [], lambda moved: None, link="l")
    scheduler.moves.ended([Moved(move, 10, 0.1)])
    scheduler.migrated(10, 0.2)  # of which 0.1 s are the pages'
    assert scheduler.costs().handshake_s == pytest.approx(0.9 * 0.5 + 0.1 * 0.1)
    scheduler.migrated(99, 0.2)
    assert scheduler.costs().handshake_s == pytest.approx(0.9 * 0.46)


def test_a_free_action_is_preferred_to_a_recompute_at_the_same_price() -> None:
    assert list(prices(victim("a"), Costs(), RELIEF)) == [Action.SWAP, Action.MIGRATE, Action.RECOMPUTE]


@pytest.mark.parametrize(
    ("pages", "tokens", "costs", "brought"),
    [
        (10, 320, COSTS, True),
        (10, 40, COSTS, False),
        (10, 320, COSTS._replace(in_queue=100), False),
        (10, 320, COSTS._replace(in_pages_per_s=0.0), True),
        (10, 320, COSTS._replace(prefill_tokens_per_s=0.0), True),
    ],
)
def test_when_a_prefix_is_brought(pages: int, tokens: int, costs: Costs, brought: bool) -> None:
    assert worth_bringing(pages, tokens, costs) is brought


def test_as_few_as_will_do_make_way_from_the_end() -> None:
    running = [sequence("a", 0), sequence("b", 1), sequence("c", 1), sequence("d", 2)]
    newcomer = sequence("new", 0)
    assert [s.request_id for s in make_way(running, newcomer, lambda s: s.request_id == "c")] == ["d", "c"]
    assert make_way(running, newcomer, lambda s: False) == []
    assert make_way(running, sequence("new", 2), lambda s: True) == []


def test_what_is_known_of_who_might_give_way() -> None:
    engine = hash_engine(pages=16, page_size=4, host_pages=3, max_batch_tokens=40)
    scheduler = engine.scheduler
    engine.submit(request("first", [1] * 5, max_tokens=20))
    engine.submit(request("forks", [2] * 9, n=2, max_tokens=6))
    engine.submit(request("scored", [3] * 30, max_tokens=6, prompt_logprobs=0))
    for _ in range(2):
        engine.step()
    second, third, scored = candidates(scheduler)  # the first of all never gives way
    # Two of three pages are shared; 11 tokens are computed, and the host has room for three pages.
    assert second == Candidate(second.victim, 1, 3, 4, 3, 4, False)
    assert third == Candidate(third.victim, 1, 3, 4, 3, 5, False)
    assert (scored.out_pages, scored.frees) == (None, len(scored.victim.pages))
    scheduler.host.keep([second.victim.pages[0]], [scheduler.contents(second.victim)[0]], lambda moved: None)
    assert candidates(scheduler)[0].out_pages == 2
    assert shortage(scheduler, second.victim, 1) == Shortage(1, 0, 4, None)


def test_a_decision_looks_at_the_last_few_only() -> None:
    engine = hash_engine(pages=60, page_size=4, max_batch_tokens=60, max_running=20)
    for i in range(20):
        engine.submit(request(f"r{i}", [1, 2]))
    engine.step()
    assert [c.victim.request_id for c in candidates(engine.scheduler)] == [f"r{i}" for i in range(20 - CANDIDATES, 20)]


def test_a_neighbour_that_ends_without_needing_a_page_is_waited_for() -> None:
    engine = hash_engine(pages=5, page_size=4, preemption="decide", prefix_cache=False)
    scheduler = engine.scheduler
    scheduler.costs = lambda: COSTS._replace(prefill_tokens_per_s=50.0)
    engine.submit(request("long", [1] * 7, max_tokens=9))
    engine.submit(request("short", [2] * 9, max_tokens=4))  # three pages hold all it will ever write
    while not scheduler.decisions.recent:
        engine.step()
    (wait,) = scheduler.decisions.recent
    assert (wait.action, wait.reason, wait.request_id) == ("wait", "a neighbour is about to end", "long")
    while not engine.idle():
        engine.step()
        scheduler.check()
    assert scheduler.counters.recomputed_tokens == 0
    assert scheduler.decisions.counts["recompute"] == 0
    assert wait.actual_s > 0


def test_who_is_to_migrate_runs_on_until_it_has_left_or_stays() -> None:
    engine = hash_engine(pages=6, page_size=4, preemption="migrate", prefix_cache=False)
    scheduler = engine.scheduler
    scheduler.relief = Relief("replica-1", pages=9)
    engine.submit(request("first", [1] * 8, max_tokens=12))
    engine.submit(request("second", [2] * 6, max_tokens=9))
    while not (told := scheduler.take_emigrants()):
        engine.step()
    assert told == ["second"]
    assert scheduler.relief == Relief("replica-1", pages=9 - len(scheduler.running[1].pages))
    assert scheduler.take_emigrants() == []
    assert [s.request_id for s in scheduler.running] == ["first", "second"]
    assert scheduler.leaving() == len(scheduler.running[1].pages)
    assert {r.request_id: r.action for r in scheduler.decisions.recent} == {"second": "migrate", "first": "wait"}
    before = len(scheduler.running[1].tokens)
    engine.step()
    assert len(scheduler.running[1].tokens) == before + 1
    scheduler.stays("second")  # it could not: somebody has to give way here
    outputs = run(engine)
    assert scheduler.decisions.counts["recompute"] == 1
    assert scheduler.emigrants == {}
    assert {name for name, _ in outputs} == {"first", "second"}
