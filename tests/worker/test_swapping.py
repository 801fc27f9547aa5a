"""Swapping with exact page ids, and text that stays the same when sequences are swapped out at random.

The hash model's copies to host memory and back end some steps after they started, and read and write at their end.
"""

from __future__ import annotations

import random

import pytest
from disturbing import swap_at_random
from paged_memory import PagedMemory, expected_output, hash_engine
from test_scheduler import request, run, tokens

from quire.worker.engine import Engine
from quire.worker.plan import Move, MoveKind, Row
from quire.worker.protocol import FinishReason, SequenceOutput
from quire.worker.sequence import State, sequence_seed


def crowded(**options) -> tuple[Engine, PagedMemory]:
    """Two sequences that outgrow six pages; both have computed seven tokens and a half-full page."""
    engine = hash_engine(pages=6, page_size=4, **{"host_pages": 8, "preemption": "swap", "prefix_cache": False} | options)
    engine.submit(request("first", [1] * 8, max_tokens=12))
    engine.submit(request("second", [2] * 7, max_tokens=9))
    return engine, engine.runner


def step(engine: Engine) -> tuple:
    """One step by hand; its plan."""
    engine.scheduler.moves.ended(engine.runner.poll())
    plan = engine.scheduler.plan()
    engine.scheduler.check()
    if plan is not None:
        engine.scheduler.apply(engine.runner.run(plan))
        engine.scheduler.check()
    return plan


def test_a_sequence_leaves_whole_and_comes_back_with_every_page() -> None:
    engine, _ = crowded()
    scheduler = engine.scheduler
    while not (plan := step(engine)).moves:
        pass
    # The first needs a page. The second has computed 11 tokens: its half-full third page leaves too. Nobody is planned: the first waits.
    assert plan.moves == (Move(0, MoveKind.OUT, (2, 3, 5), (0, 1, 2)),)
    assert plan.forget == (1,)
    assert plan.rows == ()
    second = scheduler.waiting[0]
    assert (second.kept.computed, second.kept.pages, second.pages) == (11, [0, 1, 2], [])
    plan = step(engine)
    assert plan.rows == (Row(0, 12, 1, True),)
    while not (plan := step(engine)).moves:
        assert scheduler.waiting == [second]
    # The first has ended: all six pages are free, and its own were freed last.
    assert plan.moves == (Move(1, MoveKind.IN, (0, 1, 4), (0, 1, 2)),)
    assert second.state is State.ARRIVING
    assert scheduler.pool.counts().reserved == 3
    assert scheduler.host.pages.counts().active == 3
    plan = step(engine)
    assert plan.rows == (Row(1, 11, 1, True),)  # nothing is computed again
    assert [new.pages for new in plan.new] == [(0, 1, 4)]
    assert scheduler.host.pages.counts().free == 8
    assert scheduler.counters.recomputed_tokens == 0
    assert scheduler.decisions.counts == {"wait": 1, "recompute": 0, "swap": 1, "suspend": 0, "migrate": 0}


def test_what_host_memory_or_the_device_still_has_is_not_copied() -> None:
    engine = hash_engine(pages=16, page_size=4, host_pages=8, preemption="swap")
    scheduler = engine.scheduler
    engine.submit(request("a", [1] * 9, n=2, max_tokens=6))
    for _ in range(3):
        step(engine)
    leader, follower = scheduler.running
    assert (leader.pages, follower.pages) == ([0, 1, 2], [0, 1, 3])
    scheduler._swap_out(leader)
    scheduler._swap_out(follower)
    plan = scheduler.plan()
    # The two full pages of the prompt are copied once for both, the tails for each.
    assert [(m.kind, m.pages, m.host_pages) for m in plan.moves] == [
        (MoveKind.OUT, (0, 1, 2), (0, 1, 2)),
        (MoveKind.OUT, (3,), (3,)),
    ]
    assert [s.kept.pages for s in (leader, follower)] == [[0, 1, 2], [0, 1, 3]]
    scheduler.check()
    assert plan.rows == ()  # neither can come back before it is gone
    scheduler.apply(engine.runner.run(plan))
    plan = step(engine)  # pages 0 and 1 are cached on the device: only the tails come
    assert [(m.kind, m.host_pages) for m in plan.moves] == [(MoveKind.IN, (2,)), (MoveKind.IN, (3,))]
    outputs = run(engine)
    for k in range(2):
        got = [t for o in outputs["a", k] for t in o.tokens]
        assert got == expected_output([1] * 9, sequence_seed(1, k), 6, ignore_eos=True)[-len(got) :]


def test_who_has_no_room_in_host_memory_is_recomputed() -> None:
    engine, _ = crowded(host_pages=2)
    outputs = run(engine)
    assert engine.scheduler.decisions.counts["recompute"] == 1
    assert [r.reason for r in engine.scheduler.decisions.recent if r.action == "recompute"] == ["nothing else was possible"]
    assert tokens(outputs["second", 0]) == expected_output([2] * 7, 1, 9, ignore_eos=True)


