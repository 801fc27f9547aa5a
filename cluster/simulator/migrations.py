"""Moves between simulated replicas: pages travel at the bandwidth of a link while the sequence goes on, then it is handed over.

As in `worker.migration`: the destination keeps place and pages, and is not sent what it has; the pages that were full at the beginning
are copied while the source decodes; then the sequence leaves between two steps, what has grown since follows, and it goes on. One source
sends one thing at a time. A request that has no pages yet, or is in the middle of its prompt, is computed anew where it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...worker.protocol import MigrationResult, Outcome
from ..messages import Route
from ..rebalancing import Move
from .loop import EventLoop
from .planner import Berth
from .replica import Replica
from .sequence import Sequence

Done = Callable[[Move, MigrationResult], None]


class Migrations:
    """Carries out moves.

    Args:
        loop: the clock.
        hop_s: that a message between two processes takes.
        done: hears what came of each.
    """

    def __init__(self, loop: EventLoop, hop_s: float, done: Done) -> None:
        self._loop = loop
        self._hop_s = hop_s
        self._done = done
        self._link_free_s: dict[Route, float] = {}

    def begin(self, move: Move, source: Replica | None, destination: Replica | None) -> None:
        """The source has been told."""
        s = source.sequence(move.request_id) if source is not None else None
        if source is None or destination is None or s is None:
            self._done(move, MigrationResult(Outcome.REFUSED))
        elif source.decodes(s):
            self._offer(move, source, destination, s)
        else:
            source.between_steps(partial(self._hand_over_unfinished, move, source, destination, s))

    def _hand_over_unfinished(self, move: Move, source: Replica, destination: Replica, s: Sequence) -> None:
        if source.sequence(move.request_id) is not s or source.decodes(s):
            self._done(move, MigrationResult(Outcome.ABORTED))
            return
        source.leave(s)

        def arrive() -> None:
            destination.submit(s)
            self._done(move, MigrationResult(Outcome.MOVED))

        self._loop.after(self._hop_s, arrive)

    def _offer(self, move: Move, source: Replica, destination: Replica, s: Sequence) -> None:
        berth = destination.reserve(s)
        if berth is None:
            self._done(move, MigrationResult(Outcome.REFUSED))
            return
        pages = berth.pages - len(berth.found)
        begin_s = max(self._loop.now_s, self._link_free_s.get(source.route, 0.0)) + 2 * self._hop_s
        self._link_free_s[source.route] = begin_s + _copy_s(source, pages)
        freeze = partial(self._freeze, move, source, destination, s, berth)
        self._loop.at(self._link_free_s[source.route], partial(source.between_steps, freeze))

    def _freeze(self, move: Move, source: Replica, destination: Replica, s: Sequence, berth: Berth) -> None:
        """Between two steps of the source."""
        still = source.sequence(move.request_id) is s and source.decodes(s)
        wider = destination.widen(berth, s.pages) if still else None
        if wider is None:
            destination.cancel(berth)
            self._done(move, MigrationResult(Outcome.ABORTED))
            return
        computed, grown = s.computed, s.pages - berth.pages
        source.leave(s)
        downtime_s = 2 * self._hop_s + _copy_s(source, grown + 1)  # what has grown, and the page that is being written
        pages = wider.pages - len(wider.found)

        def arrive() -> None:
            destination.arrive(s, wider, computed)
            self._done(move, MigrationResult(Outcome.MOVED, pages, pages * source.profile.replica.page_bytes, 1000 * downtime_s))

        self._loop.after(downtime_s, arrive)


def _copy_s(source: Replica, pages: int) -> float:
    shape = source.profile.replica
    return pages * shape.page_bytes / shape.link_bytes_per_s
