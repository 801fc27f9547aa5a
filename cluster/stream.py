"""Frames in, one stream of outputs for each request out: what an ingress knows of its running requests.

A `StreamTable` belongs to one asyncio loop. Frames are the only source of outputs, and every one is checked: its owner
(replica and epoch) against the request's, its number against the stream's, each token's index against what was already
delivered. Hence duplicates are dropped, nothing is skipped, and a stale owner cannot emit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ..worker.protocol import EngineStats, GenerateRequest, ReplicaLost, SequenceOutput, unpack_frame


class Owner(NamedTuple):
    """The one replica, in the one life of it, that may emit for a request."""

    replica_id: str
    epoch: int


Abort = Callable[[Owner, str, int | None], Awaitable[None]]
"""Tells the owner to abort (request_id, choice or all)."""


class StreamTable:
    """The running requests of one ingress.

    Args:
        abort: called when the reader of a stream gives up a choice (None: all of them).
        clock: seconds, monotonic.
    """

    def __init__(self, abort: Abort, clock: Callable[[], float]) -> None:
        self._abort = abort
        self._clock = clock
        self._streams: dict[str, TableStream] = {}
        self._next_frame: dict[Owner, int] = {}
        self._heard_s: dict[str, float] = {}
        self._stats: dict[str, EngineStats] = {}

    def register(self, request: GenerateRequest, owner: Owner) -> TableStream:
        """The stream of a request that `owner` is about to be given. Before the submit, so that no frame can come too early.

        Raises:
            ReplicaLost: no frame stream of that owner is open.
            ValueError: the request's id is in use.
        """
        if owner not in self._next_frame:
            raise ReplicaLost(f"{owner.replica_id} is not connected")
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id} is in use")
        stream = TableStream(self, request.request_id, owner, len(request.prompts) * request.params.n)
        self._streams[request.request_id] = stream
        return stream

    def withdraw(self, request_id: str) -> None:
        """Forgets a request that its owner did not take."""
        self._streams.pop(request_id, None)

    def connect(self, owner: Owner) -> None:
        """A frame stream of `owner` has been opened: its frames count from 0."""
        self._next_frame[owner] = 0

    def feed(self, data: bytes) -> None:
        """Takes one frame.

        Raises:
            ReplicaLost: frames are missing before this one; the caller must `drop` the owner.
        """
        frame = unpack_frame(data)
        owner = Owner(frame.replica_id, frame.epoch)
        expected = self._next_frame.get(owner)
        if expected is None or frame.number < expected:
            return
        if frame.number > expected:
            raise ReplicaLost(f"{frame.replica_id}: frame {frame.number} came where {expected} was due")
        self._next_frame[owner] = expected + 1
        self._heard_s[frame.replica_id] = self._clock()
        if frame.stats is not None:
            self._stats[frame.replica_id] = frame.stats
        for output in frame.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None and stream.owner == owner:
                stream.push(output)

    def drop(self, owner: Owner, reason: str) -> None:
        """The owner, or its frame stream, is gone: its requests raise ReplicaLost."""
        self._next_frame.pop(owner, None)
        self._stats.pop(owner.replica_id, None)
        for stream in [s for s in self._streams.values() if s.owner == owner]:
            stream.fail(ReplicaLost(reason))

    def stats(self) -> dict[str, EngineStats]:
        """Replica id -> what its latest heartbeat said."""
        return dict(self._stats)

    def silent_s(self, replica_id: str | None = None) -> float:
        """Seconds since the replica's last frame (None: of the one that was heard from last); inf when there was none."""
        heard = self._heard_s.values() if replica_id is None else [s for r, s in self._heard_s.items() if r == replica_id]
        return self._clock() - max(heard, default=float("-inf"))

    def live(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def abort(self, stream: TableStream, choice: int | None) -> None:
        """Passes an abort on to the stream's owner."""
        await self._abort(stream.owner, stream.request_id, choice)


class TableStream:
    """A `cluster.client.RequestStream` that a `StreamTable` feeds. One reader."""

    def __init__(self, table: StreamTable, request_id: str, owner: Owner, choices: int) -> None:
        self.request_id = request_id
        self.owner = owner
        self._table = table
        self._delivered = dict.fromkeys(range(choices), 0)  # choice that has not ended -> its output tokens so far
        self._unread: dict[int, SequenceOutput] = {}  # by choice, oldest first
        self._failure: ReplicaLost | None = None
        self._changed = asyncio.Event()

    def push(self, output: SequenceOutput) -> None:
        """Takes what one choice gained. Tokens that were delivered before are cut off; a gap fails the stream."""
        have = self._delivered.get(output.choice)
        if have is None:
            return
        if output.index > have:
            self.fail(ReplicaLost(f"{self.owner.replica_id}: token {output.index} of choice {output.choice} came where {have} was due"))
            return
        fresh = _after(output, have)
        if not fresh.tokens and output.tokens and fresh.finish is None:
            return
        unread = self._unread.get(output.choice)
        self._unread[output.choice] = fresh if unread is None else _joined(unread, fresh)
        self._delivered[output.choice] = have + len(fresh.tokens)
        if output.finish is not None:
            self._end(output.choice)
        self._changed.set()

    def fail(self, error: ReplicaLost) -> None:
        """Ends the stream; the reader gets what came before, then `error`."""
        self._failure = error
        self._delivered.clear()
        self._table.withdraw(self.request_id)
        self._changed.set()

    def __aiter__(self) -> TableStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        while not self._unread:
            if self._failure is not None:
                raise self._failure
            if not self._delivered:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()  # bounded: whoever feeds the table drops an owner that has gone silent
        return self._unread.pop(next(iter(self._unread)))

    async def abort(self, choice: int | None = None) -> None:
        """Ends one choice, or all of them (`RequestStream.abort`)."""
        ending = [c for c in self._delivered if choice is None or c == choice]
        for c in ending:
            self._unread.pop(c, None)
            self._end(c)
        if choice is None:
            self._unread.clear()
        self._changed.set()
        if ending:
            await self._table.abort(self, choice)

    def _end(self, choice: int) -> None:
        del self._delivered[choice]
        if not self._delivered:
            self._table.withdraw(self.request_id)


def _after(output: SequenceOutput, have: int) -> SequenceOutput:
    """`output` without the tokens before index `have`."""
    known = have - output.index
    if known == 0:
        return output
    logprobs = output.logprobs[known:] if output.logprobs is not None else None
    return output._replace(index=have, tokens=output.tokens[known:], logprobs=logprobs, cached_tokens=None, prompt_logprobs=None)


def _joined(first: SequenceOutput, then: SequenceOutput) -> SequenceOutput:
    """Two outputs of one choice, `then` going on where `first` ends, as one."""
    asked = first.logprobs is not None or then.logprobs is not None
    return then._replace(
        index=first.index,
        tokens=first.tokens + then.tokens,
        cached_tokens=first.cached_tokens if first.cached_tokens is not None else then.cached_tokens,
        logprobs=(first.logprobs or ()) + (then.logprobs or ()) if asked else None,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else then.prompt_logprobs,
    )
