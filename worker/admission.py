"""Who may start, and who gives way for that: places and pages, counted before they are promised. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from .candidates import candidate
from .page_pool import PagePool
from .pressure import Action, Decision, give_way, make_way
from .sequence import Sequence
from .station import Station
from .swapping import Origin

ANY = 2**31  # above every priority


@dataclass(slots=True)
class _Room:
    """What is left for sequences that wait: places, tokens of this step, and pages beside those that running ones are promised."""

    places: int
    tokens: int
    pages: int
    growing: int  # running sequences that may need more pages than they hold
    left: dict[int, int] = field(default_factory=dict)  # references to pages of sequences that were taken out

    def holds(self, pages: int) -> bool:
        """Whether a sequence that needs so many pages can start.

        With room to grow, so that an admission is not paid for with a preemption a few steps later. None is asked for by a sequence
        that would run alone: whatever the door let in fits then.
        """
        return self.places > 0 and self.tokens > 0 and self.pages - self.growing // 4 >= pages


class Admission(Station):
    """Admits from the head of those that wait, and lets sequences give way.

    Args:
        pool: the pages.
        max_batch_tokens: tokens computed in one step.
        max_running: sequences that run at once; at most `max_batch_tokens`, so that every decode fits in a step.
        host_pages: pages of host memory.
        disk_pages: that may lie in files.
        preemption: `pressure.DECIDE`, or the action that is always taken.

    `_below` bounds who is admitted in the step that is being planned: whose priority is below that of the first who gave way.
    """

    def __init__(self, pool: PagePool, max_batch_tokens: int, max_running: int, host_pages: int, disk_pages: int, preemption: str) -> None:
        super().__init__(pool, host_pages, disk_pages)
        if not 1 <= max_running <= max_batch_tokens:
            raise ValueError(f"max_running must be in [1, max_batch_tokens = {max_batch_tokens}], not {max_running}")
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.preemption = preemption
        self._below = ANY

    # --- places and pages ---

    def _budget(self) -> int:
        return self.max_batch_tokens - sum(count for _, count in self._planned.values())

    def _give_way(self, victim: Sequence, decision: Decision) -> None:
        self._below = min(self._below, victim.priority)
        victim.decision = self.decisions.add(self.counters.steps, victim, decision)
        victim.lost_tokens = decision.lost_tokens
        match decision.action:
            case Action.SWAP:
                self._swap_out(victim)
            case Action.SUSPEND:
                self._suspend(victim)
            case Action.MIGRATE:
                self._emigrate(victim, victim.decision)
            case _:
                self._preempt(victim)

    def _hold_pages(self, s: Sequence, end: int) -> int:
        """Make the block table of `s` cover `end` tokens, with a page of its own to write first into; how many pages lack for that."""
        size = self.pool.page_size
        first = s.num_computed // size
        shared = first < len(s.pages) and not self.pool.writable(s.pages[first])
        missing = self.pool.pages_for(end) - len(s.pages)
        needed = max(missing, 0) + shared
        pages = self.pool.allocate(needed)
        if pages is None:
            return needed - self.pool.available
        if shared:
            source, s.pages[first] = s.pages[first], pages.pop()
            self._copies[s] = (source, s.pages[first])
            self.pool.release([source])
            if s.known_pages > first:  # the runner's block table names the old page: it learns the sequence anew
                self._forget.append(s.seq)
                s.known_pages = 0
        s.pages += pages
        return 0

    # --- admission ---

    def _admit(self, below: int) -> None:
        """Start waiting sequences of a priority lower in number than `below`, from the head of the queue, as long as there is room."""
        if not self.waiting or self.waiting[0].priority >= min(below, self._below):
            return
        room = self._room()
        if room.places < 1 and (not self.running or self.waiting[0].priority >= self.running[-1].priority):
            return
        while self.waiting and self.waiting[0].priority < min(below, self._below) and (room.tokens > 0 or room.places < 1):
            s = self.waiting[0]
            origin = self._origin(s) if s.kept is None else self._origin_kept(s.kept)
            if origin is None:
                return
            shared = origin.shared()
            needed = self.pool.pages_for(len(s.tokens)) - len(shared) + origin.shares_tail + self.pool.cached_among(shared)
            if not room.holds(needed) and not self._make_way(room, s, needed, shared):
                return
            self._learn(s, origin)
            if origin.host_pages:
                self._arrive(s, origin)
            else:
                self._drop_kept(s)
                self._start(s, shared, origin.hashes, origin.computed)
                count = min(len(s.tokens) - origin.computed, room.tokens)
                if self._hold_pages(s, origin.computed + count):
                    raise RuntimeError(f"admission counted pages for sequence {s.seq} that the pool does not have")
                self._planned[s] = (origin.computed, count)
                room.tokens -= count
            room.places -= 1
            room.pages -= needed
            room.growing += self._may_grow(s)

    def _learn(self, s: Sequence, origin: Origin) -> None:
        """How much of what `s` dropped when it gave way has to be computed again, or would have to be, had it not been swapped out."""
        if s.lost_tokens:
            found = origin if s.kept is None else origin.on_device(self.pool.page_size)
            self.decisions.came_back(s.lost_tokens, max(s.recompute_until - found.computed, 0))
            s.lost_tokens = 0

    def _make_way(self, room: _Room, s: Sequence, needed: int, shared: list[int]) -> bool:
        """Let lower priorities give way for `s`, the head of those that wait; whether `room`, counted anew, then holds it at once."""
        if room.holds(needed - self.leaving()):
            return False  # in a moment
        stay = [other for other in self.running if other.request_id not in self.emigrants]
        victims = make_way(stay, s, partial(self._enough, replace(room), needed, frozenset(shared)))
        for victim in victims:
            self._give_way(victim, give_way(candidate(self, victim), self.costs(), self.preemption, self.relief))
        fresh = self._room()
        room.places, room.tokens, room.pages, room.growing = fresh.places, fresh.tokens, fresh.pages, fresh.growing
        return bool(victims) and room.holds(needed)

    def _room(self) -> _Room:
        placed = [*self.running, *self.arriving]
        promised = sum(self._missing(s) for s in placed)
        growing = sum(self._may_grow(s) for s in placed)
        return _Room(self.free_places(), self._budget(), self.pool.available - promised, growing)

    def free_places(self) -> int:
        """Sequences that could start now, beside those that run, come back, are frozen, or are awaited from other replicas."""
        frozen = sum(bool(s.pages) for s in self.frozen)
        return self.max_running - len(self.running) - len(self.arriving) - frozen - self.awaited

    def spare_pages(self) -> int:
        """Pages that nobody needs soon: beside those that running sequences are promised, with room for them to grow."""
        room = self._room()
        return room.pages - room.growing // 4

    def _enough(self, room: _Room, needed: int, kept: frozenset[int], victim: Sequence) -> bool:
        """Count `victim` out; whether `room` then holds a newcomer that needs `needed` pages beside those it shares (`kept`)."""
        room.places += 1
        room.tokens += self._planned.get(victim, (0, 0))[1]
        room.pages += self._missing(victim)
        room.growing -= self._may_grow(victim)
        for page in victim.pages:
            left = room.left[page] = room.left.get(page, self.pool.references[page]) - 1
            room.pages += left == 0 and page not in kept
        return room.holds(needed)

    def _may_grow(self, s: Sequence) -> bool:
        return self.pool.pages_for(s.prompt_len + s.max_tokens) > len(s.table)

    def _missing(self, s: Sequence) -> int:
        return max(self.pool.pages_for(len(s.tokens)) - len(s.table), 0)
