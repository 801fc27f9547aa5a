"""How a request leaves for another replica, and how one arrives. Pure; nothing here knows of messages.

running, waiting, following --freeze--> frozen --leave--> ended with `MOVED`
            ^                             |
            +------------thaw-------------+
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import NamedTuple

from .page_pool import PagePool
from .protocol import FinishReason, SequenceOutput
from .sequence import Request, State
from .swapping import Swapping

_ORDER = attrgetter("order")


class Placed(NamedTuple):
    """The block table that a sequence arrives with: one reference to each page is the sequence's from now on."""

    pages: list[int]
    hashes: list[bytes]  # of those at the head that have been indexed
    computed: int  # tokens in them


class Station(Swapping):
    """Requests that come and go with their pages.

    Args:
        pool: the pages that sequences hold.
        host_pages: pages of host memory beside it.
        disk_pages: that may lie in files.

    `awaited` is the number of places that are kept free for sequences that will arrive.
    """

    def __init__(self, pool: PagePool, host_pages: int, disk_pages: int) -> None:
        super().__init__(pool, host_pages, disk_pages)
        self.awaited = 0

    def request(self, request_id: str) -> Request | None:
        """The live request of that name."""
        return self._requests.get(request_id)

    def waits_until_s(self, request: Request) -> float | None:
        """By when it must have started, on the engine's clock; None when it has, or has for ever."""
        return self._expiring.get(request.request_id)

    def freeze(self, request: Request) -> None:
        """Compute nothing of it any more, but keep all that it holds. Only between steps."""
        for s in request.sequences.values():
            if s.state is not State.FOLLOWING:
                self._lists[s.state].remove(s)
            s.state = State.FROZEN
            self.frozen.append(s)

    def thaw(self, request: Request) -> None:
        """Go on as if it had never been frozen."""
        for s in request.sequences.values():
            self.frozen.remove(s)
            if s.pages:
                s.state = State.RUNNING
                insort(self.running, s, key=_ORDER)
            elif s.leader is not None and s in s.leader.followers:
                s.state = State.FOLLOWING
            else:
                s.state = State.WAITING
                insort(self.waiting, s, key=_ORDER)

    def leave(self, request: Request, peer: tuple[str, int]) -> list[SequenceOutput]:
        """It goes on at `peer`; its last outputs here."""
        return [self._end(s, FinishReason.MOVED)._replace(peer=peer) for s in list(request.sequences.values())]

    def arrive(self, request: Request, placed: dict[int, Placed]) -> None:
        """Take in a request from another replica: the choices in `placed` run at once, in places that were awaited; the others wait.

        Nothing is counted as prompt or output here: that was done where it was computed.
        """
        self._enlist(request)
        for s in request.sequences.values():
            self._sequences[s.seq] = s
            if s.choice in placed:
                s.pages, s.hashes, s.num_computed = placed[s.choice]
                s.state = State.RUNNING
                insort(self.running, s, key=_ORDER)
            elif s.leader is not None:
                s.state = State.FOLLOWING
                s.leader.followers.append(s)
            else:
                insort(self.waiting, s, key=_ORDER)
