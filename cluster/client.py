"""What a front end sees of the engine: submit a request, read its outputs, abort it.

`cluster.remote_client.RemoteEngineClient` is the real one. Everything here runs on one asyncio loop; nothing imports ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple, Protocol

from ..worker.protocol import EngineStats, GenerateRequest, ModelInfo, SequenceOutput


class RecoveryStats(NamedTuple):
    """What deaths have cost the streams of one front end so far. All of them only grow."""

    lost: int = 0  # times that a request lost the replica that ran it
    resumed: int = 0  # times that a lost request went on elsewhere
    replayed_tokens: int = 0  # prompt and output tokens that replicas were given for that; what they find cached they do not compute
    pause_s: float = 0.0  # from each loss to the next token, in all


class RequestStream(Protocol):
    """The outputs of one request, for all its choices, in the order in which each choice grew.

    Outputs of one choice that nobody has read yet are merged, so a slow reader costs memory for its tokens and nothing
    else. Iteration ends when every choice has ended: by an output whose `finish` is set, or by `abort`. A replica that dies
    is not seen here: another one goes on where it stopped.
    """

    @property
    def waited_s(self) -> float | None:
        """Seconds until there was a first place for it; None before."""
        ...

    def __aiter__(self) -> AsyncIterator[SequenceOutput]: ...

    async def __anext__(self) -> SequenceOutput:
        """The next output. The wait is bounded: by the request's deadline, and by how long a request may wait at all.

        Raises:
            BadRequest: no replica can ever hold it.
            Overloaded: the bounded queue is full, or its tenant is over a limit.
            DeadlineExceeded: its deadline passed before its first step.
            ReplicaLost: for too long there was no replica to run it, or nobody to say which.
            RequestFailed: replica after replica has died under it.
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
        """Checks the request and sends it on its way. What becomes of it, a refusal too, comes from the stream.

        Raises:
            BadRequest: the request itself is wrong.
            ReplicaLost: there has been no replica yet to say what is served.
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

    def recovery(self) -> RecoveryStats:
        """What deaths have cost so far."""
        ...

    def silent_s(self) -> float:
        """Seconds since the last frame of the replica that was heard from most recently; inf when none was yet, and 0 while
        there is to be none."""
        ...
