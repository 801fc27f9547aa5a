"""Which running requests are to go on at which other replica: filter -> policy -> moves, over value snapshots. Pure.

A replica's usage is virtual (Llumnix, OSDI 2024): pages that are held, those that its waiting line and what is on its way will take, and
room to grow; not those that are leaving. Policies, in the order in which they are served:

    drain         a replica that is to be empty gives all that it has to whoever has room
    disaggregate  what a prefill replica has begun goes on at a decode replica
    defragment    a request that waits for pages, which no replica has although all together do, gets them: neighbours make way
    isolate       where something urgent runs, others make way until there is headroom
    fill          a replica that has just come gets its share
    rebalance     from the fullest to the emptiest, if that is crowded or makes some wait, while the gap between them strictly shrinks

Each move is booked at once, so that what follows sees it. Nobody moves again within `COOLDOWN_S`, except to drain or to disaggregate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from ..worker.protocol import LiveRequest
from .messages import Route
from .policies import ReplicaSnapshot

COOLDOWN_S = 5.0
FRESH_S = 30.0  # a replica is new for so long
CROWDED = 0.5  # of a pool: who has more to spare gains nothing when others leave, and the move costs all
MIN_GAP = 0.15  # of a pool: smaller gaps are not worth a move
HEADROOM = 0.1  # of a pool, kept beside what is urgent, and where victims go; below it a replica may send victims elsewhere
MOVES_PER_ROUND = 4  # by one policy, drain and disaggregate left out


class Role(StrEnum):
    """What a replica is there for. New requests go to those that prefill."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Reason(StrEnum):
    """Why a request moves."""

    DRAIN = "drain"
    DISAGGREGATE = "disaggregate"
    DEFRAGMENT = "defragment"
    ISOLATE = "isolate"
    FILL = "fill"
    REBALANCE = "rebalance"
    OPERATOR = "operator"


FREE_TO_MOVE_AGAIN = (Reason.DRAIN, Reason.DISAGGREGATE)


class Place(NamedTuple):
    """One replica that is ready.

    Attributes:
        total: pages of its pool.
        left: pages that are not spoken for; negative when there are too few.
        seats: sequences that it could start now.
        running, waiting: sequences.
        ready_s: since when it has been ready, in seconds.
        draining: it is to be empty.
    """

    route: Route
    page_size: int
    total: int
    left: int
    seats: int
    running: int
    waiting: int
    role: Role = Role.BOTH
    ready_s: float = 1e9
    draining: bool = False

    @property
    def usage(self) -> float:
        """Share of the pool that is spoken for; above 1 when more is."""
        return 1 - self.left / self.total


class Need(NamedTuple):
    """A request that waits in the controller, since no replica has the pages: how many, and the longest that it may get, in tokens."""

    pages: int
    longest_tokens: int


class Move(NamedTuple):
    """A request is to go on elsewhere; `pages` and `sequences` are what it will take there."""

    request_id: str
    source: Route
    destination: Route
    reason: Reason
    pages: int
    sequences: int


class Relief(NamedTuple):
    """A replica under pressure may send victims there, of so many pages together."""

    destination: Route
    pages: int


def place(
    shot: ReplicaSnapshot, role: Role, draining: bool, ready_s: float = 1e9, leaving_pages: int = 0, leaving_sequences: int = 0
) -> Place:
    """A replica as routing knows it, and what is on its way out."""
    load = shot.load
    return Place(
        Route(shot.replica_id, shot.epoch),
        shot.info.page_size,
        max(load.pages_total, 1),
        shot.pages_left + leaving_pages,
        shot.info.max_running - load.running - shot.line + leaving_sequences,
        load.running,
        load.waiting,
        role,
        ready_s,
        draining,
    )


