"""A migration as two state machines; the half that has it is here, the other is `migration_destination`. Pure.

    source        OFFERED --Accept--> COPYING --little is left: freeze, last SEND, Commit--> FROZEN --Committed--> OVER (moved)
    destination   OPEN --Commit--> CLOSING --all has come: it goes on here, Committed--> HERE

Every state has a way out on Abort, on a failed move, and on silence. Until the source says Commit, each of them leaves the request running
there as if nothing had happened. From then on the destination decides, once: HERE, or an Abort after which it never will; the source
repeats its question until it hears which. Hears it nothing for LEASE_S, it ends the request, whose ingress then resumes it from its
journal, and whatever still goes on elsewhere is stale. Two who run it never hurt: its ingress follows one of them, and ends the other.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from .cargo import Cargo
from .migration_wire import (
    Abort,
    Accept,
    Commit,
    Committed,
    Message,
    Offer,
    Pages,
    Peer,
    Ready,
)
from .page_moves import PageMoves
from .plan import LinkEnd, Moved, MoveKind
from .protocol import MigrationResult, Outcome, SequenceOutput

LEASE_S = 10.0  # of silence, after which the other side is given up
REPEAT_S = 1.0  # between two messages of the source, at most
WHOLE_S = 300.0  # from the offer to Commit
ROUND_PAGES = 64  # full pages in one round, at most
ROUND_S = 0.05  # that one round takes of the budget, if that is a page at least
IN_FLIGHT = 2  # rounds that are being sent at once

Say = Callable[[Message], None]


class Source(Enum):
    """Where the source's half stands."""

    OFFERED = auto()
    COPYING = auto()
    FROZEN = auto()
    OVER = auto()


