"""Sequences between the device, host memory and disk: how one leaves, what one that starts can start from, and how it comes back. Pure.

running -> (OUT) waiting, with what it keeps in host memory -> (IN) arriving -> running
running -> (SAVE) waiting, with what it keeps in a file -> (LOAD) arriving -> running

Who arrives holds its place and its pages but is not planned. It comes in its turn, counted like everybody who is admitted, and the copy
ends by itself, so nobody who stands before it can wait for it in vain.
"""

from __future__ import annotations

from bisect import insort
from functools import partial
from itertools import takewhile
from operator import attrgetter
from typing import NamedTuple

from .decisions import Record
from .events import Speeds
from .page_hash import token_bytes
from .page_moves import DECAY
from .page_pool import Content, PagePool
from .plan import Moved, MoveKind
from .pressure import Costs, Relief, worth_bringing
from .roster import Roster
from .sequence import Arrival, Kept, Sequence, State
from .snapshot import SequenceSnapshot

_ORDER = attrgetter("order")


class Origin(NamedTuple):
    """What a sequence can start from: a block table with gaps, which host pages, or pages of a file, fill in order."""

    pages: list[int | None]
    host_pages: list[int]  # or ordinals in the file
    hashes: list[bytes]  # of the full pages
    computed: int  # tokens in them
    shares_tail: bool = False  # the last page is partly filled, and others hold it
    file: str = ""

    def shared(self) -> list[int]:
        """Pages of the device that are there."""
        return [page for page in self.pages if page is not None]

    def on_device(self, page_size: int) -> Origin:
        """What of it needs nothing from host memory."""
        pages = list(takewhile(lambda page: page is not None, self.pages))
        if len(pages) == len(self.pages):
            return self
        return Origin(pages, [], self.hashes[: len(pages)], len(pages) * page_size)


NOTHING = Origin([], [], [], 0)


