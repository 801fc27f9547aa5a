"""The page moves of one rank, carried out beside its steps: local copies on one lane, each link on a lane of its own.

A lane is a thread with a queue: its moves are carried out one after the other. What a plan starts may read what all earlier steps have
written: on a CPU these are over, on a GPU the lane's stream waits for them. A move counts as ended when its bytes are there, so whoever
hears of the end may use them without further ado. Of several ranks, the leader's mover tells the ends of all: each other rank writes
its own into the store that the ranks share.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kv_store import KVStore
from .page_link import Channel, Hello, LinkBroken, Listener, dial, kind_of
from .plan import LinkEnd, Move, Moved, MoveKind, StepPlan
from .reslice import Share, shares
from .strict_wire import pack, unpack

log = logging.getLogger(__name__)

Ready = Callable[[], AbstractContextManager[None]]  # `KVStore.after`

RANKS_TIMEOUT_S = 60.0  # until every rank has carried out a move that this one has
RANKS_POLL_S = 0.001
DIGEST_BYTES = 16


class Reports(Protocol):
    """Where the ranks of a replica tell their leader what has ended (`RankGroup.reports`)."""

    def set(self, key: str, value: bytes) -> None: ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been set. Does not wait."""
        ...

    def get(self, key: str) -> bytes: ...

    def delete_key(self, key: str) -> bool: ...


class Place(NamedTuple):
    """Where this mover stands.

    Attributes:
        rank, tp: of its replica.
        kv_heads: of the model, over all ranks.
        reports: the store of the ranks; None for tp=1.
        link_kind: `--page-link`.
        verify: compare a digest of each page where it leaves and where it arrives.
    """

    rank: int = 0
    tp: int = 1
    kv_heads: int = 1
    reports: Reports | None = None
    link_kind: str = "auto"
    verify: bool = False


class PageMover:
    """Moves between `kv`, its host pool, and the ranks of other replicas.

    Args:
        kv: the pools of this rank.
        place: where this rank stands.
        listener: where other replicas reach it; None: they do not.
    """

    def __init__(self, kv: KVStore, place: Place, listener: Listener | None = None) -> None:
        self._kv = kv
        self._place = place
        self._listener = listener
        self._ended: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self._links: dict[str, _Lane] = {}
        self._copies: _Lane | None = None
        self._digests: dict[int, bytes] = {}  # host page -> of what was written there; only when moves are verified

    def watch(self, wake: Callable[[], None]) -> None:
        """As `engine.Runner.watch`."""
        self._wake = wake

    def poll(self) -> tuple[Moved, ...]:
        """The moves that have ended since it was asked last; at the leader, on every rank."""
        found = []
        while not self._ended.empty():
            found.append(self._ended.get())
        return tuple(found)

    def start(self, plan: StepPlan) -> None:
        """Open links, start moves and close links as `plan` says, after everything that earlier steps write."""
        for end in plan.links:
            self._links[end.link] = _Lane(f"link-{end.link}", self._end, self._channels(end))
        if plan.moves:
            ready = self._kv.after()
            for move in plan.moves:
                self._lane(move).put(move, ready)
        for link in plan.closed:
            lane = self._links.pop(link, None)
            if lane is not None:
                lane.close()

    def close(self) -> None:
        """End every lane; what is under way on links ends with an error."""
        for lane in [*self._links.values(), *([self._copies] if self._copies else [])]:
            lane.close()
        if self._listener is not None:
            self._listener.close()

    def _lane(self, move: Move) -> _Lane:
        if move.link:
            return self._links.get(move.link) or _Lane.broken(self._end, f"there is no link {move.link!r}")
        if self._copies is None:
            self._copies = _Lane("page-copies", self._end, _LocalCopies(self._kv, self._digests if self._place.verify else None))
        return self._copies

    def _channels(self, end: LinkEnd) -> _Link:
        place = self._place
        if end.addresses:
            mine = [share for share in shares(place.kv_heads, place.tp, end.peer_tp) if share.source == place.rank]
        else:
            mine = [share for share in shares(place.kv_heads, end.peer_tp, place.tp) if share.target == place.rank]
        return _Link(self._kv, place, end, mine, self._listener)

    def _end(self, moved: Moved) -> None:
        """A move has ended on this rank; called on its lane."""
        place = self._place
        if place.reports is not None:
            try:
                if place.rank:
                    place.reports.set(f"moved/{moved.move}/{place.rank}", pack(moved))
                    return
                moved = self._of_all(moved, place.reports)
            except RuntimeError as error:  # the store is gone: so is the replica
                moved = moved._replace(error=moved.error or f"the ranks cannot be asked: {error}")
        self._ended.put(moved)
        self._wake()

    def _of_all(self, mine: Moved, reports: Reports) -> Moved:
        keys = [f"moved/{mine.move}/{rank}" for rank in range(1, self._place.tp)]
        until_s = time.monotonic() + RANKS_TIMEOUT_S
        while not reports.check(keys):
            if time.monotonic() > until_s:
                return mine._replace(error=f"a rank has not moved its pages within {RANKS_TIMEOUT_S:g} s")
            time.sleep(RANKS_POLL_S)
        found = [mine, *(unpack(Moved, reports.get(key)) for key in keys)]
        for key in keys:
            reports.delete_key(key)
        error = next((moved.error for moved in found if moved.error is not None), None)
        if error is None and len({moved.pages for moved in found}) > 1:
            error = f"the ranks have moved different numbers of pages: {[moved.pages for moved in found]}"
        return Moved(mine.move, mine.pages, max(moved.seconds for moved in found), error)


