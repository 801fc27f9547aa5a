"""After a step that raised: which sequences are computed alone until the one to blame is found. Pure.

A step that raises says nothing about which of its sequences did it. All of them become suspects and are computed one at a time, until
each has passed the position at which the joint step failed; the one that raises alone is the culprit. When that does not help, because
several requests in a row raise even alone, or because suspects all pass and their joint step raises again, the engine itself is broken.
"""

from __future__ import annotations

from collections.abc import Mapping

from .sequence import Sequence, State

BROKEN_AFTER = 3  # requests that raise alone, or rounds without a culprit, with no step between them that went well


class Isolation:
    """Who is suspected. Told by the scheduler how every step went."""

    def __init__(self) -> None:
        self._until: dict[Sequence, int] = {}  # suspect -> tokens that it must have computed to be cleared
        self._culprits: set[str] = set()  # requests, since a step last went well
        self._rounds = 0  # without a culprit, since a joint step last went well

    @property
    def hopeless(self) -> bool:
        """The engine itself is to blame."""
        return len(self._culprits) >= BROKEN_AFTER or self._rounds > BROKEN_AFTER

    def suspect(self) -> Sequence | None:
        """The sequence that is to be computed alone in the next step; None when any may be."""
        while self._until:
            s = next(iter(self._until))
            if s.state is not State.FINISHED:
                return s
            del self._until[s]
        return None

    def failed(self, planned: Mapping[Sequence, tuple[int, int]]) -> Sequence | None:
        """A step with these sequences (to their start and count) raised; the culprit, if that is clear."""
        if len(planned) == 1:
            (culprit,) = planned
            self._until.pop(culprit, None)
            self._culprits.add(culprit.request_id)
            self._rounds = 0
            return culprit
        # Those without output first: they have computed least, and a request is most often at fault from its start.
        ordered = sorted(planned, key=lambda s: (s.num_output > 0, s.order))
        self._until = {s: sum(planned[s]) for s in ordered}
        self._rounds += 1
        return None

    def succeeded(self, planned: Mapping[Sequence, tuple[int, int]]) -> None:
        """A step with these sequences went well, and they have advanced."""
        self._culprits.clear()
        if not self._until:
            self._rounds = 0
        for s in planned if self._until else ():
            if s.state is State.FINISHED or s.num_computed >= self._until.get(s, 0):
                self._until.pop(s, None)
