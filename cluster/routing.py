"""The router: what is known of each replica, and which of them takes a request. Pure; times are passed in.

It learns from numbered event frames. A frame that goes on where the last one ended is taken in; one that leaves a gap makes
`resync_point` None, so that the next poll asks for a dump, and until then the pages known before still guide (a wrong guess costs
time, never a wrong answer). Duplicates, and frames of an earlier life of the replica, are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..worker.protocol import EventFrame, ModelInfo, ReplicaLoad
from .ledger import Ledger, Sent
from .messages import AdmitRequest, Route
from .page_index import PageIndex
from .policies import (
    POLICIES,
    Candidate,
    Demand,
    ReplicaSnapshot,
    can_ever,
    has_pages,
    has_seats,
    may_displace,
    predict,
    request_pages,
    snapshot,
)
from .rebalancing import Move

# Until any replica has measured its own.
DEFAULT_TOKENS_PER_S = 2000.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes, what is cached of its prompt there, and when its first token is expected."""

    replica_id: str
    epoch: int
    cached_tokens: int
    predicted_ttft_s: float


@dataclass(slots=True)
class _Replica:
    """One life of a replica. `known` is the number of the next event; None when a dump is needed."""

    replica_id: str
    epoch: int
    info: ModelInfo
    load: ReplicaLoad
    known: int | None = None
    last_choice: int = 0
    shot: ReplicaSnapshot | None = None  # as it stood; None when something but the ledger has changed since


