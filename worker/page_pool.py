"""The page pool: who holds which page of KV memory. Pure bookkeeping over page ids; it never sees a tensor.

Every page is in exactly one state:

    free      nobody holds it, nothing in it can be found
    active    `references > 0`: that many block tables (or pins) hold it
    cached    nobody holds it, but its content is indexed and can be found until the memory is needed
    reserved  promised to pages in transit (swap in, migration in): not findable, not writable by a step

           allocate                release, not indexed
    free ------------> active -----------------------------> free
      ^                 ^  |    release, indexed
      | evict (LRU)     |  +-------------------------------> cached
      +---------- cached+ retain (prefix hit)
    free --reserve--> reserved --commit--> active;  --cancel--> free

Eviction order: `allocate` and `reserve` take free pages first (last freed first, its cache lines are warm), then cached
pages, least recently released first. A sequence releases its pages from the tail, so of one prefix the head goes last.

The index is keyed by a chained, keyed hash (`page_hash`) that starts from the tenant's salt. A hit is verified by comparing
the tokens themselves and the parent's hash, so a collision can cost a miss, never a wrong answer, and no tenant finds
another tenant's pages.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

from .events import EventLog
from .page_hash import page_hash, root_hash, token_bytes

_HELD = b"a" + b"s" * 254  # of a page map, by how many hold the page, from one on
_FREE, _CACHED, _RESERVED, _MOVING = b"fcrm"


class PoolCorrupt(RuntimeError):
    """The pool's books do not add up: a bug, never a state to go on from."""


class Content(NamedTuple):
    """What a full page holds."""

    hash: bytes
    parent: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """How many pages are in each state; they add up to `total`."""

    total: int
    free: int
    cached: int
    active: int
    reserved: int


