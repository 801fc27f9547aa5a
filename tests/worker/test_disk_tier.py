"""Sequences on disk, with exact pages: when they go there, how they come back, and what is left of the file."""

from __future__ import annotations

import pytest
from paged_memory import expected_output, hash_engine
from test_scheduler import request, run, tokens
from test_swapping import crowded, step

from quire.worker.plan import Move, MoveKind, Row
from quire.worker.protocol import FinishReason
from quire.worker.snapshot import SequenceSnapshot


def test_who_finds_no_room_in_host_memory_is_suspended_and_comes_back_with_every_page() -> None:
    engine, memory = crowded(host_pages=2, disk_pages=8)
    scheduler = engine.scheduler
    while not (plan := step(engine)).moves:
        pass
    (save,) = plan.moves
    assert save[:4] == (0, MoveKind.SAVE, (2, 3, 5), ())
    snapshot = SequenceSnapshot.from_bytes(save.snapshot)
    second = scheduler.waiting[0]
    assert (snapshot.request_id, snapshot.tokens, snapshot.num_computed) == ("second", tuple(second.tokens), 11)
    assert (second.kept.file, second.kept.computed, second.pages, scheduler.disk.used) == (save.file, 11, [], 3)
    while not (plan := step(engine)).moves:
        assert scheduler.waiting == [second]
        assert list(memory.files) == [save.file]
    assert plan.moves == (Move(1, MoveKind.LOAD, (0, 1, 4), (0, 1, 2), file=save.file),)
    plan = step(engine)
    assert plan.rows == (Row(1, 11, 1, True),)  # nothing is computed again
    assert plan.moves == (Move(2, MoveKind.ERASE, (), file=save.file),)
    run(engine)
    step(engine)
    assert (memory.files, scheduler.disk.used) == ({}, 0)
    assert scheduler.counters.recomputed_tokens == 0
    assert scheduler.decisions.counts == {"wait": 1, "recompute": 0, "swap": 0, "suspend": 1, "migrate": 0}
    stats = engine.stats()
    assert (stats.moved_bytes["save"], stats.moved_bytes["load"], stats.disk_pages) == (3, 3, 0)


def test_pages_that_the_device_still_has_are_not_read() -> None:
    engine = hash_engine(pages=16, page_size=4, disk_pages=8, preemption="swap")
    scheduler = engine.scheduler
    engine.submit(request("a", [1] * 9, max_tokens=6))
    for _ in range(3):
        step(engine)
    (s,) = scheduler.running
    scheduler._suspend(s)
    assert [(m.kind, m.pages) for m in step(engine).moves] == [(MoveKind.SAVE, (0, 1, 2))]
    assert [(m.kind, m.host_pages) for m in step(engine).moves] == [(MoveKind.LOAD, (2,))]
    run(engine)


@pytest.mark.parametrize(("disk_pages", "action"), [(3, "suspend"), (2, "recompute")])
def test_files_are_bounded(disk_pages: int, action: str) -> None:
    engine, _ = crowded(host_pages=0, disk_pages=disk_pages)
    outputs = run(engine)
    assert engine.scheduler.decisions.counts[action] == 1
    assert tokens(outputs["second", 0]) == expected_output([2] * 7, 1, 9, ignore_eos=True)


@pytest.mark.parametrize(("failing", "total"), [(1, 0), (2, 8)])
def test_a_file_that_cannot_be_written_or_read_costs_a_recompute(failing: int, total: int) -> None:
    engine, memory = crowded(host_pages=0, disk_pages=8)
    memory.failing = failing  # 1: it is not written, so nobody tries again; 2: it is not read
    outputs = run(engine)
    memory.failing = None
    while engine.scheduler.moves.under_way() or engine.scheduler.moves.pending():
        step(engine)
    assert engine.scheduler.counters.recomputed_tokens == 11
    assert tokens(outputs["second", 0]) == expected_output([2] * 7, 1, 9, ignore_eos=True)
    assert engine.scheduler.disk.total == total


@pytest.mark.parametrize("moment", ["leaving", "gone", "arriving"])
def test_an_abort_leaves_no_file_whenever_it_comes(moment: str) -> None:
    engine, memory = crowded(host_pages=0, disk_pages=8)
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
    run(engine)
    while scheduler.moves.under_way() or scheduler.moves.pending():
        step(engine)
    assert scheduler.pool.counts().free == 6
    assert (memory.files, scheduler.disk.used) == ({}, 0)
