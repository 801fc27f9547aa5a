"""The sequences that live: in which list each is, what it holds, and how it ends. Pure.

add -> waiting <-> running -> ended            add -> following (its leader's prompt) -> waiting -> arriving -> running
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from .decisions import Decisions, Record
from .disk_tier import DiskTier
from .host_tier import HostTier
from .page_moves import PageMoves
from .page_pool import PagePool
from .protocol import FinishReason, LiveRequest, SequenceOutput
from .sequence import Request, Sequence, State

_ORDER = attrgetter("order")
_NEVER_S = float("inf")
_TOO_LATE = "deadline_ms passed while the request waited for its turn; nothing of it was computed"


@dataclass(slots=True)
class Counters:
    """What the scheduler has done so far; they only grow."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    host_hit_tokens: int = 0
    recomputed_tokens: int = 0
    stall_s: float = 0.0  # that sequences which had begun stood still, each for itself


class Roster:
    """What the scheduler keeps books of; it alone decides who comes and goes.

    Args:
        pool: the pages that sequences hold.
        host_pages: pages of host memory beside it.
        disk_pages: that may lie in files.
    """

    def __init__(self, pool: PagePool, host_pages: int = 0, disk_pages: int = 0) -> None:
        self.pool = pool
        self.moves = PageMoves(pool)
        self.host = HostTier(host_pages, pool, self.moves)
        self.disk = DiskTier(disk_pages, self.moves)
        self.counters = Counters()
        self.decisions = Decisions()
        self.emigrants: dict[str, Record] = {}  # requests that are to migrate, from the decision to their end, or until they stay after all
        self.running: list[Sequence] = []  # in scheduling order
        self.arriving: list[Sequence] = []
        self.waiting: list[Sequence] = []  # in scheduling order
        self.frozen: list[Sequence] = []
        self._lists = {State.RUNNING: self.running, State.ARRIVING: self.arriving, State.WAITING: self.waiting, State.FROZEN: self.frozen}
        self.pins: dict[str, list[int]] = {}  # who has pages held, beside sequences and moves -> those pages
        self._sequences: dict[int, Sequence] = {}
        self._requests: dict[str, Request] = {}
        self._expiring: dict[str, float] = {}  # request of which nothing has started -> its deadline
        self._next_deadline_s = _NEVER_S  # none of them is earlier
        self._forget: list[int] = []  # what the runner knows and need no longer
        self._planned: dict[Sequence, tuple[int, int]] = {}  # sequence -> (start, count) of the step being planned or run
        self._copies: dict[Sequence, tuple[int, int]] = {}  # sequence -> (source, destination) of the same step
        self._ahead: dict[Sequence, tuple[int, int]] = {}  # as `_planned`, of the step behind it, if that has been planned as well
        self._departures = 0  # that have given something back

    # --- what comes and goes ---

    def add(self, request: Request) -> None:
        """Queue the sequences of a request. Those with a leader follow it until its prompt is computed."""
        self._enlist(request)
        for s in request.sequences.values():
            self._sequences[s.seq] = s
            if s.resumed:
                s.cached_tokens = 0  # its client has heard of them
                s.recompute_until = len(s.tokens) - 1
            else:
                self.counters.prompt_tokens += s.prompt_len
            if s.leader is None:
                insort(self.waiting, s, key=_ORDER)
            else:
                s.state = State.FOLLOWING
                s.leader.followers.append(s)

    def _enlist(self, request: Request) -> None:
        """It lives here from now on."""
        self._requests[request.request_id] = request
        if request.deadline_s is not None:
            self._expiring[request.request_id] = request.deadline_s
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_s)
        self.pool.events.started(request.request_id, request.tenant)

    def abort(self, request_id: str, choice: int | None = None) -> list[SequenceOutput]:
        """End a request (or one choice of it); its terminal outputs. Unknown or ended ones give none."""
        request = self._requests.get(request_id)
        live = request.sequences if request else {}
        doomed = list(live.values()) if choice is None else [live[choice]] if choice in live else []
        return [self._end(s, FinishReason.ABORT) for s in doomed]

    def expire(self, now_s: float) -> list[SequenceOutput]:
        """End the requests whose deadline has passed before any of their sequences started; their terminal outputs."""
        if now_s < self._next_deadline_s:
            return []
        late = [self._requests[request_id] for request_id, deadline_s in self._expiring.items() if deadline_s <= now_s]
        outputs = [self._end(s, FinishReason.DEADLINE, _TOO_LATE) for r in late for s in list(r.sequences.values())]
        self._next_deadline_s = min(self._expiring.values(), default=_NEVER_S)
        return outputs

    def has_request(self, request_id: str) -> bool:
        """Whether any sequence of the request is alive."""
        return request_id in self._requests

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no place yet, followers included."""
        return len(self._sequences) - len(self.running) - len(self.arriving) - len(self.frozen)

    def idle(self) -> bool:
        """No sequence is alive."""
        return not self._sequences

    def _end(self, s: Sequence, reason: FinishReason, error: str | None = None) -> SequenceOutput:
        self._leave(s)
        self._drop_kept(s)
        s.state = State.FINISHED
        del self._sequences[s.seq]
        request = self._requests[s.request_id]
        del request.sequences[s.choice]
        request.ended_tokens += s.num_output
        if not request.sequences:
            del self._requests[s.request_id]
            self.emigrants.pop(s.request_id, None)
            self._expiring.pop(s.request_id, None)
            total = request.ended_tokens
            here, moved = total - request.resumed_tokens, reason is FinishReason.MOVED
            self.pool.events.ended(s.request_id, request.tenant, total, here, moved)
        self._release_followers(s)
        return SequenceOutput(s.request_id, s.choice, s.num_output, (), reason, error=error)

    def _start(self, s: Sequence, pages: list[int], hashes: list[bytes], computed: int) -> None:
        """`s` runs from now on, from `pages` that hold its first `computed` tokens."""
        self.pool.retain(pages)
        self._take_place(s, State.RUNNING, self.running)
        self._go_on(s, pages, hashes, computed)

    def _take_place(self, s: Sequence, state: State, among: list[Sequence]) -> None:
        self.waiting.remove(s)
        insort(among, s, key=_ORDER)
        s.state = state
        self._expiring.pop(s.request_id, None)

    def _go_on(self, s: Sequence, pages: list[int], hashes: list[bytes], computed: int) -> None:
        s.pages, s.hashes, s.num_computed = list(pages), list(hashes), computed
        if s.cached_tokens is None:
            s.cached_tokens = computed
            self.counters.prefix_query_tokens += s.prompt_len
            self.counters.prefix_hit_tokens += computed

    def _preempt(self, s: Sequence) -> None:
        self._leave(s)
        s.recompute_until = max(s.recompute_until, s.num_computed)
        s.num_computed = 0
        s.state = State.WAITING
        insort(self.waiting, s, key=_ORDER)
        self._release_followers(s)

    def _leave(self, s: Sequence) -> None:
        """Take `s` out of the list it is in, and give back what it holds."""
        if s.leader is not None and s in s.leader.followers:
            s.leader.followers.remove(s)
        if s.state is not State.FOLLOWING:
            self._lists[s.state].remove(s)
        if s.arrival is not None:
            self.pool.release(s.arrival.shared())
            s.arrival = None
        if s.pages:
            self.pool.release(s.pages)
            s.pages.clear()
            s.hashes.clear()
        if s.known_pages:
            self._forget.append(s.seq)
            s.known_pages = 0
        self._planned.pop(s, None)
        self._ahead.pop(s, None)
        self._copies.pop(s, None)
        self._departures += 1

    def _drop_kept(self, s: Sequence) -> None:
        if s.kept is not None:
            self.host.release(s.kept.pages)
            if s.kept.file:
                self.disk.drop(s.kept.file)
            s.kept = None

    def _release_followers(self, s: Sequence) -> None:
        for follower in s.followers:
            if follower.state is State.FOLLOWING:
                follower.state = State.WAITING
                insort(self.waiting, follower, key=_ORDER)
        s.followers.clear()

    # --- what there is ---

    def live(self) -> list[LiveRequest]:
        """The requests that live, in the order of arrival."""
        return [
            LiveRequest(
                r.request_id,
                r.tenant,
                r.priority,
                "running" if any(s.table for s in r.sequences.values()) else "waiting",
                len(r.sequences),
                r.prompt_tokens,
                r.output_tokens,
                sum(len(s.table) for s in r.sequences.values()),
            )
            for r in self._requests.values()
        ]

    def served_tokens(self) -> dict[str, int]:
        """Output tokens that the requests that live have got here, by tenant."""
        served: dict[str, int] = {}
        for r in self._requests.values():
            served[r.tenant] = served.get(r.tenant, 0) + r.output_tokens - r.resumed_tokens
        return served

    def pending_tokens(self) -> int:
        """Tokens to compute before every sequence is one token from its next output; those of followers are their leaders'."""
        to_go = (len(s.tokens) - _will_have(s) for some in (self.running, self.arriving, self.waiting) for s in some)
        return sum(count for count in to_go if count > 1)

    # --- the books ---

    def check(self) -> None:
        """Count every page and every sequence.

        Raises:
            PoolCorrupt: pages do not add up.
            RuntimeError: a sequence is in the wrong list, or a list out of order.
        """
        sequences = self._sequences.values()
        arrivals = [s.arrival for s in sequences if s.arrival is not None]
        held = [*(s.pages for s in sequences), *(arrival.shared() for arrival in arrivals), *self.moves.held(), *self.pins.values()]
        self.pool.check(held)
        self.host.pages.check([*(s.kept.pages for s in sequences if s.kept is not None), *self.host.held()])
        self.disk.check([s.kept.file for s in sequences if s.kept is not None and s.kept.file])
        listed = 0
        for state in (State.RUNNING, State.ARRIVING, State.WAITING, State.FROZEN):
            some = [s for s in sequences if s.state is state]
            listed += len(some)
            if len(self._lists[state]) != len(some) or any(s.state is not state for s in self._lists[state]):
                raise RuntimeError(f"a sequence that is not {state.name} is listed as such, or one that is is not")
            if state is not State.FROZEN and [s.order for s in self._lists[state]] != sorted(s.order for s in some):
                raise RuntimeError(f"the {state.name} list is out of order")
        following = sum(s.state is State.FOLLOWING for s in sequences)
        if listed + following != len(sequences):
            raise RuntimeError("a sequence is in no list, or in two")
        if any(s.pages for s in (*self.waiting, *self.arriving)):
            raise RuntimeError("a sequence that does not run has pages to run on")


def _will_have(s: Sequence) -> int:
    """Tokens of `s` that need not be computed."""
    return s.arrival.computed if s.arrival is not None else s.kept.computed if s.kept is not None else s.num_computed
