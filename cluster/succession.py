"""Who goes on with one attempt of a request after whom, when it migrates from replica to replica. Pure.

The owner's last output of each choice is MOVED and names its heir; the heir's first says where it came from, and at which index it goes
on. They come over different streams, so either may be here first, and the heir may be tokens ahead while the owner's last ones are
still on their way. What an heir says before its turn is parked. Its turn has come when the owner has said so, or when every choice that
goes on has got the tokens before the heir's own. In a chain A -> B -> C the next heir follows at once, also when it is A again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import NamedTuple

from ..worker.protocol import FinishReason, SequenceOutput

MAX_PARKED = 4096  # outputs of one request; an heir is ahead by less than a second's steps


class Owner(NamedTuple):
    """The one replica, in the one life of it, that may emit for a request."""

    replica_id: str
    epoch: int


@dataclass(slots=True)
class _Tenure:
    """What a replica has said since the request came to it from `source`; `begins`: choice -> index at which it goes on with it."""

    owner: Owner
    source: Owner
    begins: dict[int, int] = field(default_factory=dict)
    parked: list[SequenceOutput] = field(default_factory=list)
    left: bool = False  # it has moved on from there, too


class Heir(NamedTuple):
    """The next owner, and what it has said already, in order."""

    owner: Owner
    parked: list[SequenceOutput]


class Succession:
    """The heirs of one attempt."""

    def __init__(self) -> None:
        self._tenures: list[_Tenure] = []  # that are to come; of one replica in their order
        self._handed: dict[int, Owner] = {}  # choices that the owner has handed over, to whom
        self._awaited: Owner | None = None  # the owner has not said yet that it has taken over from this one
        self._parked = 0

    @property
    def full(self) -> bool:
        """More is parked than can be right."""
        return self._parked > MAX_PARKED

    @property
    def awaits(self) -> bool:
        """Nothing has been heard of the owner since it became that."""
        return self._awaited is not None

    def heirs(self) -> tuple[Owner, ...]:
        """Whoever may compute it beside the owner."""
        return tuple(dict.fromkeys([*self._handed.values(), *(t.owner for t in self._tenures if not t.left)]))

    def park(self, owner: Owner, output: SequenceOutput) -> bool:
        """Keeps what somebody says who is not the owner. False when it is nobody's heir."""
        tenure = next((t for t in reversed(self._tenures) if t.owner == owner), None)
        if output.peer is not None and output.finish is None:
            source = Owner(*output.peer)
            if tenure is None or tenure.left or tenure.source != source or output.choice in tenure.begins:
                tenure = _Tenure(owner, source)
                self._tenures.append(tenure)
            tenure.begins[output.choice] = output.index
        if tenure is None:
            return False
        tenure.parked.append(output)
        tenure.left |= output.finish is FinishReason.MOVED
        self._parked += 1
        return True

    def heeds(self, output: SequenceOutput) -> bool:
        """Whether what the owner says counts. What it said when it had the request once before, and comes late, does not."""
        if self._awaited is not None:
            if output.finish is not None or output.peer is None or Owner(*output.peer) != self._awaited:
                return False
            self._awaited = None
        return True

    def hand(self, choice: int, heir: Owner) -> None:
        """The owner has said who goes on with a choice."""
        self._handed[choice] = heir

    def next(self, owner: Owner, live: Mapping[int, Sized]) -> Heir | None:
        """Who goes on after `owner` now, if anybody: from then on it is the owner.

        Args:
            live: choice that goes on -> the tokens that have been delivered.
        """
        if self._awaited is not None:
            return None
        heir = next(iter(self._handed.values()), None) if live and live.keys() <= self._handed.keys() else None
        for tenure in self._tenures:
            if tenure.source == owner and (heir == tenure.owner if heir is not None else self._in_time(tenure, live)):
                self._tenures.remove(tenure)
                self._parked -= len(tenure.parked)
                self._handed, self._awaited = {}, None
                return Heir(tenure.owner, tenure.parked)
        if heir is None:
            return None
        self._handed, self._awaited = {}, owner
        return Heir(heir, [])

    def _in_time(self, tenure: _Tenure, live: Mapping[int, Sized]) -> bool:
        due = ((tenure.begins.get(choice), len(have)) for choice, have in live.items() if choice not in self._handed)
        return bool(live) and all(begins is not None and begins <= have for begins, have in due)
