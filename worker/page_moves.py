"""The page moves of one replica: which have been asked for, which are under way, and which pages they touch. Pure.

    start -> (next plan) under way -> ended; if it failed -> (next plan) fenced

Whoever starts a move is told of its end, once. Until then its pages are safe from reuse: the pages that OUT, SEND and SAVE read are held
here; those that IN, RECEIVE and LOAD write were reserved by whoever started the move, and stay so until its end, even when nobody wants
them any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .page_pool import PagePool
from .plan import LinkEnd, Move, Moved, MoveKind

READS = (MoveKind.OUT, MoveKind.SEND, MoveKind.SAVE)
DECAY = 0.9  # of what earlier moves weigh, with each move


class MovePlan(NamedTuple):
    """What one plan says of moves; the fields are `StepPlan`'s."""

    moves: tuple[Move, ...]
    fenced: tuple[int, ...]
    links: tuple[LinkEnd, ...]
    closed: tuple[str, ...]


@dataclass(slots=True)
class _Speed:
    """Pages and seconds of the moves of one kind, decayed sums."""

    pages: float = 0.0
    seconds: float = 0.0


class PageMoves:
    """Moves from `pool`, and to it."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._next = 0
        self._under_way: dict[int, tuple[Move, Callable[[Moved], None]]] = {}
        self._moves: list[Move] = []
        self._fenced: list[int] = []
        self._links: list[LinkEnd] = []
        self._closed: list[str] = []
        self._speeds = {kind: _Speed() for kind in MoveKind}
        self.moved_pages = dict.fromkeys(MoveKind, 0)  # in all

    def start(
        self,
        kind: MoveKind,
        pages: Sequence[int],
        done: Callable[[Moved], None],
        host_pages: Sequence[int] = (),
        link: str = "",
        file: str = "",
        snapshot: bytes = b"",
    ) -> int:
        """Start a move with the next plan; its number. `done` is called when it has ended, before the next plan."""
        move = Move(self._next, kind, tuple(pages), tuple(host_pages), link, file, snapshot)
        self._next += 1
        if kind in READS:
            self._pool.retain(move.pages)
        self._under_way[move.move] = move, done
        self._moves.append(move)
        return move.move

    def open(self, end: LinkEnd) -> None:
        """Open a link with the next plan."""
        self._links.append(end)

    def close(self, link: str) -> None:
        """Close a link with the next plan. What is under way on it ends, with an error if it is not whole by then."""
        self._closed.append(link)

    def ended(self, some: Iterable[Moved]) -> None:
        """These moves have ended on every rank."""
        for moved in some:
            move, done = self._under_way.pop(moved.move)
            if moved.error is None:
                self._count(move.kind, moved)
            else:
                self._fenced.append(moved.move)
            done(moved)
            if move.kind in READS:
                self._pool.release(move.pages)

    def pending(self) -> bool:
        """Whether the next plan has something to say of moves that cannot wait for it to have rows."""
        return bool(self._moves or self._links or self._closed)

    def under_way(self) -> bool:
        """Whether a move has started and not ended."""
        return bool(self._under_way)

    def _count(self, kind: MoveKind, moved: Moved) -> None:
        self.moved_pages[kind] += moved.pages
        speed = self._speeds[kind]
        speed.pages = DECAY * speed.pages + moved.pages
        speed.seconds = DECAY * speed.seconds + moved.seconds

    def pages_per_s(self, kind: MoveKind) -> float:
        """How fast moves of a kind are; 0.0 until one has ended."""
        speed = self._speeds[kind]
        return speed.pages / speed.seconds if speed.seconds else 0.0

    def queued(self, kind: MoveKind) -> int:
        """Pages of the moves of a kind that have not ended."""
        return sum(len(move.pages) for move, _ in self._under_way.values() if move.kind is kind)

    def leaving(self) -> int:
        """Pages that nobody but moves holds: they will be free when these have ended."""
        held = Counter(page for pages in self.held() for page in pages)
        return sum(self._pool.references[page] == count for page, count in held.items())

    def take(self) -> MovePlan:
        """What the plan that is being made says of moves; told once."""
        plan = MovePlan(tuple(self._moves), tuple(self._fenced), tuple(self._links), tuple(self._closed))
        for some in (self._moves, self._fenced, self._links, self._closed):
            some.clear()
        return plan

    def held(self) -> list[tuple[int, ...]]:
        """The pages that are held here, as tables for `PagePool.check`."""
        return [move.pages for move, _ in self._under_way.values() if move.kind in READS]
