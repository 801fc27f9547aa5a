"""What is on the move between replicas, what has moved, and what moves next: the books behind `rebalancing`. Pure; times are passed in.

Like the queue it can be begun anew: after a controller's restart migrations under way end by themselves, and are counted by the replicas.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..worker.protocol import LiveRequest, MigrationResult, Outcome
from .admin import MoveRow
from .messages import Route
from .policies import ReplicaSnapshot
from .rebalancing import COOLDOWN_S, FREE_TO_MOVE_AGAIN, Move, Need, Place, Reason, Role, looked_at, place, plan, size

ROUND_S = 1.0  # between two rounds of all policies
QUICK_ROUND_S = 0.05  # between two for replicas that drain or only prefill
KEPT = 64  # of the moves that have ended, for operators
RETRY_S = 1.0  # after a move that failed, nothing is tried with that request


@dataclass(frozen=True, slots=True)
class Moved:
    """What migrations have come to so far: all of them, or those of one drain. `longest_ms` is the longest downtime."""

    moves: int = 0
    pages: int = 0
    bytes: int = 0
    downtime_ms: float = 0.0
    longest_ms: float = 0.0

    def plus(self, of: MigrationResult) -> Moved:
        """With one more."""
        moved = of.outcome == Outcome.MOVED
        return Moved(
            self.moves + moved,
            self.pages + of.pages,
            self.bytes + of.bytes,
            self.downtime_ms + of.downtime_ms * moved,
            max(self.longest_ms, of.downtime_ms * moved),
        )


class Mobility:
    """The books.

    Args:
        prefill_replicas: so many of the replicas, the first ones, only prefill; 0: all do everything.
    """

    def __init__(self, prefill_replicas: int = 0) -> None:
        self.under_way: dict[str, Move] = {}
        self.total = Moved()
        self._prefill = {f"replica-{i}" for i in range(prefill_replicas)}
        self._counts: Counter[tuple[str, str]] = Counter()  # (reason, outcome)
        self._ended: dict[str, tuple[float, bool]] = {}  # request id -> when its last move ended, and whether it failed; oldest first
        self._ready_s: dict[Route, float] = {}  # since when a life has been known
        self._drains: dict[str, Moved] = {}
        self._lately: deque[tuple[float, MoveRow]] = deque(maxlen=KEPT)  # when each ended; oldest first

    def role(self, replica_id: str) -> Role:
        """What a replica is there for."""
        if not self._prefill:
            return Role.BOTH
        return Role.PREFILL if replica_id in self._prefill else Role.DECODE

    # --- what happens ---

    def drain(self, replica_id: str, on: bool) -> None:
        """What is counted for its drain begins, or is forgotten."""
        if not on:
            self._drains.pop(replica_id, None)
        else:
            self._drains.setdefault(replica_id, Moved())

    def drained(self, replica_id: str) -> Moved:
        """What its drain has come to."""
        return self._drains.get(replica_id, Moved())

    def begin(self, move: Move) -> None:
        """It is under way."""
        self.under_way[move.request_id] = move

    def ended(self, move: Move, outcome: MigrationResult, now_s: float) -> MoveRow:
        """It is over: how."""
        self.under_way.pop(move.request_id, None)
        self._ended.pop(move.request_id, None)
        self._ended[move.request_id] = now_s, outcome.outcome != Outcome.MOVED
        self._counts[move.reason.value, outcome.outcome] += 1
        self.total = self.total.plus(outcome)
        if move.source.replica_id in self._drains:
            self._drains[move.source.replica_id] = self._drains[move.source.replica_id].plus(outcome)
        row = MoveRow(move.request_id, move.source.replica_id, move.destination.replica_id, move.reason.value, *outcome)
        self._lately.append((now_s, row))
        return row

    def moving(self) -> tuple[MoveRow, ...]:
        """What is under way, the oldest first; the pages are what each will take."""
        return tuple(
            MoveRow(m.request_id, m.source.replica_id, m.destination.replica_id, m.reason.value, "", m.pages)
            for m in self.under_way.values()
        )

    def moved(self, now_s: float) -> tuple[tuple[float, MoveRow], ...]:
        """The last that have ended, oldest first, each with the seconds since then."""
        return tuple((now_s - ended_s, row) for ended_s, row in self._lately)

    def counts(self) -> dict[tuple[str, str], int]:
        """(reason, outcome) -> migrations."""
        return dict(self._counts)

    # --- what is to be done ---

    def places(self, shots: Iterable[ReplicaSnapshot], draining: Iterable[str], now_s: float) -> list[Place]:
        """The replicas as they are when all that moves has moved."""
        known, leaving = list(shots), set(draining)
        self._ready_s = {Route(s.replica_id, s.epoch): self._ready_s.get(Route(s.replica_id, s.epoch), now_s) for s in known}
        places = []
        for shot in known:
            route = Route(shot.replica_id, shot.epoch)
            out = [move for move in self.under_way.values() if move.source == route]
            pages, sequences = sum(move.pages for move in out), sum(move.sequences for move in out)
            role, ready_s = self.role(shot.replica_id), now_s - self._ready_s[route]
            places.append(place(shot, role, shot.replica_id in leaving, ready_s, pages, sequences))
        return places

    def looked_at(self, places: Iterable[Place], need: Need | None, leisure: bool) -> list[Route]:
        """The replicas whose requests `plan` must know. Without `leisure` only those that drain and those that prefill."""
        known = list(places)
        urgent = {p.route for p in known if p.draining or p.role is Role.PREFILL}
        return [route for route in looked_at(known, need) if leisure or route in urgent]

    def plan(
        self, places: Iterable[Place], requests: Mapping[Route, list[LiveRequest]], need: Need | None, leisure: bool, now_s: float
    ) -> list[Move]:
        """The moves to begin now."""
        for request_id in [r for r, (ended_s, _) in self._ended.items() if now_s - ended_s >= COOLDOWN_S]:
            del self._ended[request_id]
        failed = {r for r, (ended_s, failed) in self._ended.items() if failed and now_s - ended_s < RETRY_S}
        barred = failed.union(self.under_way)
        still = {route: [r for r in some if r.request_id not in barred] for route, some in requests.items()}
        moves = plan(places, still, self._ended.__contains__, need)
        return [move for move in moves if leisure or move.reason in FREE_TO_MOVE_AGAIN]


def by_hand(request: LiveRequest, source: Place, destination: Place) -> Move:
    """A move that an operator asks for."""
    pages = size(request, source.page_size)
    return Move(request.request_id, source.route, destination.route, Reason.OPERATOR, pages, request.sequences)
