"""The page moves of one rank, carried out beside its steps, and of all ranks at the leader: a move ends when it has on every rank.

Each rank but the leader writes the ends of its own moves into the store that the ranks share, and the leader's mover waits for them there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from .kv_store import KVStore
from .page_lane import Ends, Lane, LocalCopies, awaited, dialled
from .page_link import Listener, kind_of
from .plan import LinkEnd, Move, Moved, MoveKind, StepPlan
from .reslice import Share, shares
from .strict_wire import pack, unpack
from .suspend_files import SuspendDirectory, SuspendFiles

RANKS_TIMEOUT_S = 60.0  # until every rank has carried out a move that this one has
RANKS_POLL_S = 0.001
FILES = (MoveKind.SAVE, MoveKind.LOAD, MoveKind.ERASE)
FENCE_TIMEOUT_S = 30.0  # for what this rank still does of a move that was given up


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
        disk: where sequences are suspended to; None: they are not.
    """

    rank: int = 0
    tp: int = 1
    kv_heads: int = 1
    reports: Reports | None = None
    link_kind: str = "auto"
    verify: bool = False
    disk: SuspendDirectory | None = None


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
        self._links: dict[str, Lane] = {}
        self._copies: Lane | None = None
        self._files: Lane | None = None  # apart, so that copies do not wait for a disk
        self._carried: dict[int, Lane] = {}  # moves that have not ended on this rank

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
        """Open links, start moves and close links as `plan` says, after everything that earlier steps write.

        Raises:
            RuntimeError: a move that the other ranks have given up does not end here, so nobody can say what it will still write.
        """
        for given_up in plan.fenced:
            late = self._carried.get(given_up)
            if late is not None and not late.give_up(given_up, FENCE_TIMEOUT_S):
                raise RuntimeError(f"move {given_up} was given up {FENCE_TIMEOUT_S:g} s ago and has not ended on rank {self._place.rank}")
        for end in plan.links:
            self._links[end.link] = Lane(f"link-{end.link}", self._end, self._ends(end))
        if plan.moves:
            ready = self._kv.after()
            for move in plan.moves:
                lane = self._lane(move)
                if lane is None:
                    moved = Moved(move.move, error=f"there is no link {move.link!r}" if move.link else "there is no disk")
                    threading.Thread(target=self._end, args=(moved,), name="page-moves-nowhere", daemon=True).start()
                else:
                    self._carried[move.move] = lane
                    lane.put(move, ready)
        for link in plan.closed:
            closing = self._links.pop(link, None)
            if closing is not None:
                closing.close()

    def close(self) -> None:
        """End every lane; what is under way on links ends with an error."""
        for lane in [*self._links.values(), self._copies, self._files]:
            if lane is not None:
                lane.close()
        if self._place.disk is not None and self._files is None:
            self._place.disk.close()
        if self._listener is not None:
            self._listener.close()

    def _lane(self, move: Move) -> Lane | None:
        if move.link:
            return self._links.get(move.link)
        if move.kind in FILES:
            if self._files is None and self._place.disk is not None:
                self._files = Lane("page-files", self._end, SuspendFiles(self._kv, self._place.disk))
            return self._files
        if self._copies is None:
            self._copies = Lane("page-copies", self._end, LocalCopies(self._kv, {} if self._place.verify else None))
        return self._copies

    def _ends(self, end: LinkEnd) -> Ends:
        place, device = self._place, self._kv.pool.device
        if end.addresses:
            open_one = dialled(end.link, end.addresses, kind_of(place.link_kind, device), device)
        else:
            open_one = awaited(end.link, self._listener)
        return Ends(self._kv, partial(self._shares, end), open_one, place.verify)

    def _shares(self, end: LinkEnd) -> list[Share]:
        """What this rank has to do with a link."""
        place = self._place
        if not end.addresses:
            return [share for share in shares(place.kv_heads, end.peer_tp, place.tp) if share.target == place.rank]
        if len(end.addresses) != end.peer_tp:
            raise ValueError(f"{len(end.addresses)} addresses of {end.peer_tp} ranks")
        return [share for share in shares(place.kv_heads, place.tp, end.peer_tp) if share.source == place.rank]

    def _end(self, moved: Moved) -> None:
        """A move has ended on this rank; called on its lane."""
        place = self._place
        self._carried.pop(moved.move, None)
        if place.reports is not None:
            try:
                if place.rank:
                    place.reports.set(f"moved/{moved.move}/{place.rank}", pack(moved))
                    return
                moved = self._of_all(moved, place.reports)
            except (RuntimeError, ValueError) as error:  # the store is gone, and so is the replica; or what is in it is no report
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
