"""The host pool's books: evicted prefixes with exact page ids, and one pair of events for what either tier holds."""

from __future__ import annotations

import pytest
from paged_memory import expected_output, hash_engine
from test_scheduler import request, run, tokens

from quire.worker.engine import Engine
from quire.worker.host_tier import HostTier
from quire.worker.page_moves import PageMoves
from quire.worker.page_pool import PagePool
from quire.worker.plan import Move, Moved, MoveKind


class Tiers:
    """Four pages of two tokens on the device and three in host memory, without anybody who runs."""

    def __init__(self, host_pages: int = 3) -> None:
        self.pool = PagePool(4, 2, b"key")
        self.moves = PageMoves(self.pool)
        self.host = HostTier(host_pages, self.pool, self.moves)

    def cached(self, *firsts: int) -> list[bytes]:
        """Make pages that hold [first, first] cached, in this order; their hashes."""
        hashes = []
        for first in firsts:
            (page,) = self.pool.allocate(1)
            hashes.append(self.pool.register(page, self.pool.root(""), [first, first]))
            self.pool.release([page])
        return hashes

    def end(self, error: str | None = None) -> tuple[Move, ...]:
        """The moves that the next plan tells of end."""
        moves = self.moves.take().moves
        self.moves.ended([Moved(move.move, len(move.pages), 0.5, error) for move in moves])
        self.check()
        return moves

    def check(self) -> None:
        self.pool.check(self.moves.held())
        self.host.pages.check(self.host.held())

    def events(self) -> tuple[set[bytes], set[bytes]]:
        changes = self.pool.events.since(0)
        return set(changes.stored), set(changes.removed)


def test_the_oldest_cached_pages_leave_ahead_of_need() -> None:
    tiers = Tiers()
    hashes = tiers.cached(1, 2, 3, 4)  # pages 0 to 3
    tiers.host.evict_ahead(wanted=2, most=8)
    tiers.check()
    assert tiers.pool.counts().active == 2  # held by the move
    tiers.host.evict_ahead(wanted=2, most=8)  # they are on their way
    assert tiers.end() == (Move(0, MoveKind.OUT, (0, 1), (0, 1)),)
    assert (tiers.pool.counts().free, tiers.pool.counts().cached) == (2, 2)
    assert tiers.host.pages.counts().cached == 2
    assert tiers.moves.pages_per_s(MoveKind.OUT) == 4.0
    assert tiers.events() == (set(hashes), set())  # still findable
    assert set(tiers.pool.findable()) == set(hashes)


def test_the_maps_of_both_tiers_show_what_moves() -> None:
    tiers = Tiers()
    tiers.cached(1, 2, 3, 4)

    def maps() -> tuple[bytes, bytes]:
        return tiers.pool.page_map(page for pages in tiers.moves.held() for page in pages), tiers.host.page_map()

    tiers.host.evict_ahead(wanted=2, most=8)
    assert maps() == (b"mmcc", b"mmf")
    tiers.end()
    assert maps() == (b"ffcc", b"ccf")
    (page,) = tiers.pool.reserve(1)
    tiers.host.bring([0], [page], lambda moved: None)
    assert (page, maps()) == (0, (b"rfcc", b"mcf"))
    tiers.end()
    tiers.pool.commit([page])
    assert maps() == (b"afcc", b"ccf")
    kept = tiers.host.keep([page], [None], lambda moved: tiers.pool.release([page]))
    assert (kept, maps()) == ([2], (b"mfcc", b"ccm"))
    tiers.moves.ended([Moved(2, 1, 0.5)])
    assert maps() == (b"ffcc", b"cca")  # kept for a sequence that is out
    tiers.host.release(kept)
    assert maps() == (b"ffcc", b"ccf")


def test_no_more_leave_at_once_than_allowed_and_none_without_a_host_pool() -> None:
    tiers = Tiers()
    tiers.cached(1, 2, 3, 4)
    tiers.host.evict_ahead(wanted=4, most=1)
    assert tiers.end() == (Move(0, MoveKind.OUT, (0,), (0,)),)
    none = Tiers(host_pages=0)
    none.cached(1, 2)
    none.host.evict_ahead(wanted=4, most=4)
    assert none.end() == ()
    assert none.pool.counts().cached == 2


def test_what_host_memory_has_already_is_freed_at_once() -> None:
    tiers = Tiers()
    tiers.cached(1, 2, 3, 4)
    tiers.host.evict_ahead(2, 8)
    tiers.end()
    tiers.cached(1)  # computed again, into a page that was freed
    tiers.pool.retain([2, 3])
    tiers.pool.release([2, 3])  # page 1's newcomer is the oldest now
    tiers.host.evict_ahead(2, 1)
    assert tiers.end() == ()
    assert tiers.pool.counts().free == 2