class _Work(Protocol):
    """What a lane does."""

    def open(self) -> None: ...

    def carry(self, move: Move) -> int:
        """Carry out a move; how many pages have travelled. Raises LinkBroken or RuntimeError."""
        ...

    def close(self) -> None:
        """From any thread: whatever waits ends."""
        ...


class _Lane:
    """A thread that carries out moves in order. After a failure on a link every later move on it fails, too."""

    def __init__(self, name: str, ended: Callable[[Moved], None], work: _Work) -> None:
        self._ended = ended
        self._work = work
        self._failure: str | None = None
        self._queue: queue.SimpleQueue[tuple[Move, Ready] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @classmethod
    def broken(cls, ended: Callable[[Moved], None], why: str) -> _Lane:
        """A lane on which everything fails."""
        return cls("page-moves-nowhere", ended, _Nowhere(why))

    def put(self, move: Move, ready: Ready) -> None:
        """Carry out `move` inside `ready`, when what stands before it is done."""
        self._queue.put((move, ready))

    def close(self) -> None:
        """Nothing is begun any more; what is under way on a link ends with an error."""
        self._failure = self._failure or "the link was closed"
        self._work.close()
        self._queue.put(None)

    def _run(self) -> None:
        try:
            self._work.open()
        except (LinkBroken, OSError, RuntimeError) as error:
            self._failure = self._failure or str(error)
        while (job := self._queue.get()) is not None:
            self._carry(*job)

    def _carry(self, move: Move, ready: Ready) -> None:
        started_s = time.monotonic()
        pages = 0
        error = self._failure
        if error is None:
            try:
                with ready():
                    pages = self._work.carry(move)
            except (LinkBroken, OSError, RuntimeError) as failure:
                log.info("move %d (%s) failed: %s", move.move, move.kind, failure)
                error = str(failure) or repr(failure)
                if move.link:
                    self._failure = self._failure or error
        self._ended(Moved(move.move, pages, time.monotonic() - started_s, error))


class _Nowhere:
    def __init__(self, why: str) -> None:
        self._why = why

    def open(self) -> None:
        raise LinkBroken(self._why)

    def carry(self, move: Move) -> int:
        raise LinkBroken(self._why)

    def close(self) -> None:
        return


class _LocalCopies:
    """Between device pool and host pool. With `digests`, every page is compared on its way."""

    def __init__(self, kv: KVStore, digests: dict[int, bytes] | None) -> None:
        self._kv = kv
        self._digests = digests

    def open(self) -> None:
        return

    def carry(self, move: Move) -> int:
        if move.kind is MoveKind.OUT:
            self._kv.copy_out(move.pages, move.host_pages)
        else:
            self._kv.copy_in(move.host_pages, move.pages)
        if self._digests is not None:
            self._verify(move, self._digests)
        return len(move.pages)

    def _verify(self, move: Move, digests: dict[int, bytes]) -> None:
        for page, host_page in zip(move.pages, move.host_pages, strict=True):
            if move.kind is MoveKind.OUT:
                digests[host_page] = digest(self._kv.pool[page])
            arrived = self._kv.host[host_page] if move.kind is MoveKind.OUT else self._kv.pool[page]
            if digest(arrived) != digests[host_page]:
                raise RuntimeError(f"page {page} and host page {host_page} differ after a move {move.kind}")

    def close(self) -> None:
        return


class _Link:
    """This rank's pairs of one link: a channel for each rank at the other end that it shares heads with."""

    def __init__(self, kv: KVStore, place: Place, end: LinkEnd, mine: list[Share], listener: Listener | None) -> None:
        self._kv = kv
        self._place = place
        self._end = end
        self._mine = mine
        self._listener = listener
        self._channels: list[Channel] = []
        self._closed = False

    def open(self) -> None:
        device = self._kv.pool.device
        for share in self._mine:
            if self._end.addresses:
                hello = Hello(self._end.link, share.source, share.target, kind_of(self._place.link_kind, device))
                self._channels.append(dial(self._end.addresses[share.target], hello, device))
            elif self._listener is None:
                raise LinkBroken("this replica takes no pages from others")
            else:
                self._channels.append(self._listener.accept(self._end.link, share.source, share.target))
            if self._closed:
                self.close()
                raise LinkBroken("the link was closed")

    def carry(self, move: Move) -> int:
        if move.kind is MoveKind.SEND:
            for share, channel in zip(self._mine, self._channels, strict=True):
                self._send(share, channel, move.pages)
            return len(move.pages)
        counts = {self._receive(share, channel, move.pages) for share, channel in zip(self._mine, self._channels, strict=True)}
        if len(counts) != 1:
            raise LinkBroken(f"the other end's ranks have sent different numbers of pages: {sorted(counts)}")
        return counts.pop()

    def close(self) -> None:
        self._closed = True
        for channel in self._channels:
            channel.close()

    def _send(self, share: Share, channel: Channel, pages: tuple[int, ...]) -> None:
        channel.send(self._number(len(pages)))
        for part in self._kv.parts(pages, slice(share.source_start, share.source_start + share.heads), self._place.verify):
            channel.send(part)
            if self._place.verify:
                channel.send(self._raw(digest(part)))

    def _receive(self, share: Share, channel: Channel, pages: tuple[int, ...]) -> int:
        number = self._number(0)
        channel.receive(number)
        count = int(number.item())
        if not 0 <= count <= len(pages):
            raise LinkBroken(f"{count} pages come where there is room for {len(pages)}")
        for part in self._kv.landings(pages[:count], slice(share.target_start, share.target_start + share.heads), self._place.verify):
            channel.receive(part)
            if self._place.verify:
                there = self._raw(bytes(DIGEST_BYTES))
                channel.receive(there)
                if bytes(there.cpu().numpy()) != digest(part):
                    raise LinkBroken("a page is not what was sent")
        return count

    def _number(self, value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._kv.pool.device)

    def _raw(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._kv.pool.device)


def digest(part: Tensor) -> bytes:
    """Of the bytes of a page, or of some of its heads."""
    return blake2b(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=DIGEST_BYTES).digest()