class Budget:
    """Bytes that may be sent in a second, in all: who has sent waits until that has been paid for."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def round_pages(self, page_bytes: int) -> int:
        """Pages that are sent at once."""
        return min(max(int(ROUND_S * self._bytes_per_s / page_bytes), 1), ROUND_PAGES)

    def allows(self, now_s: float) -> bool:
        """Whether something may be sent now."""
        return now_s >= self._free_s

    def spend(self, some: int, now_s: float) -> None:
        """So many bytes are being sent."""
        self._free_s = max(self._free_s, now_s) + some / self._bytes_per_s


class Shipping(NamedTuple):
    """How pages leave a replica."""

    moves: PageMoves  # of its pool
    page_bytes: int  # of one page, on all ranks
    budget: Budget
    tell_reader: Callable[[list[SequenceOutput]], None]  # what becomes of a request, at once: a later attempt may follow on its heels


class SourceMigration:
    """The half that has it.

    Args:
        name: of the migration.
        request_id: whose pages they are.
        to: who shall get it.
        cargo: what.
        shipping: of all migrations from here.
        say: gives a message to `to`.

    `result` is None until it is over; `took_s` is how long it took, from the offer on, if it went well.
    """

    def __init__(self, name: str, request_id: str, to: Peer, cargo: Cargo, shipping: Shipping, say: Say) -> None:
        self.name = name
        self.request_id = request_id
        self.to = to
        self.result: MigrationResult | None = None
        self.took_s = 0.0
        self.state = Source.OFFERED
        self._cargo = cargo
        self._moves, self._page_bytes, self._budget, self._tell_reader = shipping
        self._round_pages = self._budget.round_pages(self._page_bytes)
        self._say = say
        self._latest: Message = Abort("nothing was offered")
        self._accept = Accept((), 0, ())
        self._began_s = self._said_s = self._heard_s = self._frozen_s = 0.0
        self._link = False
        self._round = 0  # that is asked for, or that there is room for
        self._room = 0  # pages in it
        self._ready = False
        self._in_flight = 0  # SENDs
        self._pages = 0  # that were sent

    def start(self, offer: Offer, now_s: float) -> None:
        """Ask the destination."""
        self._began_s = self._heard_s = now_s
        self._tell(offer, now_s)

    def advance(self, now_s: float) -> None:
        """Between two steps: go on with whatever can be done now."""
        if self.over:
            return
        hindrance = self._cargo.hindrance()
        if hindrance is not None:
            self.abort(hindrance)
        elif now_s - self._heard_s > LEASE_S:
            self._despair(now_s)
        elif self.state is not Source.FROZEN and now_s - self._began_s > WHOLE_S:
            self.abort(f"it was not done after {WHOLE_S:g} s")
        elif self.state is Source.COPYING:
            self._copy(now_s)
        self._repeat(now_s)

    def hear(self, message: Message, now_s: float) -> None:
        """A message of the destination's."""
        if self.over:
            if isinstance(message, Accept | Ready):
                self._say(Abort("it was given up"))
            return
        self._heard_s = now_s
        match message:
            case Accept() if self.state is Source.OFFERED:
                self._accepted(message)
            case Ready(round_) if self.state is Source.COPYING and round_ == self._round:
                self._ready = True
            case Committed() if self.state is Source.FROZEN:
                self._moved(now_s)
            case Abort(reason):
                self._refused(reason)
        self.advance(now_s)

    @property
    def over(self) -> bool:
        """There is a result."""
        return self.state is Source.OVER

    def abort(self, reason: str) -> None:
        """Give it up from this side. What is frozen is in doubt: the destination may have taken it over, so it ends here."""
        if self.over:
            return
        if self.state is Source.FROZEN:
            self._tell_reader(self._cargo.drop())
        self._say(Abort(reason))
        self._end(Outcome.LOST if self.state is Source.FROZEN else Outcome.ABORTED, reason)

    def peer_died(self) -> None:
        """The destination is dead for good, so it will not go on there."""
        if not self.over:
            self._refused(f"{self.to.replica_id} has died")

    # --- inside ---

    def _tell(self, message: Message, now_s: float) -> None:
        self._latest, self._said_s = message, now_s
        self._say(message)

    def _repeat(self, now_s: float) -> None:
        if not self.over and now_s - self._said_s >= REPEAT_S:
            self._tell(self._latest, now_s)

    def _accepted(self, accept: Accept) -> None:
        self.state = Source.COPYING
        self._accept = accept
        wrong = self._cargo.tell_found(accept.found)
        if wrong is not None:
            self.abort(wrong)

    def _open_link(self, now_s: float) -> None:
        """Only for pages that must travel: what waits, or is there already, needs none."""
        self._link = True
        self._moves.open(LinkEnd(self.name, self._accept.tp, self._accept.addresses))
        self._ask_for_room(now_s)

    def _ask_for_room(self, now_s: float) -> None:
        """For what is full, for a last page of each sequence, and for one that each may gain meanwhile."""
        self._room = min(len(self._cargo.unsent().full), self._round_pages) + 2 * self._cargo.spread()
        self._ready = False
        self._tell(Pages(self._round, max(self._room, 1)), now_s)

    def _copy(self, now_s: float) -> None:
        full, partial = self._cargo.unsent()
        if not self._link:
            if full or partial:
                self._open_link(now_s)
            elif self._cargo.can_freeze():
                self._freeze([], now_s)
            return
        if not self._ready or self._in_flight >= IN_FLIGHT:
            return
        few = len(full) <= max(2, self._cargo.spread()) and len(full) + len(partial) <= self._room
        if few and self._cargo.can_freeze():
            if not self._in_flight:
                self._freeze(full + partial, now_s)
        elif full and self._budget.allows(now_s):
            self._send(full[: min(self._room, self._round_pages)], now_s)
            self._ask_for_room(now_s)

    def _send(self, pages: list[int], now_s: float) -> None:
        self._cargo.sent(pages)
        self._moves.start(MoveKind.SEND, pages, self._has_sent, link=self.name)
        self._budget.spend(len(pages) * self._page_bytes, now_s)
        self._in_flight += 1
        self._pages += len(pages)
        self._round += 1

    def _has_sent(self, moved: Moved) -> None:
        self._in_flight -= 1
        if moved.error is not None and self.state is Source.COPYING:
            self.abort(f"pages could not be sent: {moved.error}")
        self._close_when_done()

    def _freeze(self, pages: list[int], now_s: float) -> None:
        self._cargo.freeze()
        self.state = Source.FROZEN
        self._frozen_s = now_s
        if pages:
            self._send(pages, now_s)
        self._tell(Commit(self._cargo.commit(), self._pages, self._round, self._cargo.ended_tokens), now_s)

    def _moved(self, now_s: float) -> None:
        self.took_s = now_s - self._began_s
        self._tell_reader(self._cargo.leave((self.to.replica_id, self.to.epoch)))
        self._end(self._cargo.outcome, "", now_s - self._frozen_s)

    def _refused(self, reason: str) -> None:
        """It does not go on there, and never will."""
        refused = self.state is Source.OFFERED
        if self.state is Source.FROZEN:
            self._cargo.thaw()
        self._end(Outcome.REFUSED if refused else Outcome.ABORTED, reason)

    def _despair(self, now_s: float) -> None:
        self.abort(f"{self.to.replica_id} has not answered for {LEASE_S:g} s")

    def _end(self, outcome: Outcome, reason: str, downtime_s: float = 0.0) -> None:
        self.state = Source.OVER
        self._cargo.release()
        self.result = MigrationResult(outcome, self._pages, self._pages * self._page_bytes, downtime_s * 1000, reason)
        if outcome is not self._cargo.outcome:
            self._in_flight = 0  # closing the link ends what is left
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self.over and self._link and self._in_flight <= 0:
            self._link = False
            self._moves.close(self.name)
