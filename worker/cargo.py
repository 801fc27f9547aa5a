"""What a migration carries, seen from its source: a request that goes on meanwhile, or the pages of a prefix. Pure.

A page travels once, however many block tables hold it, and as soon as it is full. Ordinals number pages in the order in which they
were sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Some
from typing import NamedTuple, Protocol

from .migration_wire import Moving
from .protocol import Outcome, SequenceOutput
from .scheduler import Scheduler
from .sequence import Request, Sequence, State

MOVED_AWAY = "it was preempted while its pages travelled"


class Unsent(NamedTuple):
    """Pages that the destination lacks, as things stand."""

    full: list[int]  # nobody writes into them any more
    partial: list[int]


class Cargo(Protocol):
    """What the source's half of the protocol asks of what it carries."""

    outcome: Outcome  # when all went well

    @property
    def ended_tokens(self) -> int:
        """Output tokens of the request's choices that have ended."""

    def tell_found(self, found: tuple[int, ...]) -> str | None:
        """How many pages at the head of each offered sequence are at the destination; why that cannot be, if it cannot."""

    def hindrance(self) -> str | None:
        """Why it cannot be carried any further; None while it can."""

    def unsent(self) -> Unsent:
        """What is still to be sent."""

    def sent(self, pages: Iterable[int]) -> None:
        """These are on their way."""

    def spread(self) -> int:
        """How many block tables may gain a page."""

    def can_freeze(self) -> bool:
        """Whether this is a good moment to stop."""

    def freeze(self) -> None:
        """Stop."""

    def commit(self) -> tuple[Moving, ...]:
        """How it stands, frozen."""

    def thaw(self) -> None:
        """Go on here."""

    def leave(self, peer: tuple[str, int]) -> list[SequenceOutput]:
        """It goes on there."""

    def drop(self) -> list[SequenceOutput]:
        """Nobody knows where it goes on: end it."""

    def release(self) -> None:
        """The migration is over, in whatever way."""


class RequestCargo:
    """A whole request: all sequences that have not ended."""

    outcome = Outcome.MOVED

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.request = request
        self._scheduler = scheduler
        self._offered = {s.choice: len(s.tokens) for s in request.sequences.values()}
        self._found: dict[int, int] = {}
        self._ordinals: dict[int, int] = {}  # page -> ordinal
        self._next = 0
        self._travelled: dict[int, list[int]] = {}  # choice -> pages of its table that were sent, or need not be

    @property
    def ended_tokens(self) -> int:
        """As the protocol says; so below."""
        return self.request.ended_tokens

    def _live(self) -> list[Sequence]:
        return list(self.request.sequences.values())

    def _running(self) -> list[Sequence]:
        return [s for s in self._live() if s.pages]

    def tell_found(self, found: tuple[int, ...]) -> str | None:
        if len(found) != len(self._offered) or min(found) < 0:
            return "the destination found pages of other sequences"
        self._found = dict(zip(self._offered, found, strict=True))
        return None

    def hindrance(self) -> str | None:
        if self._scheduler.request(self.request.request_id) is not self.request:
            return "it has ended"
        for choice, pages in list(self._travelled.items()):
            s = self.request.sequences.get(choice)
            if s is None:
                del self._travelled[choice]
                held = {page for some in self._travelled.values() for page in some}
                self._ordinals = {page: ordinal for page, ordinal in self._ordinals.items() if page in held}
            elif s.state not in (State.RUNNING, State.FROZEN) or s.pages[: len(pages)] != pages:
                return MOVED_AWAY
        return None

    def unsent(self) -> Unsent:
        size = self._scheduler.pool.page_size
        full: dict[int, None] = {}
        partial: dict[int, None] = {}
        for s in self._running():
            known = self._found.get(s.choice, 0)
            for i in range(known, self._scheduler.pool.pages_for(s.num_computed)):
                page = s.pages[i]
                if page not in self._ordinals:
                    (full if (i + 1) * size <= s.num_computed else partial)[page] = None
        return Unsent(list(full), [page for page in partial if page not in full])

    def sent(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._ordinals[page] = self._next
            self._next += 1
        for s in self._running():
            known = self._found.get(s.choice, 0)
            end = known
            while end < len(s.pages) and s.pages[end] in self._ordinals:
                end += 1
            self._travelled[s.choice] = s.pages[:end]

    def spread(self) -> int:
        return len(self.request.sequences)

    def can_freeze(self) -> bool:
        """Every sequence that runs is about to have its next token, and none is on its way from elsewhere. So a prefill ends first."""
        if self._scheduler.isolation.suspect() is not None:
            return False
        for s in self._live():
            if s.state is State.RUNNING:
                if len(s.tokens) - s.num_computed != 1 or s.followers:
                    return False
            elif s.state not in (State.WAITING, State.FOLLOWING):
                return False
        return True

    def freeze(self) -> None:
        self._scheduler.freeze(self.request)

    def commit(self) -> tuple[Moving, ...]:
        return tuple(self._moving(s) for s in self._live())

    def _moving(self, s: Sequence) -> Moving:
        gained = tuple(s.tokens[self._offered[s.choice] :])
        computed = s.num_computed if s.pages else 0
        pages = s.pages[self._found.get(s.choice, 0) : self._scheduler.pool.pages_for(computed)]
        return Moving(s.choice, gained, s.cached_tokens, computed, tuple(self._ordinals[page] for page in pages))

    def thaw(self) -> None:
        self._scheduler.thaw(self.request)

    def leave(self, peer: tuple[str, int]) -> list[SequenceOutput]:
        return self._scheduler.leave(self.request, peer)

    def drop(self) -> list[SequenceOutput]:
        ours = self._scheduler.request(self.request.request_id) is self.request
        return self._scheduler.abort(self.request.request_id) if ours else []

    def release(self) -> None:
        """It holds nothing of its own."""


class PrefixCargo:
    """Full pages of one prefix, held as long as they travel."""

    outcome = Outcome.FILLED
    ended_tokens = 0

    def __init__(self, scheduler: Scheduler, name: str, pages: Some[int]) -> None:
        self._scheduler = scheduler
        self._name = name
        self._pages = list(pages)
        self._found = 0
        self._sent = 0
        scheduler.pool.retain(self._pages)
        scheduler.pins[name] = self._pages

    def tell_found(self, found: tuple[int, ...]) -> str | None:
        if len(found) != 1 or not 0 <= found[0] <= len(self._pages):
            return "the destination found pages of another prefix"
        self._found = found[0]
        return None

    def hindrance(self) -> str | None:
        return None

    def unsent(self) -> Unsent:
        return Unsent(self._pages[self._found + self._sent :], [])

    def sent(self, pages: Iterable[int]) -> None:
        self._sent += len(list(pages))

    def spread(self) -> int:
        return 0

    def can_freeze(self) -> bool:
        return True

    def freeze(self) -> None:
        """There is nothing to stop."""

    def commit(self) -> tuple[Moving, ...]:
        return (Moving(0, (), None, len(self._pages) * self._scheduler.pool.page_size, tuple(range(self._sent))),)

    def thaw(self) -> None:
        """There is nothing to go on with."""

    def leave(self, peer: tuple[str, int]) -> list[SequenceOutput]:
        return []

    def drop(self) -> list[SequenceOutput]:
        return []

    def release(self) -> None:
        self._scheduler.pool.release(self._scheduler.pins.pop(self._name))