def test_who_finds_a_page_that_is_leaving_keeps_it() -> None:
    tiers = Tiers()
    tiers.cached(1)
    tiers.host.evict_ahead(4, 1)
    tiers.pool.retain([0])
    tiers.moves.ended([Moved(0, 1, 0.5)])
    tiers.pool.check([[0]])
    assert tiers.pool.find(tiers.pool.root(""), [1, 1], 1)[0] == [0]
    tiers.pool.release([0])
    assert tiers.pool.counts().cached == 1


def test_the_events_of_two_tiers_are_those_of_one() -> None:
    tiers = Tiers(host_pages=1)
    one, two = tiers.cached(1, 2)
    tiers.host.evict_ahead(3, 1)
    tiers.end()
    assert tiers.events() == ({one, two}, set())
    tiers.host.evict_ahead(4, 1)  # the host pool has one page: the first prefix is lost
    tiers.end()
    assert tiers.events() == ({two}, set())
    tiers.pool.allocate(4)
    assert tiers.events() == ({two}, set())
    tiers.host.pages.allocate(1)
    assert tiers.events() == (set(), set())


def test_a_copy_that_fails_is_not_found() -> None:
    tiers = Tiers()
    (one,) = tiers.cached(1)
    tiers.host.evict_ahead(4, 1)
    tiers.end(error="lost")
    assert tiers.host.pages.counts().free == 3
    assert tiers.pool.counts().cached == 1
    tiers.host.evict_ahead(4, 1)
    tiers.end()
    pages = tiers.pool.reserve(1)
    heard: list[Moved] = []
    tiers.host.bring([0], pages, heard.append)
    tiers.end(error="lost")
    tiers.pool.cancel(pages)
    tiers.check()
    assert heard[0].error == "lost"
    assert tiers.host.pages.counts().free == 3
    assert tiers.events() == (set(), set())
    assert one not in tiers.pool.findable()


def served(engine: Engine, name: str, prompt: list[int]) -> tuple[int, list[int]]:
    """A request alone: its cached tokens, and its output."""
    engine.submit(request(name, prompt, max_tokens=2))
    outputs = run(engine)[name, 0]
    while engine.scheduler.moves.under_way():
        engine.step()
    return outputs[0].cached_tokens, tokens(outputs)


def test_a_prefix_that_was_evicted_is_brought_back_and_not_computed_again() -> None:
    engine = hash_engine(pages=8, page_size=4, max_batch_tokens=8, host_pages=40)
    prompts = [[k, *range(1, 21)] for k in range(1, 6)]  # six pages each, of which five can be found
    for i, prompt in enumerate(prompts):
        assert served(engine, f"cold{i}", prompt)[0] == 0
    counts = engine.scheduler.pool.counts()
    assert counts.free + counts.cached == 8
    before = engine.runner.computed_tokens
    cached, output = served(engine, "again", prompts[0])
    assert cached == 20
    assert output == expected_output(prompts[0], 1, 2, ignore_eos=True)
    assert engine.runner.computed_tokens - before == 1 + 1
    assert engine.stats().host_hit_tokens == 20
    assert engine.load().pages_host == engine.scheduler.host.pages.counts().cached > 0


def test_a_hit_may_alternate_between_the_tiers() -> None:
    engine = hash_engine(pages=16, page_size=4, host_pages=8)
    scheduler = engine.scheduler
    prompt = list(range(1, 18))
    served(engine, "a", prompt)
    pool = scheduler.pool
    (pages, _) = pool.find(pool.root(""), prompt, 4)
    contents = [pool.content(page) for page in pages]
    pool.retain(pages)
    kept = scheduler.host.keep([pages[1], pages[3]], [contents[1], contents[3]], lambda moved: None)
    engine.step()
    engine.step()
    pool.release(pages)
    scheduler.host.release(kept)
    pool.drop(pages[1])
    pool.drop(pages[3])
    engine.submit(request("b", prompt, max_tokens=2))
    plan = scheduler.plan()
    assert [(m.kind, m.host_pages) for m in plan.moves] == [(MoveKind.IN, (0, 1))]
    (b,) = scheduler.arriving
    assert [page for page in b.arrival.pages if page not in b.arrival.coming] == [pages[0], pages[2]]
    scheduler.apply(engine.runner.run(plan))
    assert tokens(run(engine)["b", 0]) == expected_output(prompt, 1, 2, ignore_eos=True)


@pytest.mark.parametrize(("pages_per_s", "tokens_per_s", "brought"), [(10.0, 20.0, True), (1.0, 1000.0, False), (0.0, 20.0, True)])
def test_a_prefix_is_brought_only_if_that_is_quicker(pages_per_s: float, tokens_per_s: float, brought: bool) -> None:
    engine = hash_engine(pages=8, page_size=4, max_batch_tokens=8, host_pages=40)
    for k in range(1, 6):
        served(engine, f"cold{k}", [k, *range(1, 21)])
    scheduler = engine.scheduler
    scheduler.moves.pages_per_s = lambda kind: pages_per_s
    scheduler.speeds._prefill_tokens, scheduler.speeds._prefill_s = tokens_per_s, 1.0
    assert (served(engine, "again", [1, *range(1, 21)])[0] > 0) is brought
