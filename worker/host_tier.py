"""The books of the host pool: which host page holds what, for whom, and what is on its way there and back. Pure.

Two kinds of pages lie in it, and one index finds both:

    kept      pages of sequences that were swapped out, until they are back or end
    cached    prefix pages that nobody holds: evicted from the device, or left by a sequence that came back; least recently used first

A host page that an OUT writes, or an IN reads, is held by that move until its end. What is being written can be shared already (two
sequences of one prompt that leave together), but it is found, and comes back, only when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from .page_moves import PageMoves
from .page_pool import Content, PagePool
from .plan import Moved, MoveKind


class HostTier:
    """Host memory beside the device pool `pool`.

    Args:
        total: pages; 0 keeps nothing.
        pool: of the device.
        moves: carries pages out and in.
    """

    def __init__(self, total: int, pool: PagePool, moves: PageMoves) -> None:
        self.pages = pool.tier(total)
        self._pool = pool
        self._moves = moves
        self._held: dict[int, tuple[int, ...]] = {}  # move -> the host pages that it holds
        self._writing: set[int] = set()  # host pages whose content is on its way
        self._coming: dict[Content, int] = {}  # of those, by content
        self._lost: set[int] = set()  # held pages whose content did not come
        self._evicting: set[int] = set()  # pages of the device

    # --- sequences that leave, and come back ---

    def lacks(self, contents: Iterable[Content | None]) -> int | None:
        """How many pages with such contents (None: nobody else's) would have to be copied to be kept; None when there is no room."""
        found = [self._find(content) for content in contents]
        lacking = found.count(None)
        claimed = self.pages.cached_among(page for page in found if page is not None)
        return lacking if lacking + claimed <= self.pages.available else None

    def keep(self, pages: Sequence[int], contents: Sequence[Content | None], done: Callable[[Moved], None]) -> list[int]:
        """Copy device `pages` out, as far as their contents are not here; the host pages, in order, each held for the caller.

        `done` hears of the end of that copy, if there is one.

        Raises:
            RuntimeError: there is no room (`lacks` says so).
        """
        table = [self._find(content) for content in contents]
        found = [page for page in table if page is not None]
        self.pages.retain(found)  # before room is made for the others
        fresh = self.pages.allocate(len(table) - len(found))
        if fresh is None:
            raise RuntimeError(f"the host pool has no room for {len(table) - len(found)} pages")
        at = [i for i, page in enumerate(table) if page is None]
        if at:
            self.pages.retain(fresh)
            self._copy_out([pages[i] for i in at], fresh, [contents[i] for i in at], done)
        new = iter(fresh)
        return [next(new) if page is None else page for page in table]

    def ready(self, pages: Iterable[int]) -> bool:
        """Whether the content of all of these host pages has come, or will not come any more."""
        return self._writing.isdisjoint(pages)

    def intact(self, pages: Sequence[int]) -> int:
        """How many of `pages`, from the first on, have got their content."""
        return next((i for i, page in enumerate(pages) if page in self._lost), len(pages))

    def bring(self, host_pages: Sequence[int], pages: Sequence[int], done: Callable[[Moved], None]) -> None:
        """Copy host pages into reserved device `pages`. What could not be copied is found no more."""
        self.pages.retain(host_pages)
        move = self._moves.start(MoveKind.IN, pages, partial(self._brought, host_pages, done), host_pages)
        self._held[move] = tuple(host_pages)

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each of these host pages."""
        self.pages.release(pages)
        self._lost.difference_update([page for page in pages if self.pages.references[page] == 0])

    # --- eviction ---

    def evict_ahead(self, wanted: int, most: int) -> None:
        """Copy out the oldest of the device's cached pages before they are reused, until `wanted` pages are free, at most `most` now.

        What is here already becomes free at once, the rest when its copy has ended, unless somebody has found it meanwhile.
        """
        if not self.pages.total:
            return
        missing = min(wanted - self._pool.counts().free - len(self._evicting), most)
        leaving: list[int] = []
        for page in self._pool.oldest_cached(max(missing, 0)):
            host_page = self._find(self._pool.content(page))
            if host_page is None:
                leaving.append(page)
            elif host_page not in self._writing:
                self.pages.retain([host_page])  # used just now
                self.pages.release([host_page])
                self._pool.drop(page)
        fresh = self.pages.allocate(min(len(leaving), self.pages.available))
        if fresh:
            del leaving[len(fresh) :]
            self._evicting.update(leaving)
            self._copy_out(leaving, fresh, [self._pool.content(page) for page in leaving], lambda moved: None)

    # --- moves ---

    def _find(self, content: Content | None) -> int | None:
        if content is None:
            return None
        coming = self._coming.get(content)
        return self.pages.holder(content) if coming is None else coming

    def _copy_out(
        self, pages: Sequence[int], host_pages: Sequence[int], contents: Sequence[Content | None], done: Callable[[Moved], None]
    ) -> None:
        self._writing.update(host_pages)
        self._coming.update((content, page) for page, content in zip(host_pages, contents, strict=True) if content is not None)
        copies = list(zip(pages, host_pages, contents, strict=True))
        move = self._moves.start(MoveKind.OUT, pages, partial(self._copied_out, copies, done), host_pages)
        self._held[move] = tuple(host_pages)

    def _copied_out(self, copies: list[tuple[int, int, Content | None]], done: Callable[[Moved], None], moved: Moved) -> None:
        host_pages = self._held.pop(moved.move)
        self._writing.difference_update(host_pages)
        for page, host_page, content in copies:
            if content is not None:
                del self._coming[content]
                if moved.error is None:
                    self.pages.index(host_page, content)
            if page in self._evicting:
                self._evicting.remove(page)
                if moved.error is None and self._pool.references[page] == 1:  # the move's own
                    self._pool.drop(page)
        if moved.error is not None:
            self._lost.update(host_pages)
        done(moved)
        self.release(host_pages)

    def _brought(self, host_pages: Sequence[int], done: Callable[[Moved], None], moved: Moved) -> None:
        del self._held[moved.move]
        if moved.error is not None:
            for page in host_pages:
                self.pages.drop(page)
        done(moved)
        self.release(host_pages)

    def page_map(self) -> bytes:
        """`PagePool.page_map` of the host pages: a and s are kept for sequences that are out, m is what a move writes or reads."""
        return self.pages.page_map(page for pages in self.held() for page in pages)

    def held(self) -> list[tuple[int, ...]]:
        """The host pages that moves hold, as tables for `PagePool.check`."""
        return list(self._held.values())