class Router:
    """Owns the page index, the loads and the ledger.

    Args:
        policy: a key of `policies.POLICIES`.
        seed: of the draws that `power_of_two` uses.
    """

    def __init__(self, policy: str, seed: int = 0) -> None:
        self._policy = POLICIES[policy]
        self._seed = seed
        self._choices = 0
        self._replicas: dict[str, _Replica] = {}
        self._index = PageIndex()
        self._ledger = Ledger()
        self._usual_tokens_per_s = DEFAULT_TOKENS_PER_S
        self._largest_tokens = 0
        self._closed: frozenset[str] = frozenset()
        self._spared: frozenset[str] = frozenset()

    # --- replicas ---

    def steer(self, closed: Iterable[str], spared: Iterable[str]) -> None:
        """From now on nothing new goes to `closed`, and to `spared` only what no other replica could ever hold."""
        self._closed, self._spared = frozenset(closed), frozenset(spared)

    def add(self, replica_id: str, epoch: int, info: ModelInfo) -> None:
        """A replica is ready for requests. A later life replaces an earlier one; a known life changes nothing."""
        known = self._replicas.get(replica_id)
        if known is None or known.epoch < epoch:
            self._begin(replica_id, epoch, info)

    def remove(self, replica_id: str, epoch: int) -> None:
        """That life of it takes no requests any more. Of another life, this says nothing."""
        known = self._replicas.get(replica_id)
        if known is not None and known.epoch == epoch:
            del self._replicas[replica_id]
            self._forget(replica_id)

    def resync_point(self, replica_id: str, epoch: int) -> int | None:
        """What to ask the replica's events from; None asks for a dump."""
        known = self._replicas.get(replica_id)
        return known.known if known is not None and known.epoch == epoch else None

    def events(self, frame: EventFrame, now_s: float) -> None:
        """Takes in what a replica reports. A frame of a replica that was never added, or was removed, is ignored."""
        replica = self._replicas.get(frame.replica_id)
        if replica is None or frame.epoch < replica.epoch:
            return
        if frame.epoch > replica.epoch:
            replica = self._begin(frame.replica_id, frame.epoch, replica.info)
        if replica.known is not None and (frame.next < replica.known or (not frame.dump and frame.after < replica.known)):
            return  # a duplicate, or an older frame that was overtaken
        replica.load, replica.shot = frame.load, None
        if frame.dump:
            self._index.forget(frame.replica_id)
        elif frame.after != replica.known:
            replica.known = None
            return
        replica.known = frame.next
        self._index.update(frame.replica_id, frame.stored, frame.removed)
        for live in frame.started:
            self._ledger.settle(frame.replica_id, live.request_id)
        for request_id, _ in frame.ended:
            self._ledger.settle(frame.replica_id, request_id)
        self._ledger.expire(now_s)
        speeds = [r.load.prefill_tokens_per_s for r in self._replicas.values() if r.load.prefill_tokens_per_s > 0]
        self._usual_tokens_per_s = sum(speeds) / len(speeds) if speeds else DEFAULT_TOKENS_PER_S

    def _begin(self, replica_id: str, epoch: int, info: ModelInfo) -> _Replica:
        replica = self._replicas[replica_id] = _Replica(replica_id, epoch, info, _idle(info))
        self._forget(replica_id)
        return replica

    def _forget(self, replica_id: str) -> None:
        """What was known of its life before; the replica itself has come or gone."""
        self._index.forget(replica_id)
        self._ledger.forget(replica_id)
        self._largest_tokens = max((self._look(replica).longest_tokens for replica in self._replicas.values()), default=0)

    # --- requests ---

    def choose(self, request: AdmitRequest, now_s: float) -> Choice | None:
        """Where `request` goes now; None when nobody can take it yet. What is chosen stands in the ledger until it is reported."""
        self._ledger.expire(now_s)
        demand = Demand(request.sequences, request.prompt_tokens, request.longest_tokens, request.priority, self._usual_tokens_per_s)
        fitting = [replica for replica in self.snapshots() if can_ever(replica, demand) and replica.replica_id not in self._closed]
        fitting = [replica for replica in fitting if replica.replica_id not in self._spared] or fitting
        # A replica that failed the request is asked again only if there is no other, not because the others are busy.
        allowed = [replica for replica in fitting if replica.replica_id not in request.avoid] or fitting
        candidates = self._open(allowed, request, demand)
        if not candidates:
            return None
        self._choices += 1
        chosen = self._policy.choose(candidates, demand, _draw(self._seed, self._choices))
        return self._send(request, chosen, demand, now_s)

    def _open(self, replicas: list[ReplicaSnapshot], request: AdmitRequest, demand: Demand) -> list[Candidate]:
        """Those of `replicas` that have room, and for some policies those worth waiting for; if none has, where it may displace."""
        seated = [replica for replica in replicas if has_seats(replica, demand)]
        if not seated and not any(may_displace(replica, demand) for replica in replicas):
            return []  # before the prompt's pages are looked up: a full cluster is asked often
        held = self._index.longest_prefix(request.hashes)
        with_room = [candidate for candidate in _candidates(seated, held) if has_pages(candidate, demand)]
        if not with_room:
            return _candidates((replica for replica in replicas if may_displace(replica, demand)), held)
        if self._policy.waits and len(with_room) < len(replicas):
            found = {candidate.replica.replica_id for candidate in with_room}
            others = _candidates((r for r in replicas if r.replica_id in held and r.replica_id not in found), held)
            with_room += [c for c in others if has_seats(c.replica, demand, c.cached_tokens) and has_pages(c, demand)]
        return with_room

    def _send(self, request: AdmitRequest, chosen: Candidate, demand: Demand, now_s: float) -> Choice:
        replica = chosen.replica
        self._replicas[replica.replica_id].last_choice = self._choices
        choice = Choice(replica.replica_id, replica.epoch, chosen.cached_tokens, predict(chosen, demand).ttft_s)
        self._ledger.enter(
            Sent(
                request.request_id,
                request.attempt,
                replica.replica_id,
                request.sequences,
                request.prompt_tokens - chosen.cached_tokens,
                request_pages(chosen, demand),
                now_s,
            )
        )
        return choice

    def expect(self, move: Move, attempt: int, now_s: float) -> None:
        """A request is on its way from another replica, with what it has."""
        self._ledger.enter(Sent(move.request_id, attempt, move.destination.replica_id, move.sequences, 0, move.pages, now_s))

    def forget(self, request_id: str) -> None:
        """The request will not arrive where it was sent."""
        self._ledger.drop(request_id)

    def largest_tokens(self) -> int:
        """Tokens that the largest replica can ever hold for one sequence; 0 without a replica."""
        return self._largest_tokens

    def snapshots(self) -> tuple[ReplicaSnapshot, ...]:
        """Every replica as it is known now, in the order of first appearance."""
        return tuple(self._look(replica) for replica in self._replicas.values())

    def _look(self, replica: _Replica) -> ReplicaSnapshot:
        name = replica.replica_id
        sent = self._ledger.of(name)  # another object whenever it has changed
        if replica.shot is None or replica.shot.sent is not sent:
            known = replica.info, replica.load, sent, self._index.count(name), replica.last_choice
            replica.shot = snapshot(Route(name, replica.epoch), *known)
        return replica.shot


def _candidates(replicas: Iterable[ReplicaSnapshot], held: dict[str, int]) -> list[Candidate]:
    return [Candidate(replica, held.get(replica.replica_id, 0) * replica.info.page_size) for replica in replicas]


def _idle(info: ModelInfo) -> ReplicaLoad:
    """The load of a replica that has reported none yet."""
    pages = info.pool_tokens // info.page_size
    return ReplicaLoad(0, 0, pages, pages, 0, 0, 0, 0, 0, -(2**31), 0.0, 0.0, 0)


def _draw(seed: int, count: int) -> int:
    """64 random bits, the `count`-th of the stream of `seed` (splitmix64)."""
    z = (seed + count * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
