"""Sequences that decode together, step by step, at no cost for each: what a sequence has is what it joined with, and the steps since."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import TypeVar

from .sequence import Sequence

_Key = TypeVar("_Key")


class DecodeBatch:
    """The sequences, and the step at which each ends. All have one token to go.

    Args:
        page_size: tokens in a page.
    """

    def __init__(self, page_size: int) -> None:
        self.steps = 0
        self.context = 0  # tokens that all of them have computed
        self.tenants: Counter[str] = Counter()  # how many of each
        self.priorities: Counter[int] = Counter()
        self._size = page_size
        self._members: dict[Sequence, None] = {}
        self._growing = [0] * page_size  # members that need a page at a step, by the step modulo the page size
        self._ends: list[tuple[int, int, Sequence]] = []  # may name some that have left
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, s: Sequence) -> bool:
        return s in self._members

    def members(self) -> list[Sequence]:
        """Those that decode, in the order of joining."""
        return list(self._members)

    def add(self, s: Sequence) -> None:
        """`s` takes part from the next step on."""
        s.joined = self.steps
        self._members[s] = None
        self._growing[(self.steps - s.computed) % self._size] += 1
        self.context += s.computed
        self.tenants[s.tenant] += 1
        self.priorities[s.priority] += 1
        heapq.heappush(self._ends, (self.steps + s.output_tokens - s.generated, next(self._order), s))

    def remove(self, s: Sequence) -> None:
        """`s` leaves, with what it has got and its pages."""
        del self._members[s]
        self._growing[(s.joined - s.computed) % self._size] -= 1
        self.sync(s)
        self.context -= s.computed
        _uncount(self.tenants, s.tenant)
        _uncount(self.priorities, s.priority)

    def sync(self, s: Sequence) -> None:
        """Writes into `s` what it has by now."""
        s.known += self.steps - s.joined
        s.computed += self.steps - s.joined
        s.joined = self.steps
        s.pages = -(-s.computed // self._size)

    def steps_left(self) -> int:
        """Until the first of them ends; there must be one."""
        while True:
            end, _, s = self._ends[0]
            if s in self._members and end == self._end(s):
                return end - self.steps
            heapq.heappop(self._ends)

    def ended(self) -> list[Sequence]:
        """Those that have their last token, taken out."""
        found = []
        while self._members and self.steps_left() <= 0:
            s = self._ends[0][2]
            self.remove(s)
            found.append(s)
        return found

    def _end(self, s: Sequence) -> int:
        return s.joined + s.output_tokens - s.generated

    def pages_needed(self, steps: int, skip: int = 0) -> int:
        """Pages that all of them need for so many steps, after the first `skip` ones."""
        whole, rest = divmod(steps, self._size)
        at = self.steps + skip
        return whole * len(self._members) + sum(self._growing[(at + k) % self._size] for k in range(rest))

    def steps_with(self, pages: int, most: int) -> int:
        """How many steps, at most `most`, so many pages last."""
        if self.pages_needed(most) <= pages:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.pages_needed(middle) <= pages else (low, middle)
        return low

    def advance(self, steps: int) -> None:
        """All of them have got so many tokens."""
        self.steps += steps
        self.context += steps * len(self._members)


def _uncount(counts: Counter[_Key], key: _Key) -> None:
    """One fewer; what there is none of is not in it."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