@pytest.mark.parametrize("moment", ["leaving", "gone", "arriving"])
def test_an_abort_frees_everything_whenever_it_comes(moment: str) -> None:
    engine, memory = crowded()
    scheduler = engine.scheduler
    memory.delay = 3
    while not step(engine).moves:
        pass
    if moment != "leaving":
        while scheduler.moves.under_way():
            step(engine)
    if moment == "arriving":
        while not scheduler.arriving:
            step(engine)
    assert [o.finish for o in engine.abort("second")] == [FinishReason.ABORT]
    scheduler.check()
    assert scheduler.pool.counts().reserved == (3 if moment == "arriving" else 0)
    run(engine)
    while scheduler.moves.under_way():
        step(engine)
    assert scheduler.pool.counts().free == 6
    assert scheduler.host.pages.counts().free == 8


@pytest.mark.parametrize("failing", [1, 2])
def test_a_copy_that_fails_costs_a_recompute_and_nothing_else(failing: int) -> None:
    engine, memory = crowded()
    memory.failing = failing  # 1: the copy out fails, 2: the copy in
    outputs = run(engine)
    assert engine.scheduler.counters.recomputed_tokens == 11
    assert tokens(outputs["second", 0]) == expected_output([2] * 7, 1, 9, ignore_eos=True)


def test_a_higher_priority_does_not_take_a_second_victim_while_the_first_is_leaving() -> None:
    engine = hash_engine(pages=6, page_size=4, max_batch_tokens=40, host_pages=8, preemption="swap", prefix_cache=False)
    scheduler = engine.scheduler
    engine.runner.delay = 2
    for name in ("x", "y"):
        engine.submit(request(name, [2] * 9, priority=3, max_tokens=7))
    step(engine)
    engine.submit(request("high", [3] * 9, max_tokens=1))
    for _ in range(2):
        step(engine)
        assert [s.request_id for s in scheduler.running] == ["x"]
        assert [s.request_id for s in scheduler.waiting] == ["high", "y"]
    assert [row.seq for row in step(engine).rows] == [0, 2]
    assert scheduler.decisions.counts["swap"] == 1
    run(engine)


def test_a_page_that_is_copied_on_write_leaves_with_what_it_was_to_hold() -> None:
    """Who gives way in the very step that was to copy its shared tail: the copy is carried out before the page leaves."""
    engine = hash_engine(pages=16, page_size=4, host_pages=16, preemption="swap")
    scheduler = engine.scheduler
    prompt = [1, 2, 3, 4, 5, 6]
    engine.submit(request("a", prompt, n=2, max_tokens=6))
    outputs = engine.step()
    scheduler.moves.ended(engine.runner.poll())
    serve = scheduler._admit

    def admit_and_swap(below: int) -> None:
        serve(below)
        for s in [s for s in scheduler.running if s in scheduler._copies]:
            scheduler._swap_out(s)
            scheduler._below = -100

    scheduler._admit = admit_and_swap
    plan = scheduler.plan()
    assert len(plan.copies) == 1
    assert plan.moves[0].pages == (0, plan.copies[0][1])
    scheduler._admit = serve
    outputs += scheduler.apply(engine.runner.run(plan))
    outputs += [o for some in run(engine).values() for o in some]
    for k in range(2):
        assert tokens([o for o in outputs if o.choice == k]) == expected_output(prompt, sequence_seed(1, k), 6, ignore_eos=True)


@pytest.mark.parametrize("seed", range(40))
def test_text_is_the_same_when_sequences_are_swapped_at_random(seed: int) -> None:
    draw = random.Random(seed)
    page_size = draw.choice([3, 4, 5])
    pages = draw.randint(24, 40)
    engine = hash_engine(
        pages,
        page_size,
        max_batch_tokens=draw.choice([8, 24, 60]),
        max_running=draw.randint(2, 8),
        prefix_cache=draw.random() < 0.7,
        host_pages=draw.choice([6, 40, 200]),
        preemption=draw.choice(["decide", "swap", "swap", "recompute"]),
        disk_pages=draw.choice([0, 0, 20, 200]),
    )
    engine.runner.delay = draw.randint(1, 4)
    engine.runner.failing = draw.choice([None, None, 7])
    prompts = {}
    for i in range(30):
        length = draw.randint(1, 40)
        prompts[f"r{i}"] = (
            [draw.randint(1, 2)] * (length // 2) + [draw.randint(1, 4) for _ in range(length - length // 2)],
            draw.randint(1, 3),
        )
    often = draw.choice([0.0, 0.05, 0.2])
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    upcoming = list(prompts)
    steps = 0
    while upcoming or not engine.idle():
        if upcoming and draw.random() < 0.3:
            name = upcoming.pop(0)
            prompt, n = prompts[name]
            engine.submit(request(name, prompt, n=n, max_tokens=24, priority=draw.randint(0, 1)))
        swap_at_random(engine, draw, often)
        for o in engine.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
        engine.scheduler.check()
        steps += 1
        assert steps < 20_000
    for name, (prompt, n) in prompts.items():
        for k in range(n):
            assert tokens(outputs[name, k]) == expected_output(prompt, sequence_seed(1, k), 24, ignore_eos=True)
    while engine.runner.moving or not engine.resting:
        engine.step()
        engine.scheduler.check()
    changes = engine.scheduler.pool.events.since(0)
    assert changes.removed == ()
    assert set(changes.stored) == set(engine.scheduler.pool.findable())
    assert engine.scheduler.pool.counts().active == engine.scheduler.host.pages.counts().active == 0
