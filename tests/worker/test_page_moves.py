"""Page moves: told once, held as long as they read, and fenced off by the next plan when they have failed."""

from __future__ import annotations

import pytest

from quire.worker.page_moves import PageMoves
from quire.worker.page_pool import PagePool, PoolCorrupt
from quire.worker.plan import LinkEnd, Move, Moved, MoveKind


def test_a_move_is_told_once_and_the_next_plan_names_it_when_it_has_failed() -> None:
    pool = PagePool(4, 2)
    moves = PageMoves(pool)
    heard: list[Moved] = []
    pages = pool.allocate(2)
    assert pages == [0, 1]
    assert moves.start(MoveKind.OUT, pages, heard.append, host_pages=(7, 8)) == 0
    moves.open(LinkEnd("a", 1, ()))
    moves.close("b")
    assert moves.pending()
    assert moves.take() == ((Move(0, MoveKind.OUT, (0, 1), (7, 8)),), (), (LinkEnd("a", 1, ()),), ("b",))
    assert not moves.pending()
    assert moves.take() == ((), (), (), ())
    moves.ended([Moved(0, 2, 0.5)])
    assert heard == [Moved(0, 2, 0.5)]
    assert not moves.under_way()
    assert moves.take().fenced == ()
    moves.start(MoveKind.OUT, pages, heard.append, host_pages=(7, 8))
    moves.take()
    moves.ended([Moved(1, error="no")])
    assert not moves.pending()
    assert moves.take().fenced == (1,)
    assert moves.take().fenced == ()


@pytest.mark.parametrize(("kind", "held"), [(MoveKind.OUT, 2), (MoveKind.SEND, 2), (MoveKind.IN, 1), (MoveKind.RECEIVE, 1)])
def test_pages_that_are_read_cannot_be_reused_before_the_end(kind: MoveKind, held: int) -> None:
    pool = PagePool(1, 2)
    moves = PageMoves(pool)
    pages = pool.allocate(1)
    assert pages is not None
    moves.start(kind, pages, lambda moved: None)
    assert pool.references == [held]
    pool.check([pages, *moves.held()])
    if held == 2:
        with pytest.raises(PoolCorrupt):
            pool.check([pages])
    pool.release(pages)
    assert pool.allocate(1) == (None if held == 2 else [0])
    if held == 2:
        moves.ended([Moved(0)])
        assert pool.allocate(1) == [0]


def test_who_started_it_hears_of_the_end_while_the_pages_are_still_held() -> None:
    pool = PagePool(1, 2)
    moves = PageMoves(pool)
    pages = pool.allocate(1)
    assert pages is not None
    counts: list[int] = []
    moves.start(MoveKind.SEND, pages, lambda moved: counts.append(pool.references[0]))
    pool.release(pages)
    moves.ended([Moved(0, error="gone")])
    assert counts == [1]
    assert pool.counts().free == 1
