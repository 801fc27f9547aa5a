"""Copies to host memory and back: every bit, in order, and told of when they have ended."""

from __future__ import annotations

import threading

import pytest
import torch

from quire.worker.kv_store import KVStore, PageShape
from quire.worker.page_mover import PageMover
from quire.worker.plan import Move, Moved, MoveKind

SHAPE = PageShape(kv_heads=2, layers=3, page_size=4, head_dim=8, dtype=torch.float32)
WAIT_S = 30.0


class Mover:
    """A mover over five pages of random numbers and three in host memory."""

    def __init__(self) -> None:
        self.kv = KVStore(SHAPE, 5, "cpu", host_pages=3)
        torch.manual_seed(0)
        self.kv.pool.normal_()
        self.mover = PageMover(self.kv)
        self.woken = threading.Semaphore(0)
        self.mover.watch(self.woken.release)

    def ended(self, count: int) -> list[Moved]:
        """The next `count` moves to end."""
        for _ in range(count):
            assert self.woken.acquire(timeout=WAIT_S)
        return list(self.mover.poll())


def test_pages_come_back_bit_by_bit() -> None:
    m = Mover()
    before = m.kv.pool.clone()
    m.mover.start([Move(0, MoveKind.OUT, (4, 1), (2, 0)), Move(1, MoveKind.IN, (0, 3), (0, 2))])  # the second reads what the first wrote
    one, two = m.ended(2)
    assert (one.move, one.pages, one.error, two.move, two.pages) == (0, 2, None, 1, 2)
    assert one.seconds > 0
    m.mover.settle([0, 1])
    for page, source in {0: 1, 3: 4, 1: 1, 2: 2, 4: 4}.items():
        assert torch.equal(m.kv.pool[page], before[source])
    assert m.mover.poll() == ()


def test_who_settles_a_move_that_has_not_ended_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Mover()
    gate, settled = threading.Event(), threading.Event()
    copy = m.mover._copy

    def gated(move: Move) -> None:
        assert gate.wait(WAIT_S)
        copy(move)

    monkeypatch.setattr(m.mover, "_copy", gated)
    m.mover.start([Move(7, MoveKind.OUT, (1,), (1,))])
    thread = threading.Thread(target=lambda: (m.mover.settle([7]), settled.set()))
    thread.start()
    assert m.mover.poll() == ()
    assert not settled.is_set()
    gate.set()
    thread.join(WAIT_S)
    assert settled.is_set()
    assert torch.equal(m.kv.host[1], m.kv.pool[1])


def test_a_copy_that_raises_is_an_error_of_its_move_alone() -> None:
    m = Mover()
    m.mover.start([Move(0, MoveKind.OUT, (1,), (9,)), Move(1, MoveKind.SEND, (1,)), Move(2, MoveKind.OUT, (1,), (0,))])
    assert [bool(moved.error) for moved in m.ended(3)] == [True, True, False]
