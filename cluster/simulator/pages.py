"""The page pool of a simulated replica: counts, and the prefixes that can be found. Pages have no ids here.

It follows `worker.page_pool`: a page that nobody holds is cached as long as its content is known by a hash, and cached pages are taken,
least recently released first, when no page is free. Of two sequences that compute the same page, the first one's is found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ...worker.events import EventLog


class Pages:
    """`total` pages. `log` hears of every hash that becomes findable, or no longer is."""

    def __init__(self, total: int, log: EventLog) -> None:
        self.total = total
        self.unshared = 0  # held by one sequence, or reserved for one on its way, and not findable
        self._log = log
        self._held: dict[bytes, int] = {}  # hash -> sequences that hold the page
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # oldest release first

    @property
    def active(self) -> int:
        """Pages that somebody holds."""
        return self.unshared + len(self._held)

    @property
    def available(self) -> int:
        """Pages that could be taken now."""
        return self.total - self.unshared - len(self._held)

    @property
    def cached(self) -> int:
        """Pages that nobody holds, and that can be found."""
        return len(self._cached)

    def take(self, count: int) -> None:
        """So many pages for one sequence; the caller has looked whether they are available."""
        self.unshared += count
        while len(self._cached) > self.available:
            digest, _ = self._cached.popitem(last=False)
            self._log.removed(digest)

    def give_back(self, count: int) -> None:
        """The inverse of `take`."""
        self.unshared -= count

    def find(self, hashes: Sequence[bytes], limit: int) -> int:
        """How many of the first `limit` hashes can be found, without a gap."""
        for i, digest in enumerate(hashes[:limit]):
            if digest not in self._held and digest not in self._cached:
                return i
        return min(len(hashes), limit)

    def cached_among(self, hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, which can be found, count as available until they are held."""
        return sum(digest in self._cached for digest in hashes)

    def hold(self, hashes: Sequence[bytes]) -> None:
        """One more holder for each page; all can be found."""
        for digest in hashes:
            self._cached.pop(digest, None)
            self._held[digest] = self._held.get(digest, 0) + 1

    def register(self, digest: bytes) -> bool:
        """An unshared page has been computed, and this is its hash. False when another page with it is found instead."""
        if digest in self._held or digest in self._cached:
            return False
        self.unshared -= 1
        self._held[digest] = 1
        self._log.stored(digest)
        return True

    def release(self, hashes: Sequence[bytes]) -> None:
        """One holder fewer for each page, the last page first; what nobody holds is cached."""
        for digest in reversed(hashes):
            holders = self._held[digest] - 1
            if holders:
                self._held[digest] = holders
            else:
                del self._held[digest]
                self._cached[digest] = None

    def findable(self) -> tuple[bytes, ...]:
        """The hash of every page that can be found."""
        return (*self._held, *self._cached)
