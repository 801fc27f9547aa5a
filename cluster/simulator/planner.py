"""Which tokens of which sequences a simulated replica computes next. Knows no time.

It plans as `worker.scheduler` does: decodes first, then prompts in chunks, in scheduling order under `max_batch_tokens`, then those that
wait, from the head, each only if the pool holds all its tokens beside what the others still need and room for them to grow. Prefixes are
found by page hash. What it leaves out: a request has one sequence, whose output is as long as asked for; and who gives way when pages
run out does so by recompute, from what can be found of its prompt, since there is no host memory; nobody waits for a neighbour's end.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import NamedTuple

from ...worker.events import EventLog
from .decode_batch import DecodeBatch
from .pages import Pages
from .sequence import Sequence
from .speed_profile import ReplicaShape

_ORDER = attrgetter("order")


class Berth(NamedTuple):
    """What is kept for a sequence that is on its way: pages in all, and the hashes of those among them that were here."""

    pages: int
    found: tuple[bytes, ...]


class Planner:
    """Sequences that run and wait, and their pages. `planned` are the prompt tokens of each that the step under way computes."""

    def __init__(self, shape: ReplicaShape) -> None:
        self.shape = shape
        self.log = EventLog()
        self.pages = Pages(shape.pages, self.log)
        self.batch = DecodeBatch(shape.page_size)
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.planned: dict[Sequence, int] = {}
        self.awaited = 0  # places kept for sequences on their way here
        self.preemptions = self.recomputed_tokens = 0

    # --- coming and going ---

    def queue(self, s: Sequence) -> None:
        """It waits for its turn, and has nothing yet."""
        s.computed = s.pages = s.indexed = 0
        insort(self.waiting, s, key=_ORDER)

    def take_out(self, s: Sequence) -> None:
        """It runs and waits no longer, and holds nothing. Only between two steps."""
        if s in self.batch:
            self.batch.remove(s)
        elif s in self.prefilling:
            self.prefilling.remove(s)
            self.planned.pop(s, None)
        else:
            self.waiting.remove(s)
        self.let_go(s)

    def let_go(self, s: Sequence) -> None:
        """Its pages are others' now."""
        self.pages.release(s.shared)
        self.pages.give_back(s.pages - len(s.shared))
        s.shared = []

    def reserve(self, s: Sequence) -> Berth | None:
        """Place and pages for a sequence that decodes elsewhere; None when there is no room."""
        found = s.hashes[: self.pages.find(s.hashes, s.computed // self.shape.page_size)]
        fresh = s.pages - len(found)
        if not self._holds(fresh + self.pages.cached_among(found), self._promised()):
            return None
        self.pages.hold(found)
        self.pages.take(fresh)
        self.awaited += 1
        return Berth(s.pages, found)

    def widen(self, berth: Berth, pages: int) -> Berth | None:
        """The sequence has grown meanwhile, and takes so many pages now; None when they are not there."""
        more = pages - berth.pages
        if more > self._room():
            return None
        self.pages.take(more)
        return Berth(pages, berth.found)

    def cancel(self, berth: Berth) -> None:
        """It will not come."""
        self.awaited -= 1
        self.pages.release(berth.found)
        self.pages.give_back(berth.pages - len(berth.found))

    def settle_in(self, s: Sequence, berth: Berth, computed: int) -> None:
        """It has come, with its pages."""
        self.awaited -= 1
        s.computed, s.pages, s.shared, s.indexed = computed, berth.pages, list(berth.found), len(berth.found)
        self.index(s)
        self.batch.add(s)

    def index(self, s: Sequence) -> None:
        """The full pages of its prompt that have been computed are found from now on."""
        full = min(s.computed // self.shape.page_size, len(s.hashes))
        for digest in s.hashes[s.indexed : full]:
            if self.pages.register(digest):
                s.shared.append(digest)
        s.indexed = max(s.indexed, full)

    # --- what there is ---

    def seats(self) -> int:
        """Sequences that could start."""
        return self.shape.max_running - len(self.batch) - len(self.prefilling) - self.awaited

    def pending_tokens(self) -> int:
        """Prompt tokens to compute."""
        to_go = (s.known - s.computed for some in (self.prefilling, self.waiting) for s in some)
        return sum(count for count in to_go if count > 1)

    # --- planning ---

    def plan(self) -> None:
        """The next step: `planned`, and one token of everything in `batch`."""
        while self.batch.pages_needed(1) > self.pages.available and self._preempt():
            pass
        budget = self.shape.max_batch_tokens - len(self.batch)
        for s in list(self.prefilling):
            budget -= self._serve(s, budget)
        self._admit(budget)

    def _serve(self, s: Sequence, budget: int) -> int:
        """The next chunk of a prompt; its tokens."""
        count = min(s.known - s.computed, budget)
        while s in self.prefilling and count > 0:
            if self._pages_for(s.computed + count) - s.pages <= self._room():
                self._hold(s, count)
                return count
            if not self._preempt():
                break
        return 0

    def _hold(self, s: Sequence, count: int) -> None:
        lacking = self._pages_for(s.computed + count) - s.pages
        self.pages.take(lacking)
        s.pages += lacking
        self.planned[s] = count

    def _preempt(self) -> bool:
        """Somebody gives way, if not only one runs: of the least urgent ones, without the first in the order, who loses the least."""
        running = sorted([*self.batch.members(), *self.prefilling], key=_ORDER)[1:]
        if not running:
            return False
        for s in running:
            if s in self.batch:
                self.batch.sync(s)
        victim = min(reversed(running), key=lambda s: (-s.priority, s.computed - len(s.shared) * self.shape.page_size))
        self.take_out(victim)
        self.recomputed_tokens += victim.computed
        self.preemptions += 1
        self.queue(victim)
        return True

    def _room(self) -> int:
        """Pages beside those that the next token of each decode needs."""
        return self.pages.available - self.batch.pages_needed(1)

    def _promised(self) -> int:
        """Pages that prompts under way will need."""
        return sum(self._pages_for(s.known) - s.pages for s in self.prefilling)

    def _admit(self, budget: int) -> None:
        size = self.shape.page_size
        while self.waiting and budget > 0:
            s = self.waiting[0]
            found = s.hashes[: self.pages.find(s.hashes, (s.known - 1) // size)]
            needed = self._pages_for(s.known) - len(found) + self.pages.cached_among(found)
            promised = self._promised()
            if not self._holds(needed, promised):
                if self._displace(s, needed, promised):
                    continue
                return
            self.waiting.pop(0)
            self.pages.hold(found)
            s.shared, s.indexed, s.pages, s.computed = list(found), len(found), len(found), len(found) * size
            s.cached_tokens = s.computed if s.cached_tokens is None else s.cached_tokens
            insort(self.prefilling, s, key=_ORDER)
            count = min(s.known - s.computed, budget)
            self._hold(s, count)
            budget -= count

    def _holds(self, needed: int, promised: int) -> bool:
        growing = len(self.batch) + len(self.prefilling)
        return self.seats() > 0 and self._room() - promised - growing // 4 >= needed

    def _displace(self, s: Sequence, needed: int, promised: int) -> bool:
        """The last of those that run gives way for `s`, if it is less urgent, and all such together would be enough."""
        lower = [other for other in [*self.batch.members(), *self.prefilling] if other.priority > s.priority]
        for other in lower:
            if other in self.batch:
                self.batch.sync(other)
        if not lower or self._room() - promised + sum(other.pages for other in lower) < needed:
            return False
        return self._preempt()

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.shape.page_size)