class Swapping(Roster):
    """The roster, and the ways to host memory and back.

    Args:
        pool: the pages that sequences hold.
        host_pages: pages of host memory beside it.
        disk_pages: that may lie in files.
    """

    def __init__(self, pool: PagePool, host_pages: int, disk_pages: int) -> None:
        super().__init__(pool, host_pages, disk_pages)
        self.speeds = Speeds()
        self.relief: Relief | None = None  # set by whoever knows the other replicas
        self._emigrants: list[str] = []  # those that nobody has been told of
        self._handshake_s = 0.0

    def costs(self) -> Costs:
        """How fast things are here, as measured."""
        moves, speeds = self.moves, self.speeds
        return Costs(
            speeds.prefill_tokens_per_s,
            speeds.decode_step_s,
            moves.pages_per_s(MoveKind.OUT),
            moves.pages_per_s(MoveKind.IN),
            moves.queued(MoveKind.OUT),
            moves.queued(MoveKind.IN),
            moves.pages_per_s(MoveKind.SEND),
            self._handshake_s,
            moves.pages_per_s(MoveKind.SAVE),
            moves.pages_per_s(MoveKind.LOAD),
            moves.queued(MoveKind.SAVE),
            moves.queued(MoveKind.LOAD),
            self.decisions.again,
        )

    # --- leaving ---

    def leaving(self) -> int:
        """Pages that will be free when what leaves has left."""
        emigrants = (s for s in (*self.running, *self.frozen) if s.request_id in self.emigrants)
        return self.moves.leaving() + sum(self.pool.references[page] == 1 for s in emigrants for page in s.pages)

    def take_emigrants(self) -> list[str]:
        """The requests that are to migrate to `relief`, told once. Whoever takes them ends each as MOVED, or says that it `stays`."""
        taken, self._emigrants = [name for name in self._emigrants if name in self.emigrants], []
        return taken

    def stays(self, request_id: str) -> None:
        """A request that was to migrate does not. There is no relief until somebody says so anew."""
        self.emigrants.pop(request_id, None)
        self.relief = None

    def migrated(self, pages: int, seconds: float) -> None:
        """A migration of so many pages, which has gone well, took so long in all."""
        speed = self.moves.pages_per_s(MoveKind.SEND)
        handshake_s = max(seconds - (pages / speed if speed else 0.0), 0.0)
        self._handshake_s = DECAY * self._handshake_s + (1 - DECAY) * handshake_s if self._handshake_s else handshake_s

    def _emigrate(self, s: Sequence, record: Record) -> None:
        self.emigrants[s.request_id] = record
        self._emigrants.append(s.request_id)
        if self.relief is not None:  # the next victim finds less room there
            self.relief = self.relief._replace(pages=self.relief.pages - len(s.pages))

    def contents(self, s: Sequence) -> list[Content | None]:
        """What the pages of `s` hold that something has been computed into."""
        size, found = self.pool.page_size, list[Content | None]()
        parent = s.root
        for i, digest in enumerate(s.hashes):
            found.append(Content(digest, parent, token_bytes(s.tokens[i * size : (i + 1) * size])))
            parent = digest
        return found + [None] * (self.pool.pages_for(s.num_computed) - len(found))

    def _swap_out(self, s: Sequence) -> None:
        contents = self.contents(s)
        copy = self._copies.get(s)
        pages = self.host.keep(s.pages[: len(contents)], contents, partial(self._charge, s))
        kept = Kept(pages, contents, s.num_computed)
        self._preempt(s)
        s.kept = kept
        if copy is not None:  # it is carried out before its pages leave
            self._copies[s] = copy

    def _suspend(self, s: Sequence) -> None:
        contents, computed = self.contents(s), s.num_computed
        pages = s.pages[: len(contents)]
        copy = self._copies.get(s)
        name = self.disk.suspend(SequenceSnapshot.of(s, 0, computed).to_bytes(), pages, partial(self._suspended, s))
        self._preempt(s)
        s.kept = Kept([], contents, computed, name)
        if copy is not None:
            self._copies[s] = copy

    def _suspended(self, s: Sequence, moved: Moved) -> None:
        self._charge(s, moved)
        if moved.error is not None:  # it is lost, and starts from what is found
            self._drop_kept(s)

    def _charge(self, s: Sequence, moved: Moved) -> None:
        if s.decision is not None:
            self.decisions.charge(s.decision, moved.seconds)

    # --- what to start from ---

    def _origin(self, s: Sequence) -> Origin:
        """What `s` can start from, if it keeps nothing in host memory."""
        leader, size = s.leader, self.pool.page_size
        if leader is not None and leader.state is State.RUNNING and not s.num_output and leader.num_computed >= s.prompt_len:
            # One token is left to compute, for the logits that the first output token is drawn from.
            computed = s.prompt_len - 1
            pages = leader.pages[: self.pool.pages_for(computed)]
            return Origin(list(pages), [], leader.hashes[: computed // size], computed, computed % size != 0)
        if s.params.prompt_logprobs is not None and not s.num_output:
            return NOTHING
        return self._origin_found(s)

    def _origin_kept(self, kept: Kept) -> Origin | None:
        """What it left; pages that are found on the device as well need not be brought. None: it is still leaving."""
        if kept.file:
            return self._origin_in_file(kept) if self.disk.ready(kept.file) else None
        if not self.host.ready(kept.pages):
            return None
        intact = self.host.intact(kept.pages)
        contents = kept.contents[:intact]
        pages = [None if content is None else self.pool.holder(content) for content in contents]
        host_pages = [host for host, page in zip(kept.pages, pages, strict=False) if page is None]
        hashes = [content.hash for content in contents if content is not None]
        return Origin(pages, host_pages, hashes, min(kept.computed, intact * self.pool.page_size))

    def _origin_in_file(self, kept: Kept) -> Origin:
        pages = [None if content is None else self.pool.holder(content) for content in kept.contents]
        ordinals = [i for i, page in enumerate(pages) if page is None]
        hashes = [content.hash for content in kept.contents if content is not None]
        return Origin(pages, ordinals, hashes, kept.computed, file=kept.file)

    def _origin_found(self, s: Sequence) -> Origin:
        """The longest prefix that is found, on the device and in host memory by turns, as far as bringing it is worth while."""
        size = self.pool.page_size
        limit = (len(s.tokens) - 1) // size
        pages: list[int | None] = []
        found, hashes = self.pool.find(s.root, s.tokens, limit)
        pages += found
        host_pages: list[int] = []
        while self.host.pages.total and len(hashes) < limit:
            more, digests = self.host.pages.find(hashes[-1] if hashes else s.root, s.tokens[len(hashes) * size :], limit - len(hashes))
            if not more or not worth_bringing(len(more), len(more) * size, self.costs()):
                break
            host_pages += more
            pages += [None] * len(more)
            hashes += digests
            found, digests = self.pool.find(hashes[-1], s.tokens[len(hashes) * size :], limit - len(hashes))
            pages += found
            hashes += digests
        return Origin(pages, host_pages, hashes, len(pages) * size)

    # --- coming ---

    def _arrive(self, s: Sequence, origin: Origin) -> None:
        """`s` takes its place, and the pages that it lacks are brought."""
        self.pool.retain(origin.shared())
        coming = self.pool.reserve(len(origin.host_pages))
        if coming is None:
            raise RuntimeError(f"admission counted pages for sequence {s.seq} that the pool does not have")
        new = iter(coming)
        arrival = Arrival([next(new) if page is None else page for page in origin.pages], coming, origin.hashes, origin.computed)
        self._take_place(s, State.ARRIVING, self.arriving)
        s.arrival = arrival
        arrived = partial(self._arrived, s, arrival)
        if origin.file:
            self.disk.bring(origin.file, origin.host_pages, coming, arrived)
        else:
            self.host.bring(origin.host_pages, coming, arrived)

    def _arrived(self, s: Sequence, arrival: Arrival, moved: Moved) -> None:
        here = s.arrival is arrival  # it has not ended meanwhile
        if not here or moved.error is not None:
            self.pool.cancel(arrival.coming)
        if not here:
            return
        self.arriving.remove(s)
        s.arrival = None
        self._charge(s, moved)
        if moved.error is not None:  # it starts from what is found then
            self.pool.release(arrival.shared())
            s.state = State.WAITING
            insort(self.waiting, s, key=_ORDER)
        else:
            self.pool.commit(arrival.coming)
            s.state = State.RUNNING
            insort(self.running, s, key=_ORDER)
            if s.cached_tokens is None:
                self.counters.host_hit_tokens += len(arrival.coming) * self.pool.page_size
            self._go_on(s, arrival.pages, arrival.hashes, arrival.computed)
            for page, content in zip(s.pages, self.contents(s), strict=True):
                if content is not None:
                    self.pool.index(page, content)
            if s.kept is not None:
                s.safe_until = len(s.tokens) + self.pool.page_size
        self._drop_kept(s)
