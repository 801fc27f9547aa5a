"""Which replica holds which page: what routing knows of the prefix caches. Pure.

One map for all replicas, page hash -> the set of replicas that hold the page, as the bits of an int:

    hash a  0b0101      longest_prefix((a, b, c)) walks the chain once: 0b0101 & 0b0111 & 0b0100
    hash b  0b0111      so the replica of bit 0 holds the first two pages, that of bit 2 all three
    hash c  0b0100

A page that sits on every replica costs no more memory than one that sits on one, and a million entries are one map of bytes and
small ints, which the garbage collector does not walk. To forget a replica is to retire its bit; retired bits are swept out of
the map all at once, when there are as many as live ones.

Bounded by `max_pages`: a page that would be one too many is not indexed. It is the newcomers that are left out because the oldest
pages are the heads of the chains, without which nothing behind them would be found. What is in the index is always true.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

MAX_PAGES = 4_000_000  # about 420 MB
_MIN_RETIRED = 8  # bits that may lie idle before a sweep, however few replicas live


class PageIndex:
    """Page hashes of all replicas.

    Args:
        max_pages: distinct pages that are indexed at most.
    """

    def __init__(self, max_pages: int = MAX_PAGES) -> None:
        self._max_pages = max_pages
        self._holders: dict[bytes, int] = {}  # page hash -> bits of the replicas that hold it, retired ones among them
        self._bits: dict[str, int] = {}  # replica -> its bit; the same int object stands in every page that it alone holds
        self._names: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._live = 0  # all live bits
        self._next_bit = 1
        self._retired = 0

    def __len__(self) -> int:
        """Distinct pages in memory; those of forgotten replicas count until they are swept out."""
        return len(self._holders)

    def count(self, replica_id: str) -> int:
        """Pages known of one replica."""
        return self._counts.get(replica_id, 0)

    def update(self, replica_id: str, stored: Sequence[bytes], removed: Iterable[bytes]) -> None:
        """`replica_id` now holds the pages `stored`, and no longer those `removed`. Naming a page again changes nothing."""
        if replica_id not in self._bits:
            self._add(replica_id)
        self._remove(replica_id, removed)
        room = self._max_pages - len(self._holders)
        if len(stored) > room and self._retired:
            self._sweep()
            room = self._max_pages - len(self._holders)
        if len(stored) > room:  # the pages that others hold already take no room, and then the first of the rest
            unknown = (page for page in stored if page not in self._holders)
            stored = [*(page for page in stored if page in self._holders), *islice(unknown, max(room, 0))]
        self._store(replica_id, stored)

    def _remove(self, replica_id: str, removed: Iterable[bytes]) -> None:
        bit, holders, count = self._bits[replica_id], self._holders, 0
        for page in removed:
            known = holders.pop(page, 0)  # a million entries do not fit in the processor's cache: one look at each has to do
            if known & bit:
                count += 1
                if known != bit:
                    holders[page] = known ^ bit
            elif known:
                holders[page] = known
        self._counts[replica_id] -= count

    def _store(self, replica_id: str, stored: Sequence[bytes]) -> None:
        bit, holders, count = self._bits[replica_id], self._holders, -len(self._holders)
        for page in stored:
            known = holders.setdefault(page, bit)
            if not known & bit:
                holders[page] = known | bit
                count += 1
        self._counts[replica_id] += count + len(holders)

    def forget(self, replica_id: str) -> None:
        """`replica_id` holds nothing that is known of."""
        bit = self._bits.pop(replica_id, 0)
        if not bit:
            return
        del self._names[bit], self._counts[replica_id]
        self._live ^= bit
        self._retired += 1
        if self._retired >= max(_MIN_RETIRED, len(self._bits)):
            self._sweep()

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many pages from the head of the chain `hashes` each replica holds, without a gap; replicas with none are left out."""
        found: dict[str, int] = {}
        alive, get = self._live, self._holders.get
        for length, page in enumerate(hashes):
            still = get(page, 0) & alive
            if still != alive:
                if length:
                    self._note(found, alive ^ still, length)
                alive = still
                if not alive:
                    return found
        self._note(found, alive, len(hashes))
        return found

    def _note(self, found: dict[str, int], bits: int, length: int) -> None:
        while bits and length:
            bit = bits & -bits
            found[self._names[bit]] = length
            bits ^= bit

    def _add(self, replica_id: str) -> None:
        bit = self._next_bit
        self._next_bit <<= 1
        self._bits[replica_id], self._names[bit], self._counts[replica_id] = bit, replica_id, 0
        self._live |= bit

    def _sweep(self) -> None:
        """Take retired bits out of the map, and number the live ones anew."""
        moves = {bit: 1 << place for place, bit in enumerate(self._names)}
        renumbered: dict[int, int] = {}  # bits -> bits: few distinct ones, and equal ones share one object
        holders: dict[bytes, int] = {}
        for page, known in self._holders.items():
            bits = known & self._live
            if bits:
                if bits not in renumbered:
                    renumbered[bits] = sum(new for old, new in moves.items() if bits & old)
                holders[page] = renumbered[bits]
        self._holders = holders
        self._names = {moves[bit]: name for bit, name in self._names.items()}
        self._bits = {name: bit for bit, name in self._names.items()}
        self._next_bit = 1 << len(self._names)
        self._live = self._next_bit - 1
        self._retired = 0
