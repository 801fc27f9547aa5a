"""What is kept for a migration at its destination: places, pages that are here already, and pages that will come. Pure.

    Berth(offer) --make_room--> reserved --came--> pages with content --install--> block tables
                                     |                  |
                                     +---- release -----+--> free

A page that a RECEIVE may still write stays reserved until that move has ended, whatever becomes of the berth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Some
from typing import Protocol

from .migration_wire import Commit, Moving, Offer
from .page_pool import PagePool
from .scheduler import Scheduler
from .station import Placed


class Unfit(Exception):
    """It cannot be taken; the text says why."""


class Arrivals(Protocol):
    """Where a request that has arrived goes."""

    def check(self, offer: Offer) -> None:
        """Raises Unfit when such a request cannot be taken here."""

    def install(self, offer: Offer, moved: dict[int, Moving], ended_tokens: int, placed: dict[int, Placed]) -> None:
        """It goes on here, from now on. Raises Unfit when that has become impossible; then nothing has happened."""


class Berth:
    """For one offer.

    Raises:
        Unfit: there is no room, or what is offered does not fit here.
    """

    def __init__(self, scheduler: Scheduler, name: str, offer: Offer, arrivals: Arrivals) -> None:
        self._scheduler = scheduler
        self._pool: PagePool = scheduler.pool
        self._name = name
        self._offer = offer
        self._arrivals = arrivals
        self._rounds: dict[int, list[int]] = {}  # round -> reserved pages that have got their content
        self._over = False
        self.is_fill = not offer.ingress
        self._check()
        root = self._pool.root(offer.tenant)
        self._found: dict[int, Placed] = {}  # choice -> the head of its table, as far as it is here
        for s in offer.sequences:
            limit = len(s.tokens) // self._pool.page_size if self.is_fill else (len(s.tokens) - 1) // self._pool.page_size
            pages, hashes = self._pool.find(root, s.tokens, limit)
            self._pool.retain(pages)
            self._found[s.choice] = Placed(pages, hashes, len(pages) * self._pool.page_size)
        self._repin()
        self._awaited = 0 if self.is_fill else offer.running
        scheduler.awaited += self._awaited
        missing = offer.pages - max(len(f.pages) for f in self._found.values())
        if offer.pages and missing + self._awaited > scheduler.spare_pages():
            self.release()
            raise Unfit(f"it needs {missing + self._awaited} pages, and {max(scheduler.spare_pages(), 0)} can be spared")

    @property
    def found(self) -> tuple[int, ...]:
        """Pages at the head of each offered sequence that are here already."""
        return tuple(len(self._found[s.choice].pages) for s in self._offer.sequences)

    def make_room(self, pages: int) -> list[int] | None:
        """Reserved pages; None when they cannot be spared."""
        return self._pool.reserve(pages) if 0 < pages <= self._scheduler.spare_pages() else None

    def came(self, round_: int, reserved: Some[int], pages: int) -> None:
        """The RECEIVE of a round has ended, and so many of its pages hold something."""
        if self._over:
            pages = 0
        self._pool.cancel(reserved[pages:])
        if not self._over:
            self._pool.commit(reserved[:pages])
            self._rounds[round_] = list(reserved[:pages])
            self._repin()

    def whole(self, commit: Commit) -> bool:
        """Whether all that it was sent is here."""
        return all(i in self._rounds for i in range(commit.rounds))

    def install(self, commit: Commit) -> None:
        """Let it go on here. Raises Unfit; then nothing has happened."""
        came = [page for i in range(commit.rounds) for page in self._rounds[i]]
        if len(came) != commit.sent:
            raise Unfit(f"{len(came)} pages came where {commit.sent} were sent")
        moved = {m.choice: m for m in commit.sequences}
        if not moved or not moved.keys() <= self._found.keys():
            raise Unfit("what was committed is not what was offered")
        tables = {m.choice: self._table(m, came) for m in commit.sequences if m.num_computed}
        if self.is_fill:
            for table in tables.values():
                self._register(table)
            self.release()
            return
        places = self._awaited + max(self._scheduler.free_places(), 0)
        placed = dict(list(tables.items())[:places])  # who began to run after the offer may find no place here, and begins again
        for table in placed.values():
            self._pool.retain(table.pages)
        try:
            self._arrivals.install(self._offer, moved, commit.ended_tokens, placed)
        except Unfit:
            for table in placed.values():
                self._pool.release(table.pages)
            raise
        self.release()

    def release(self) -> None:
        """Nothing is kept any more. Pages that are on their way are given back by `came`."""
        if not self._over:
            self._over = True
            self._scheduler.awaited -= self._awaited
            self._pool.release(self._scheduler.pins.pop(self._name))

    # --- inside ---

    def _check(self) -> None:
        offer = self._offer
        if self._scheduler.isolation.suspect() is not None:
            raise Unfit("it looks for a request that makes steps fail")
        choices = Counter(s.choice for s in offer.sequences)
        if not choices or max(choices.values()) > 1 or not 0 <= offer.running <= len(choices) or offer.pages < 0:
            raise Unfit("the offer contradicts itself")
        if offer.running > self._scheduler.free_places():
            raise Unfit(f"it needs {offer.running} places, and {max(self._scheduler.free_places(), 0)} are free")
        self._arrivals.check(offer)

    def _repin(self) -> None:
        found = [page for some in self._found.values() for page in some.pages]
        self._scheduler.pins[self._name] = found + [page for some in self._rounds.values() for page in some]

    def _table(self, m: Moving, came: list[int]) -> Placed:
        """Where its pages are."""
        found = self._found[m.choice]
        if not all(0 <= ordinal < len(came) for ordinal in m.table):
            raise Unfit("a block table names a page that was not sent")
        pages = found.pages + [came[ordinal] for ordinal in m.table]
        if len(pages) != self._pool.pages_for(m.num_computed):
            raise Unfit(f"{m.num_computed} tokens cannot lie in {len(pages)} pages")
        return Placed(pages, list(found.hashes), m.num_computed)

    def _register(self, table: Placed) -> None:
        """Make a prefix findable."""
        size, tokens = self._pool.page_size, self._offer.sequences[0].tokens
        parent = self._pool.root(self._offer.tenant)
        for i, page in enumerate(table.pages):
            parent = self._pool.register(page, parent, tokens[i * size : (i + 1) * size])
