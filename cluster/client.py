"""What a front end sees of the engine: submit a request, read its outputs, abort it.

`cluster.ray_gateway.RayEngineClient` is the real one. Everything here runs on one asyncio loop; nothing imports ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from ..worker.protocol import EngineStats, GenerateRequest, ModelInfo, SequenceOutput


class RequestStream(Protocol):
    """The outputs of one request, for all its choices, in the order in which each choice grew.

    Outputs of one choice that nobody has read yet are merged, so a slow reader costs memory for its tokens and nothing
    else. Iteration ends when every choice has ended: by an output whose `finish` is set, or by `abort`.
    """

    def __aiter__(self) -> AsyncIterator[SequenceOutput]: ...

    async def __anext__(self) -> SequenceOutput:
        """The next output.

        Raises:
            ReplicaLost: the replica is gone or was silent for too long. It never hangs instead.
            StopAsyncIteration: every choice has ended.
        """
        ...

    async def abort(self, choice: int | None = None) -> None:
        """Ends one choice, or all of them, here at once and on the replica within a step or two.

        An aborted choice yields nothing more, not even a final output. Idempotent, and a no-op once the choice has ended.
        """
        ...


class EngineClient(Protocol):
    """The cluster, as one engine."""

    async def submit(self, request: GenerateRequest) -> RequestStream:
        """Admits the request and starts it on a replica.

        Raises:
            BadRequest: the request itself is wrong.
            Overloaded: the bounded queue is full.
            ReplicaLost: there is no replica to take it.
        """
        ...

    async def info(self) -> ModelInfo:
        """What the replicas serve.

        Raises:
            ReplicaLost: no replica is there to say.
        """
        ...

    def stats(self) -> Mapping[str, EngineStats]:
        """Replica id -> what its latest heartbeat said."""
        ...

    def silent_s(self) -> float:
        """Seconds since the last frame of the replica that was heard from most recently; inf when none was yet."""
        ...
