"""Whose outputs go where: the connections of ingresses to one replica, and the requests that each of them reads.

A connection is called `<ingress>/<whatever tells it from the ingress's others>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .arrival import Owner
from .protocol import EngineStats, Frame, SequenceOutput, pack_frame

Deliver = Callable[[bytes], None]


@dataclass(slots=True)
class _Connection:
    """Where its frames go, and how many sequences of each of its requests are alive."""

    deliver: Deliver
    number: int = 0
    requests: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Reading:
    """Who reads a request, and on which attempt."""

    connection: str
    attempt: int


class Subscriptions:
    """The connections to one life of one replica."""

    def __init__(self, replica_id: str, epoch: int) -> None:
        self._replica_id = replica_id
        self._epoch = epoch
        self._connections: dict[str, _Connection] = {}
        self._readings: dict[str, _Reading] = {}  # by request

    def __contains__(self, connection: str) -> bool:
        return connection in self._connections

    def open(self, connection: str, deliver: Deliver, stats: EngineStats) -> None:
        """A connection, which gets a heartbeat first."""
        self._connections[connection] = _Connection(deliver)
        self._send_one(self._connections[connection], [], stats)

    def close(self, connection: str) -> tuple[str, ...]:
        """A connection is gone; the requests that nobody reads any more."""
        closed = self._connections.pop(connection, None)
        requests = tuple(closed.requests) if closed else ()
        for request_id in requests:
            del self._readings[request_id]
        return requests

    def claim(self, request_id: str, connection: str, attempt: int, choices: int) -> None:
        """So many sequences of a request, on that attempt, are read by a connection that is open."""
        self._readings[request_id] = _Reading(connection, attempt)
        self._connections[connection].requests[request_id] = choices

    def forget(self, request_id: str) -> None:
        """Nothing more of a request is sent."""
        reading = self._readings.pop(request_id)
        del self._connections[reading.connection].requests[request_id]

    def attempt(self, request_id: str) -> int | None:
        """On which attempt a request is read; None when it is not."""
        reading = self._readings.get(request_id)
        return None if reading is None else reading.attempt

    def reads(self, connection: str, request_id: str) -> bool:
        """Whether a request is read by that connection."""
        reading = self._readings.get(request_id)
        return reading is not None and reading.connection == connection

    def send(self, outputs: Iterable[SequenceOutput], stats: EngineStats | None) -> None:
        """A frame for each connection that some of `outputs` are for; with `stats` for every connection."""
        mine: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            reading = self._readings.get(output.request_id)
            if reading is None:
                continue
            told = output._replace(attempt=reading.attempt) if reading.attempt else output
            mine.setdefault(reading.connection, []).append(told)
            if output.finish is not None:
                self._count_end(reading.connection, output.request_id)
        for name in self._connections if stats is not None else mine:
            self._send_one(self._connections[name], mine.get(name, []), stats)

    # --- for requests that move (`arrival.Streams`) ---

    def owner(self, request_id: str) -> Owner | None:
        """The ingress that reads a request, and on which attempt."""
        reading = self._readings.get(request_id)
        return None if reading is None else Owner(_ingress(reading.connection), reading.attempt)

    def can_take(self, request_id: str, owner: Owner) -> bool:
        """Whether there is a connection of that ingress, and the request is not here yet."""
        return request_id not in self._readings and self._connection_of(owner.ingress) is not None

    def take(self, request_id: str, owner: Owner, choices: int) -> None:
        """A request that has moved here is read by a connection of its ingress."""
        connection = self._connection_of(owner.ingress)
        if connection is None:
            raise LookupError(f"no connection of {owner.ingress!r}")
        self.claim(request_id, connection, owner.attempt, choices)

    def tell(self, outputs: list[SequenceOutput]) -> None:
        """What a move has made of requests."""
        self.send(outputs, None)

    # --- inside ---

    def _connection_of(self, ingress: str) -> str | None:
        return next((name for name in reversed(self._connections) if _ingress(name) == ingress), None)

    def _send_one(self, to: _Connection, outputs: list[SequenceOutput], stats: EngineStats | None) -> None:
        to.deliver(pack_frame(Frame(self._replica_id, self._epoch, to.number, tuple(outputs), stats)))
        to.number += 1

    def _count_end(self, connection: str, request_id: str) -> None:
        requests = self._connections[connection].requests
        requests[request_id] -= 1
        if requests[request_id] == 0:
            self.forget(request_id)


def _ingress(connection: str) -> str:
    return connection.partition("/")[0]
