"""Frames in, outputs for each request out: what an ingress knows of its running requests and of the frame streams that feed them. Pure.

Frames are the only source of outputs, and every one is checked: its connection, its number in the connection, its owner (replica and
epoch). The journal of the request that an output belongs to checks the rest. Hence duplicates are dropped, nothing is skipped, and a
stale owner cannot emit.
"""

from __future__ import annotations

from ..worker.protocol import EngineStats, ReplicaLost, unpack_frame
from .commands import Abort, Ask, Command
from .journal import Journal
from .succession import Owner

ABORT_AGAIN_S = 1.0  # outputs that are under way when an abort goes out are no reason for another


class _Connection:
    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.next_frame = 0
        self.gap = False


class StreamTable:
    """The requests of one ingress that have not ended, and its open frame streams. Times are seconds, monotonic."""

    def __init__(self) -> None:
        self._journals: dict[str, Journal] = {}
        self._connections: dict[str, _Connection] = {}
        self._heard_s: dict[str, float] = {}
        self._stats: dict[str, EngineStats] = {}
        self._aborted_s: dict[Abort, float] = {}
        self._trial: Journal | None = None
        self._held: dict[str, Ask] = {}

    def open(self, journal: Journal) -> None:
        """A request that begins.

        Raises:
            ValueError: the request's id is in use.
        """
        if journal.request_id in self._journals:
            raise ValueError(f"request id {journal.request_id} is in use")
        self._journals[journal.request_id] = journal

    def journal(self, request_id: str) -> Journal | None:
        """A request that has not ended."""
        return self._journals.get(request_id)

    def forget_ended(self, request_id: str) -> None:
        """Forgets a request, if it has ended."""
        journal = self._journals.get(request_id)
        if journal is not None and journal.over:
            del self._journals[request_id]

    def connect(self, connection: str, owner: Owner) -> None:
        """A frame stream of `owner` is opened: its frames count from 0."""
        self._connections[connection] = _Connection(owner)

    def feed(self, connection: str, data: bytes, now_s: float) -> list[Command]:
        """Takes one frame.

        Raises:
            ReplicaLost: frames are missing before this one; the caller must `drop` the connection.
        """
        frame = unpack_frame(data)
        known = self._connections.get(connection)
        if known is None or known.owner != (frame.replica_id, frame.epoch) or frame.number < known.next_frame:
            return []
        if frame.number > known.next_frame:
            known.gap = True
            raise ReplicaLost(f"{frame.replica_id}: frame {frame.number} came where {known.next_frame} was due")
        known.next_frame += 1
        self._heard_s[frame.replica_id] = now_s
        if frame.stats is not None:
            self._stats[frame.replica_id] = frame.stats
        commands: list[Command] = []
        for output in frame.outputs:
            journal = self._journals.get(output.request_id)
            if journal is not None:
                commands += journal.take(known.owner, output, now_s)
                self.forget_ended(output.request_id)
            elif output.finish is None:  # computed for nobody
                commands.append(Abort(known.owner, output.request_id, output.attempt, None))
        return [c for c in commands if not isinstance(c, Abort) or self._is_due(c, now_s)]

    def drop(self, connection: str, reason: str, now_s: float, died: bool = True) -> list[Command]:
        """The frame stream has ended: what its owner was running must go on elsewhere.

        Args:
            died: the owner has, as far as can be known. It has not if frames are missing, or none ever came.
        """
        known = self._connections.pop(connection, None)
        if known is None:
            return []
        died = died and known.next_frame > 0 and not known.gap
        self._stats.pop(known.owner.replica_id, None)
        commands: list[Command] = []
        for journal in list(self._journals.values()):
            commands += journal.lost(known.owner, reason, now_s, died)
            self.forget_ended(journal.request_id)
        return commands

    def overdue(self, now_s: float) -> list[Command]:
        """To be asked now and then: what to do about requests that have migrated to where nothing is heard of them."""
        return [command for journal in list(self._journals.values()) for command in journal.overdue(now_s)]

    # --- requests that may be what replicas die of ---

    def may_ask(self, ask: Ask) -> bool:
        """Whether this question may be put now. Those on trial go one at a time, so that the one that kills replicas is found out, and
        takes no other along for the last time that it can bear; what is held, `released` gives back.
        """
        journal = self._journals.get(ask.request.request_id)
        if journal is None or not journal.on_trial or journal is self._trial:
            return True
        if self._trial is not None and self._trial.on_trial:
            self._held[journal.request_id] = ask
            return False
        self._trial = journal
        return True

    def released(self) -> list[Command]:
        """The next question that was held, when the trial before it is over."""
        if self._trial is None or self._trial.on_trial:
            return []
        self._trial = None
        while self._held:
            ask = self._held.pop(next(iter(self._held)))
            if ask.request.request_id in self._journals:
                return [ask]
        return []

    # --- what is known ---

    def stats(self) -> dict[str, EngineStats]:
        """Replica id -> what its latest heartbeat said."""
        return dict(self._stats)

    def silent_s(self, now_s: float, replica_id: str | None = None) -> float:
        """Seconds since the replica's last frame (None: of the one that was heard from last); inf when there was none."""
        heard = self._heard_s.values() if replica_id is None else [s for r, s in self._heard_s.items() if r == replica_id]
        return now_s - max(heard, default=float("-inf"))

    def live(self) -> list[Journal]:
        """The requests that have not ended."""
        return [journal for journal in self._journals.values() if not journal.over]

    def _is_due(self, abort: Abort, now_s: float) -> bool:
        if now_s - self._aborted_s.get(abort, float("-inf")) < ABORT_AGAIN_S:
            return False
        self._aborted_s = {a: s for a, s in self._aborted_s.items() if now_s - s < ABORT_AGAIN_S}
        self._aborted_s[abort] = now_s
        return True
