"""One request of an ingress, from its arrival to its end: what its client already has, who computes it, what is to be done next. Pure.

    ASKING ---route---> SENDING ---taken, or a first output---> RUNNING ---every choice has ended---> OVER
      ^                    | refused                               | the owner is lost
      +--------------------+---------------------------------------+

Each way back to ASKING is a later attempt. The journal (prompt and delivered tokens) goes with it, so that the next owner starts where
the last one was heard from, and the client sees a pause. Whatever a former owner, or this one on an earlier attempt, still says is
answered with an abort. A migration is no such loss: within one attempt the stream follows it from owner to owner (`succession`), and
its reader does not notice. Every input returns commands; whoever feeds the journal carries them out and feeds back what came of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto

from ..worker.protocol import (
    BadRequest,
    DeadlineExceeded,
    FinishReason,
    GenerateRequest,
    Overloaded,
    QuireError,
    ReplicaLost,
    RequestFailed,
    SequenceOutput,
)
from .commands import Abort, Ask, Command, Lost, Resumed, Submit, Withdraw
from .messages import AdmitRequest, Route
from .succession import Owner, Succession


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, or how often, until a request is given up.

    Attributes:
        controller_s: seconds without an answer of the controller.
        queue_s: seconds in the queue, for a request that nothing was lost of.
        resume_s: seconds from a loss, or from a route that was stale, until a replica goes on with it.
        refusals: times that replicas may be too full for what was routed to them, for a request that nothing was lost of.
        deaths: replicas that may die under it without one new token in between.
        heir_s: seconds after an owner has handed it over until the heir is heard of.
    """

    controller_s: float = 60.0
    queue_s: float = 600.0
    resume_s: float = 120.0
    refusals: int = 8
    deaths: int = 3
    heir_s: float = 10.0


FIRST_DELAY_S, LONGEST_DELAY_S = 0.05, 1.0  # before asking again after a refusal


class _State(Enum):
    ASKING = auto()
    SENDING = auto()
    RUNNING = auto()
    OVER = auto()