def size(request: LiveRequest, page_size: int) -> int:
    """Pages that it takes where it goes, with one to grow into for each sequence."""
    tokens = request.prompt_tokens + request.output_tokens
    return max(request.pages, -(-tokens // page_size)) + request.sequences


def looked_at(places: Iterable[Place], need: Need | None = None) -> list[Route]:
    """The replicas whose requests the policies must know. Most of the time there are none."""
    known = list(places)
    open_ = [p for p in known if not p.draining]
    wanted = [p for p in known if p.running + p.waiting and (p.draining or p.role is Role.PREFILL)]
    if len(open_) > 1:
        fullest, emptiest = max(open_, key=_usage), min(open_, key=_usage)
        wanted += [p for p in open_ if p.waiting or p.left < HEADROOM * p.total]
        wanted += [fullest] if _reason(fullest, emptiest) is not None else []
        wanted += [p for p in open_ if p.running] if need is not None else []
    return list(dict.fromkeys(p.route for p in wanted))


def plan(
    places: Iterable[Place], requests: Mapping[Route, list[LiveRequest]], cooling: Callable[[str], bool], need: Need | None = None
) -> list[Move]:
    """The moves to begin now.

    Args:
        places: the replicas that are ready.
        requests: what runs and waits on those of them that `looked_at` named, without what moves already.
        cooling: whether a request has moved lately.
        need: the request that the controller's line is stuck at for want of pages.
    """
    books = _Books(places, requests, cooling)
    _drain(books)
    _disaggregate(books)
    _defragment(books, need)
    _isolate(books)
    if need is None:  # else what makes way would be undone
        _rebalance(books)
    return books.moves


def relief(places: Iterable[Place]) -> dict[Route, Relief | None]:
    """For each replica, where a victim of its lack of pages may go, and how large it may be; None: nowhere. Nobody relieves two.

    Under load everybody is nearly full, so a little more room elsewhere is worth a move: whether a victim fits, the replica sees.
    """
    known = sorted(places, key=_usage)
    roomy = [p for p in known if not p.draining and p.role is not Role.PREFILL and _spare(p) > 0 and p.seats > 0]
    found: dict[Route, Relief | None] = {}
    for p in reversed(known):
        found[p.route] = None
        if p.left < HEADROOM * p.total and roomy and p.usage - roomy[0].usage >= MIN_GAP:
            other = roomy.pop(0)
            found[p.route] = Relief(other.route, _spare(other))
    return found


def _spare(p: Place) -> int:
    return p.left - int(HEADROOM * p.total)


class _Books:
    """The places, with what has been decided taken into account."""

    def __init__(self, places: Iterable[Place], requests: Mapping[Route, list[LiveRequest]], cooling: Callable[[str], bool]) -> None:
        self.places = {p.route: p for p in places}
        self.moves: list[Move] = []
        self._requests = {route: list(some) for route, some in requests.items() if route in self.places}
        self._cooling = cooling

    def requests(self, source: Route, reason: Reason) -> list[LiveRequest]:
        """Those that may move from there."""
        return [r for r in self._requests.get(source, []) if reason in FREE_TO_MOVE_AGAIN or not self._cooling(r.request_id)]

    def roomiest(self, source: Place, pages: int, sequences: int) -> Place | None:
        """Where so much would fit, and most is left then. One that prefills takes nothing but what must go somewhere."""
        takes = (p for p in self.places.values() if p.route != source.route and not p.draining)
        fits = [p for p in takes if p.left >= pages and p.seats >= sequences and (p.role is not Role.PREFILL or source.draining)]
        return max(fits, key=lambda p: (p.role is not Role.PREFILL, p.left / p.total, p.route), default=None)

    def move(self, request: LiveRequest, source: Place, destination: Place, reason: Reason) -> None:
        """It is decided."""
        pages, n = size(request, source.page_size), request.sequences
        self.moves.append(Move(request.request_id, source.route, destination.route, reason, pages, n))
        self._requests[source.route].remove(request)
        self.places[source.route] = source._replace(left=source.left + pages, seats=source.seats + n)
        self.places[destination.route] = destination._replace(left=destination.left - pages, seats=destination.seats - n)

    def make_way(self, source: Route, pages: int, victims: list[LiveRequest], reason: Reason) -> bool:
        """Moves victims, in their order, until so many pages more are left there; all or none. False when that cannot be."""
        before = self.places.copy(), self.moves.copy(), {route: some.copy() for route, some in self._requests.items()}
        aim, moved = self.places[source].left + pages, 0
        for victim in victims:
            here = self.places[source]
            if here.left >= aim or moved == MOVES_PER_ROUND:
                break
            there = self.roomiest(here, size(victim, here.page_size), victim.sequences)
            if there is not None:
                self.move(victim, here, there, reason)
                moved += 1
        if self.places[source].left >= aim:
            return True
        self.places, self.moves, self._requests = before
        return False


def _drain(books: _Books) -> None:
    for source in [p.route for p in books.places.values() if p.draining]:
        for request in sorted(books.requests(source, Reason.DRAIN), key=lambda r: (r.priority, -r.pages)):
            here = books.places[source]
            there = books.roomiest(here, size(request, here.page_size), request.sequences)
            if there is not None:
                books.move(request, here, there, Reason.DRAIN)


def _disaggregate(books: _Books) -> None:
    for source in [p.route for p in books.places.values() if p.role is Role.PREFILL]:
        for request in books.requests(source, Reason.DISAGGREGATE):
            here = books.places[source]
            there = books.roomiest(here, size(request, here.page_size), request.sequences)
            if request.state == "running" and there is not None:
                books.move(request, here, there, Reason.DISAGGREGATE)


def _defragment(books: _Books, need: Need | None) -> None:
    if need is not None and not any(p.left >= need.pages for p in books.places.values() if not p.draining):
        able = [p for p in books.places.values() if not p.draining and p.total * p.page_size >= need.longest_tokens]
        for p in sorted(able, key=lambda p: need.pages - p.left):
            if books.make_way(p.route, need.pages - p.left, _largest_first(books, p), Reason.DEFRAGMENT):
                break
    for p in [p for p in books.places.values() if p.waiting and not p.draining]:
        _seat(books, p.route)


def _seat(books: _Books, route: Route) -> None:
    """A request that waits at a replica for pages goes where they are; if they are nowhere, its neighbours make way."""
    here = books.places[route]
    waiting = [r for r in books.requests(route, Reason.DEFRAGMENT) if r.state == "waiting"]
    if not waiting or here.left >= 0:  # what waits is spoken for: there are pages, and its turn will come
        return
    first = min(waiting, key=lambda r: r.priority)
    there = books.roomiest(here, size(first, here.page_size), first.sequences)
    if there is not None:
        books.move(first, here, there, Reason.DEFRAGMENT)
    else:
        books.make_way(route, -here.left, _largest_first(books, here), Reason.DEFRAGMENT)


def _isolate(books: _Books) -> None:
    for here in [p for p in books.places.values() if not p.draining and p.left < HEADROOM * p.total]:
        requests = books.requests(here.route, Reason.ISOLATE)
        urgent = min((r.priority for r in requests), default=0)
        victims = sorted((r for r in requests if r.priority > urgent and r.state == "running"), key=lambda r: (-r.priority, r.pages))
        if urgent < 0 and victims:
            books.make_way(here.route, int(HEADROOM * here.total) - here.left, victims, Reason.ISOLATE)


def _rebalance(books: _Books) -> None:
    for _ in range(MOVES_PER_ROUND):
        found = [p for p in books.places.values() if not p.draining and p.role is not Role.PREFILL]
        source, destination = max(found, key=_usage, default=None), min(found, key=_usage, default=None)
        reason = None if source is None or destination is None else _reason(source, destination)
        if source is None or destination is None or reason is None:
            return
        fits = [
            r
            for r in books.requests(source.route, reason)
            if size(r, source.page_size) <= destination.left and r.sequences <= destination.seats
        ]
        best = min(fits, key=lambda r: (_gap_after(r, source, destination), r.request_id), default=None)
        if best is None or _gap_after(best, source, destination) >= source.usage - destination.usage:
            return
        books.move(best, source, destination, reason)


def _reason(source: Place, destination: Place) -> Reason | None:
    """Why something should move between the fullest and the emptiest; None: it should not."""
    if source.usage - destination.usage < MIN_GAP:
        return None
    if destination.ready_s < FRESH_S:
        return Reason.FILL
    return Reason.REBALANCE if source.usage >= CROWDED or source.waiting else None


def _gap_after(request: LiveRequest, source: Place, destination: Place) -> float:
    pages = size(request, source.page_size)
    return abs(source.usage - pages / source.total - destination.usage - pages / destination.total)


def _largest_first(books: _Books, here: Place) -> list[LiveRequest]:
    running = (r for r in books.requests(here.route, Reason.DEFRAGMENT) if r.state == "running")
    return sorted(running, key=lambda r: (-r.priority, -r.pages, r.request_id))


def _usage(p: Place) -> tuple[float, Route]:
    return p.usage, p.route
