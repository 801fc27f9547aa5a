"""The half of a migration that gets it, as a state machine; `migration` says how both go together. Pure."""

from __future__ import annotations

from enum import Enum, auto
from functools import partial

from .berth import Berth, Unfit
from .migration import LEASE_S, Say
from .migration_wire import Abort, Accept, Commit, Committed, Message, Offer, Pages, Ready
from .page_moves import PageMoves
from .plan import LinkEnd, Moved, MoveKind

RECEIVE_S = 5.0  # that the last pages may take to come after Commit; less than the lease, so that the source hears of it


class Destination(Enum):
    """Where the destination's half stands."""

    OPEN = auto()
    CLOSING = auto()
    HERE = auto()
    OVER = auto()


class DestinationMigration:
    """The half that gets it.

    Args:
        name: of the migration.
        offer: what it gets.
        berth: what is kept for it here.
        moves: of the pool that its pages will lie in.
        accept: the answer to the offer.
        say: gives a message to the source.
    """

    def __init__(self, name: str, offer: Offer, berth: Berth, moves: PageMoves, accept: Accept, say: Say, now_s: float) -> None:
        self.name = name
        self.state = Destination.OPEN
        self._berth = berth
        self._moves = moves
        self._accept = accept
        self._say = say
        self._rounds = 0
        self._commit: Commit | None = None
        self._reason = ""
        self._heard_s = self._commit_s = now_s
        self._link = True
        moves.open(LinkEnd(name, offer.tp, ()))
        say(accept)

    def hear(self, message: Message, now_s: float) -> None:
        """A message of the source's."""
        self._heard_s = now_s
        match message:
            case Abort() if self.state in (Destination.OPEN, Destination.CLOSING):
                self._end("the source has given it up")
            case Offer() if self.state is Destination.OPEN and not self._rounds:
                self._say(self._accept)
            case Pages(round_, room) if self.state is Destination.OPEN:
                self._make_room(round_, room)
            case Commit() if self.state is Destination.OPEN:
                self.state = Destination.CLOSING
                self._commit, self._commit_s = message, now_s
                self._install_if_whole()
            case Commit() if self.state is Destination.HERE:
                self._say(Committed())
            case Offer() | Pages() | Commit() if self.state is Destination.OVER:
                self._say(Abort(self._reason))

    def advance(self, now_s: float) -> None:
        """Between two steps: see whether it has waited too long."""
        if self.state in (Destination.OPEN, Destination.CLOSING) and now_s - self._heard_s > LEASE_S:
            self.abort(f"the source has been silent for {LEASE_S:g} s")
        elif self.state is Destination.CLOSING and now_s - self._commit_s > RECEIVE_S:
            self.abort(f"its last pages did not come within {RECEIVE_S:g} s")

    @property
    def over(self) -> bool:
        """It goes on here, or never will."""
        return self.state in (Destination.HERE, Destination.OVER)

    def source_died(self) -> None:
        """The source is dead for good. What it has committed may be whole all the same."""
        if self.state is Destination.OPEN:
            self.abort("the source has died")

    def abort(self, reason: str) -> None:
        """It will not go on here."""
        if self.state in (Destination.OPEN, Destination.CLOSING):
            self._end(reason)
            self._say(Abort(reason))

    # --- inside ---

    def _make_room(self, round_: int, room: int) -> None:
        if round_ == self._rounds:
            reserved = self._berth.make_room(room)
            if reserved is None:
                self.abort(f"there is no room for {room} more pages")
                return
            self._rounds += 1
            self._moves.start(MoveKind.RECEIVE, reserved, partial(self._received, round_, reserved), link=self.name)
        if round_ < self._rounds:
            self._say(Ready(round_))

    def _received(self, round_: int, reserved: list[int], moved: Moved) -> None:
        self._berth.came(round_, reserved, 0 if moved.error else moved.pages)
        if self.state not in (Destination.OPEN, Destination.CLOSING):
            return
        if moved.error is not None:
            self.abort(f"pages did not come: {moved.error}")
        elif self.state is Destination.CLOSING:
            self._install_if_whole()

    def _install_if_whole(self) -> None:
        if self._commit is None or not self._berth.whole(self._commit):
            return
        try:
            self._berth.install(self._commit)
        except Unfit as error:
            self.abort(str(error))
            return
        self.state = Destination.HERE
        self._close()
        self._say(Committed())

    def _end(self, reason: str) -> None:
        self.state = Destination.OVER
        self._reason = reason
        self._berth.release()
        self._close()

    def _close(self) -> None:
        if self._link:
            self._link = False
            self._moves.close(self.name)