class PagePool:
    """`total` pages of `page_size` tokens each, ids 0 to total-1.

    Args:
        total: pages in the pool.
        page_size: tokens in a page.
        key: secret of the hash; replicas that exchange pages share it.
        prefix_cache: False keeps nothing findable.

    `events` hears of every content that becomes findable, or no longer is; what lies in another tier beside this pool is findable too.
    """

    def __init__(self, total: int, page_size: int, key: bytes = b"", prefix_cache: bool = True) -> None:
        if total < 0 or page_size < 1:
            raise ValueError(f"a pool has pages of at least one token, not {total} of {page_size}")
        self.total = total
        self.page_size = page_size
        self.references = [0] * total
        self.events = EventLog()
        self._key = key
        self._prefix_cache = prefix_cache
        self._free = list(range(total - 1, -1, -1))  # a stack: page 0 goes out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first
        self._reserved: set[int] = set()
        self._index: dict[bytes, int] = {}
        self._entries: dict[int, Content] = {}
        self._beside: PagePool | None = None

    def tier(self, total: int) -> PagePool:
        """An empty pool of `total` pages in other memory, for the same contents: what either of the two holds is findable, once."""
        other = PagePool(total, self.page_size, self._key, self._prefix_cache)
        other.events, other._beside, self._beside = self.events, self, other
        return other

    # --- how much there is ---

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> PoolCounts:
        """Pages by state."""
        idle = len(self._free) + len(self._cached) + len(self._reserved)
        return PoolCounts(self.total, len(self._free), len(self._cached), self.total - idle, len(self._reserved))

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    # --- taking and giving back ---

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, all or nothing; None when there are not that many."""
        if count > self.available:
            return None
        pages = [self._take() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each of `pages` (active or cached)."""
        for page in pages:
            if self.references[page] == 0:
                if page not in self._cached:
                    raise PoolCorrupt(f"page {page} is neither active nor cached and cannot be shared")
                del self._cached[page]
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of `pages`, the last page first; what nobody holds becomes cached or free."""
        for page in reversed(pages):
            if self.references[page] < 1:
                raise PoolCorrupt(f"page {page} was released once too often")
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self._entries:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._cached.popitem(last=False)
        self._unindex(page)
        return page

    def oldest_cached(self, count: int) -> list[int]:
        """The cached pages that would be reused first."""
        return list(islice(self._cached, count))

    def drop(self, page: int) -> None:
        """Let nobody find the content of `page` any more; when it is cached, it becomes free."""
        if page in self._entries:
            self._unindex(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def _unindex(self, page: int) -> None:
        digest = self._entries.pop(page).hash
        del self._index[digest]
        if self._beside is None or digest not in self._beside._index:
            self.events.removed(digest)

    # --- pages in transit ---

    def reserve(self, count: int) -> list[int] | None:
        """`count` pages for content that is on its way, all or nothing; None when there are not that many."""
        if count > self.available:
            return None
        pages = [self._take() for _ in range(count)]
        self._reserved.update(pages)
        return pages

    def commit(self, pages: Sequence[int]) -> None:
        """The content of reserved `pages` has arrived: they become active with one reference each."""
        self._leave_transit(pages)
        for page in pages:
            self.references[page] = 1

    def cancel(self, pages: Sequence[int]) -> None:
        """The content of reserved `pages` will not come, or not whole: they become free, and nothing in them findable."""
        self._leave_transit(pages)
        self._free.extend(reversed(pages))

    def _leave_transit(self, pages: Sequence[int]) -> None:
        if not self._reserved.issuperset(pages) or len(set(pages)) != len(pages):
            raise PoolCorrupt(f"pages {list(pages)} are not all reserved, once each")
        self._reserved.difference_update(pages)

    # --- copy on write ---

    def writable(self, page: int) -> bool:
        """Whether its one holder may write into `page`: not shared, not findable."""
        return self.references[page] == 1 and page not in self._entries

    # --- finding pages by what they hold ---

    def root(self, salt: str) -> bytes:
        """Where the hash chain of a tenant starts."""
        return root_hash(self._key, salt)

    def find(self, root: bytes, tokens: Sequence[int], limit: int) -> tuple[list[int], list[bytes]]:
        """The longest indexed prefix of `tokens`, at most `limit` pages: page ids (not yet retained) and their hashes."""
        pages: list[int] = []
        hashes: list[bytes] = []
        parent, size = root, self.page_size
        for start in range(0, limit * size, size):
            content = token_bytes(tokens[start : start + size])
            digest = page_hash(self._key, parent, content)
            page = self.holder(Content(digest, parent, content))
            if page is None:
                break
            pages.append(page)
            hashes.append(digest)
            parent = digest
        return pages, hashes

    def register(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Make the full, computed, active `page` findable; returns its hash. The first page with a content is the one indexed."""
        content = token_bytes(tokens)
        digest = page_hash(self._key, parent, content)
        self.index(page, Content(digest, parent, content))
        return digest

    def index(self, page: int, content: Content) -> None:
        """`register`, where the hash is known."""
        if not self._prefix_cache or content.hash in self._index or page in self._entries:
            return
        if self.references[page] < 1:
            raise PoolCorrupt(f"page {page} is not active and cannot be indexed")
        self._index[content.hash] = page
        self._entries[page] = content
        if self._beside is None or content.hash not in self._beside._index:
            self.events.stored(content.hash)

    def holder(self, content: Content) -> int | None:
        """The page of this pool that is found to hold `content`."""
        page = self._index.get(content.hash)
        return page if page is not None and self._entries[page] == content else None

    def content(self, page: int) -> Content:
        """What a findable page holds."""
        return self._entries[page]

    def findable(self) -> tuple[bytes, ...]:
        """The hash of every content that can be found, here or in the tier beside."""
        return tuple(self._index if self._beside is None else self._index | self._beside._index)

    def cached_among(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached, that is, count as available until they are retained."""
        return sum(self.references[page] == 0 for page in pages)

    # --- the books ---

    def page_map(self, moving: Iterable[int] = ()) -> bytes:
        """One byte for each page: f free, a active, s shared (active, with more than one holder), c cached, r reserved; m for `moving`.

        It is made between two steps, so no page is looked at that need not be: about a millisecond for 100,000.
        """
        try:
            counts = bytes(self.references)
        except ValueError:  # a page with more holders than a byte can count
            counts = bytes(map(min, self.references, repeat(2)))
        few, idle, other = (self._free, _CACHED, _FREE) if len(self._free) < len(self._cached) else (self._cached, _FREE, _CACHED)
        marks = bytearray(counts.translate(bytes([idle]) + _HELD))
        for pages, mark in ((few, other), (self._reserved, _RESERVED), (moving, _MOVING)):
            deque(map(marks.__setitem__, pages, repeat(mark)), maxlen=0)
        return bytes(marks)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Count every page against the block tables (and pins) that exist.

        Raises:
            PoolCorrupt: a page is lost, in two states, or referenced another number of times than tables hold it.
        """
        held = Counter(page for table in tables for page in table)
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise PoolCorrupt("a page stands twice in the free list")
        for page, count in enumerate(self.references):
            if held[page] != count:
                raise PoolCorrupt(f"page {page} has {count} references but stands in {held[page]} tables")
            states = (count > 0) + (page in free) + (page in cached) + (page in self._reserved)
            if states != 1:
                raise PoolCorrupt(f"page {page} is in {states} states")
        if not cached <= self._entries.keys():
            raise PoolCorrupt("a cached page is not indexed")
        if {entry.hash: page for page, entry in self._entries.items()} != self._index:
            raise PoolCorrupt("the index and the pages' entries disagree")
        if (free | self._reserved) & self._entries.keys():
            raise PoolCorrupt("a free or reserved page is findable")
