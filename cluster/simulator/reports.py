"""When a simulated replica's events reach the controller: as often as the real one asks (`cluster.polling`), between two steps."""

from __future__ import annotations

from collections.abc import Callable

from ...worker.protocol import EventFrame
from ..polling import EVENT_WAIT_S, pause_s
from .loop import EventLoop
from .replica import Replica


class Reports:
    """The reports of one life.

    Args:
        loop: the clock.
        replica: whose.
        replicas: how many there are now.
        take: gets each frame when it arrives.
        hop_s: that a message takes.
    """

    def __init__(
        self, loop: EventLoop, replica: Replica, replicas: Callable[[], int], take: Callable[[EventFrame], None], hop_s: float
    ) -> None:
        self._loop = loop
        self._replica = replica
        self._replicas = replicas
        self._take = take
        self._hop_s = hop_s
        self._asked_s = 0.0  # when the controller asks next, or has asked
        self._due = 0  # the latest of what was arranged

    def news(self) -> None:
        """The replica has something to tell."""
        if self._loop.now_s >= self._asked_s:
            self._tell()
        else:
            self._arrange(self._asked_s, self._between_steps)

    def _arrange(self, when_s: float, do: Callable[[], None]) -> None:
        self._due += 1
        due = self._due

        def happen() -> None:
            if due == self._due:
                do()

        self._loop.at(when_s, happen)

    def _between_steps(self) -> None:
        at_s = self._replica.boundary_s()
        if at_s > self._loop.now_s:
            self._arrange(at_s, self._tell)
        else:
            self._tell()

    def _tell(self) -> None:
        frame = self._replica.frame()
        self._loop.after(self._hop_s, lambda: self._take(frame))
        self._asked_s = self._loop.now_s + pause_s(self._replicas())
        self._due += 1
        if not self._replica.idle():
            self._arrange(self._asked_s + EVENT_WAIT_S, self._between_steps)