class Journal:
    """One request. Times are seconds on one monotonic clock.

    Args:
        request: checked by the door, with its seed fixed.
        room: prompt length -> output tokens at most, when the request does not say.
        hashes: page hashes of its first prompt.
        now_s: when it arrived.

    `unread` holds what its reader has not taken yet, one joined output for each choice, oldest first. `on_change` is called whenever
    there is more to read, or an end. `failure` is what the reader gets after that; None when every choice has ended.
    """

    def __init__(
        self, request: GenerateRequest, room: Callable[[int], int], hashes: tuple[bytes, ...], now_s: float, patience: Patience
    ) -> None:
        self.request_id = request.request_id
        self.attempt = 0
        self.owner: Owner | None = None
        self.unread: dict[int, SequenceOutput] = {}
        self.failure: QuireError | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.deaths = 0  # of owners, since the last new token
        self.waited_s: float | None = None  # until there was a first place for it
        self._request = request
        self._room = room
        self._hashes = hashes
        self._patience = patience
        self._arrived_s = now_s
        self._state = _State.ASKING
        self._live: dict[int, list[int]] = {choice: [] for choice in request.choices}  # choice that goes on -> delivered tokens
        self._begun: set[int] = set()  # choices with a first output
        self._refusals = 0
        self._avoid: tuple[str, ...] = ()
        self._suspect: Owner | None = None  # has not said whether it took the request
        self._sent_to: Owner | None = None  # this attempt
        self._succession = Succession()
        self._handed_over_s = 0.0  # when it got the owner that it has, if from another one
        self._gone: dict[Owner, tuple[str, bool]] = {}  # who was lost during this attempt without being its owner, and how
        self._lost_s: float | None = None  # since when the stream stands still
        self._stuck_s: float | None = None  # since when replicas refuse it, or are lost
        self._silent_s: float | None = None  # since when the controller does not answer

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self._state is _State.OVER

    @property
    def on_trial(self) -> bool:
        """One more death, and it is given up."""
        return not self.over and 0 < self._patience.deaths - 1 <= self.deaths

    def start(self, now_s: float) -> list[Command]:
        """The first question."""
        return [self._ask(now_s)]

    # --- what the controller says ---

    def routed(self, attempt: int, route: Route, now_s: float) -> list[Command]:
        """The answer is a place."""
        if self._state is not _State.ASKING or attempt != self.attempt:
            return self._unwanted()
        self._silent_s = None
        left_ms = self._left_ms(now_s)
        if left_ms is not None and left_ms <= 0:
            return [*self._fail(DeadlineExceeded("the deadline passed before the request had its turn")), Withdraw(self.request_id)]
        if self.waited_s is None:
            self.waited_s = now_s - self._arrived_s
        self.owner = self._sent_to = Owner(*route)
        self._state = _State.SENDING
        return [Submit(self.owner, self._for_replica(left_ms))]

    def queued(self, attempt: int, now_s: float) -> list[Command]:
        """The answer is: wait."""
        if self._state is not _State.ASKING or attempt != self.attempt:
            return self._unwanted()
        self._silent_s = None
        since_s, limit_s = (self._arrived_s, self._patience.queue_s) if self._lost_s is None else (self._lost_s, self._patience.resume_s)
        if now_s - since_s > limit_s:
            return [*self._fail(ReplicaLost(f"no replica has had room for it for {limit_s:g} s")), Withdraw(self.request_id)]
        return [self._ask(now_s)]

    def refused(self, attempt: int, error: QuireError, now_s: float) -> list[Command]:
        """The answer is no. A stream that has begun waits for its turn even so."""
        if self._state is not _State.ASKING or attempt != self.attempt:
            return []
        self._silent_s = None
        if isinstance(error, Overloaded) and self._lost_s is not None and now_s - self._lost_s <= self._patience.resume_s:
            return [self._ask(now_s, min(error.retry_after_s, LONGEST_DELAY_S))]
        return self._fail(error)

    def unanswered(self, attempt: int, reason: str, now_s: float) -> list[Command]:
        """There is no answer."""
        if self._state is not _State.ASKING or attempt != self.attempt:
            return self._unwanted()
        if self._silent_s is None:
            self._silent_s = now_s
        if now_s - self._silent_s > self._patience.controller_s:
            return [*self._fail(ReplicaLost(f"the controller does not answer: {reason}")), Withdraw(self.request_id)]
        return [self._ask(now_s, LONGEST_DELAY_S)]

    # --- what a replica says ---

    def taken(self, owner: Owner, attempt: int) -> list[Command]:
        """The replica has taken the request."""
        if self._has_moved_on(owner, attempt):
            return []
        if not self._is_current(owner, attempt):
            return [Abort(owner, self.request_id, attempt, None)]
        self._state = _State.RUNNING
        return []

    def turned_away(self, owner: Owner, attempt: int, error: QuireError, now_s: float) -> list[Command]:
        """The replica has refused the request, or nobody knows (ReplicaLost)."""
        if self._has_moved_on(owner, attempt):
            return []
        commands: list[Command] = [Abort(owner, self.request_id, attempt, None)] if isinstance(error, ReplicaLost) else []
        if not self._is_current(owner, attempt):
            return commands
        if self._state is _State.RUNNING:
            return []  # its outputs were quicker
        self._refusals += 1
        if isinstance(error, ReplicaLost):
            self._suspect = owner
        if self._stuck_s is None:
            self._stuck_s = now_s
        too_often = isinstance(error, Overloaded) and self._lost_s is None and self._refusals > self._patience.refusals
        if isinstance(error, BadRequest) or too_often:
            return [*commands, *self._fail(error), Withdraw(self.request_id)]
        delay_s = min(FIRST_DELAY_S * 2 ** min(self._refusals - 1, 10), LONGEST_DELAY_S)
        return [*commands, *self._again(now_s, delay_s)]

    def lost(self, owner: Owner, reason: str, now_s: float, died: bool = True) -> list[Command]:
        """The replica has died, or only the way to it. If it died before it said whether it took the request, that may be why."""
        runs = self._state in (_State.SENDING, _State.RUNNING)
        if runs and owner != self.owner:
            self._gone[owner] = reason, died  # it may turn out to be an heir
        if self.over or owner not in (self._suspect, self.owner if runs else None):
            return []
        self._suspect = None
        noted = Lost(self.request_id, owner, reason)
        self.deaths += died
        if self.deaths >= self._patience.deaths:
            elsewhere = [Abort(o, self.request_id, self.attempt, None) for o in self._holders() if o != owner]
            what = f"{self.deaths} replicas in a row were lost while they ran this request; the last one: {reason}"
            return [noted, *elsewhere, *self._fail(RequestFailed(what)), Withdraw(self.request_id)]
        if owner != self.owner:
            return [noted]
        if self._lost_s is None:
            self._lost_s = now_s
        if self._stuck_s is None:
            self._stuck_s = now_s
        heirs = [Abort(heir, self.request_id, self.attempt, None) for heir in self._succession.heirs() if heir != owner]
        return [noted, *heirs, *self._again(now_s, 0.0)]

    def take(self, owner: Owner, output: SequenceOutput, now_s: float) -> list[Command]:
        """What one choice has gained. Tokens that were delivered before are cut off; a gap means that the owner is lost."""
        if self._state not in (_State.SENDING, _State.RUNNING) or output.attempt != self.attempt:
            return self._stale(owner, output, None)
        commands: list[Command] = []
        if owner == self.owner:
            if self._succession.heeds(output):
                commands = self._take(owner, output, now_s)
        elif not self._succession.park(owner, output):
            return self._stale(owner, output, None)
        else:
            self._gone.pop(owner, None)  # or its frames have begun again since
        if self._succession.full:
            return self._give_way("nothing is heard of the owner while its heir goes on and on", now_s)
        return [*commands, *self._hand_over(now_s)]

    def overdue(self, now_s: float) -> list[Command]:
        """To be asked now and then: an heir that is never heard of is lost."""
        if self._state is not _State.RUNNING or not self._succession.awaits or now_s - self._handed_over_s <= self._patience.heir_s:
            return []
        return self._give_way("the replica that it has migrated to is not heard of", now_s)

    def _take(self, owner: Owner, output: SequenceOutput, now_s: float) -> list[Command]:
        """The word of the owner."""
        lost_track = output.finish is FinishReason.ABORT or (output.finish is FinishReason.MOVED and output.peer is None)
        if lost_track and output.choice in self._live:
            return self.lost(owner, f"{owner.replica_id} gave it up", now_s, died=False)
        have = self._live.get(output.choice)
        if have is None:
            return self._stale(owner, output, output.choice)
        if output.index > len(have):
            return self._give_way(
                f"{owner.replica_id}: token {output.index} of choice {output.choice} came where {len(have)} was due", now_s
            )
        self._state = _State.RUNNING
        if output.peer is not None:
            if output.finish is FinishReason.MOVED:
                self._succession.hand(output.choice, Owner(*output.peer))
            output = output._replace(finish=None, peer=None)
            if not output.tokens:
                return []
        if output.finish is FinishReason.DEADLINE and not self._begun:
            late = DeadlineExceeded("the deadline passed before the request had its turn")
            return [Abort(owner, self.request_id, self.attempt, None), *self._fail(late)]
        return self._deliver(owner, output, have, now_s)

    def _hand_over(self, now_s: float) -> list[Command]:
        """Whoever's turn has come is the owner from now on."""
        commands: list[Command] = []
        while self._state in (_State.SENDING, _State.RUNNING) and self.owner is not None:
            heir = self._succession.next(self.owner, self._live)
            if heir is None:
                break
            self.owner, attempt, self._handed_over_s = heir.owner, self.attempt, now_s
            self._state = _State.RUNNING
            for output in heir.parked:
                if self._is_current(heir.owner, attempt):
                    commands += self._take(heir.owner, output, now_s)
        if self.owner in self._gone and not self.over:
            reason, died = self._gone[self.owner]
            commands += self.lost(self.owner, reason, now_s, died)
        return commands

    def _give_way(self, reason: str, now_s: float) -> list[Command]:
        """The stream has a gap that will not be filled: the owner is to stop."""
        if self.owner is None:
            return []
        return [Abort(self.owner, self.request_id, self.attempt, None), *self.lost(self.owner, reason, now_s, died=False)]

    # --- what the reader does ---

    def abort(self, choice: int | None) -> list[Command]:
        """The reader gives up one choice, or all that are left."""
        ending = [c for c in self._live if choice is None or c == choice]
        for c in ending:
            self.unread.pop(c, None)
            del self._live[c]
        if choice is None:
            self.unread.clear()
        if not ending:
            return []
        holders = self._holders()
        if not self._live:
            self._state = _State.OVER
        self.on_change()
        if holders:
            return [Abort(holder, self.request_id, self.attempt, choice if self._live else None) for holder in holders]
        return [] if self._live else [Withdraw(self.request_id)]

    def give_up(self, error: QuireError) -> list[Command]:
        """Ends the request with an error, whatever it does."""
        commands = self.abort(None)
        self.failure = error
        return commands

    # --- inside ---

    def _is_current(self, owner: Owner, attempt: int) -> bool:
        return self._state in (_State.SENDING, _State.RUNNING) and owner == self.owner and attempt == self.attempt

    def _has_moved_on(self, owner: Owner, attempt: int) -> bool:
        """Whether `owner` was sent this attempt, and somebody else goes on with it already."""
        return self._state is _State.RUNNING and attempt == self.attempt and owner == self._sent_to != self.owner

    def _holders(self) -> tuple[Owner, ...]:
        """Whoever computes this attempt, or may."""
        if self.owner is None or self._state not in (_State.SENDING, _State.RUNNING):
            return ()
        return tuple(dict.fromkeys([self.owner, *self._succession.heirs()]))

    def _unwanted(self) -> list[Command]:
        """An answer to a question that is asked no more: the controller must not go on counting with the request."""
        return [Withdraw(self.request_id)] if self.over else []

    def _stale(self, owner: Owner, output: SequenceOutput, choice: int | None) -> list[Command]:
        """Somebody computes what nobody wants."""
        return [] if output.finish is not None else [Abort(owner, self.request_id, output.attempt, choice)]

    def _deliver(self, owner: Owner, output: SequenceOutput, have: list[int], now_s: float) -> list[Command]:
        fresh = _after(output, len(have))
        if output.choice in self._begun:
            fresh = fresh._replace(cached_tokens=None, prompt_logprobs=None)
        if not fresh.tokens and output.tokens and fresh.finish is None:
            return []
        unread = self.unread.get(output.choice)
        self.unread[output.choice] = fresh if unread is None else _joined(unread, fresh)
        self._begun.add(output.choice)
        commands: list[Command] = []
        if fresh.tokens or fresh.finish is not None:
            if self._lost_s is not None:
                commands.append(Resumed(self.request_id, owner, now_s - self._lost_s, self._known_tokens()))
            self._lost_s = self._stuck_s = self._suspect = None
            self._refusals = self.deaths = 0
            self._avoid = ()
        have.extend(fresh.tokens)
        if fresh.finish is not None:
            del self._live[output.choice]
            if not self._live:
                self._state = _State.OVER
        self.on_change()
        return commands

    def _again(self, now_s: float, delay_s: float) -> list[Command]:
        if self.owner is not None and self.owner.replica_id not in self._avoid:
            self._avoid = (*self._avoid, self.owner.replica_id)
        self.owner = None
        self._succession = Succession()
        self._gone.clear()
        self._state = _State.ASKING
        self.attempt += 1
        if self._stuck_s is not None and now_s - self._stuck_s > self._patience.resume_s:
            gone = ReplicaLost(f"no replica has taken it for {self._patience.resume_s:g} s")
            return [*self._fail(gone), Withdraw(self.request_id)]
        return [self._ask(now_s, delay_s)]

    def _fail(self, error: QuireError) -> list[Command]:
        self._state = _State.OVER
        self._live.clear()
        self.failure = error
        self.on_change()
        return []

    def _ask(self, now_s: float, delay_s: float = 0.0) -> Ask:
        request, n = self._request, self._request.params.n
        most = {c: request.params.max_tokens or self._room(len(request.prompts[c // n])) for c in self._live}
        left_ms = self._left_ms(now_s)
        asked = AdmitRequest(
            self.request_id,
            self.attempt,
            request.tenant,
            request.priority,
            waited_s=now_s - self._arrived_s,
            deadline_s=None if left_ms is None else left_ms / 1000,
            sequences=len(self._live),
            prompt_tokens=self._known_tokens(),
            max_tokens=sum(most[c] - len(tokens) for c, tokens in self._live.items()),
            longest_tokens=max(len(request.prompts[c // n]) + most[c] for c in self._live),
            hashes=self._hashes,
            resumed=self._lost_s is not None,
            avoid=self._avoid,
        )
        return Ask(asked, delay_s)

    def _for_replica(self, left_ms: int | None) -> GenerateRequest:
        params = self._request.params
        if params.prompt_logprobs is not None and self._begun.issuperset(self._live):
            params = replace(params, prompt_logprobs=None)
        resume = {choice: tuple(tokens) for choice, tokens in self._live.items()} if self._begun else None
        return replace(self._request, params=params, deadline_ms=left_ms, resume=resume, attempt=self.attempt)

    def _left_ms(self, now_s: float) -> int | None:
        """What is left of the deadline; it ends with the first output."""
        if self._request.deadline_ms is None or self._begun:
            return None
        return self._request.deadline_ms - int((now_s - self._arrived_s) * 1000)

    def _known_tokens(self) -> int:
        """Prompt and output tokens, each prompt once, that a replica needs to go on."""
        prompts = {choice // self._request.params.n for choice in self._live}
        return sum(len(self._request.prompts[p]) for p in prompts) + sum(map(len, self._live.values()))


def _after(output: SequenceOutput, have: int) -> SequenceOutput:
    """`output` without the tokens before index `have`."""
    known = have - output.index
    if known == 0:
        return output
    logprobs = output.logprobs[known:] if output.logprobs is not None else None
    return output._replace(index=have, tokens=output.tokens[known:], logprobs=logprobs)


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
