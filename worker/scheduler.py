"""The step scheduler: which tokens of which sequences are computed next, and what their results mean. Pure.

`plan()` says what one step computes, `apply(result)` takes in what came of it; between the two nothing else may be called.

Every running sequence has `num_tokens - num_computed >= 1` tokens to go. One step serves, under `max_batch_tokens`:

    1. sequences with one token to go (decode), in scheduling order: a long prompt never stalls their streams
    2. sequences with more to go (prefill chunks), in scheduling order
    3. waiting sequences, in scheduling order, each only if the pool holds all its known tokens beside what 1 and 2 still need

Scheduling order is priority, then arrival. When 1 or 2 find no page, `pressure.relieve` names who gives way: from the end
of the order, even if already planned in this step. The head of the order is therefore never starved.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from .page_pool import PagePool
from .plan import NewSequence, Row, Sampled, StepPlan, StepResult
from .pressure import Action, relieve
from .protocol import FinishReason, LiveRequest, SequenceOutput, TokenLogprob
from .sequence import Request, Sequence, State

_ORDER = attrgetter("order")


@dataclass(slots=True)
class Counters:
    """What the scheduler has done so far; they only grow."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: dict[str, int] = field(default_factory=lambda: {action.value: 0 for action in Action})


class Scheduler:
    """Continuous batching over one page pool.

    Args:
        pool: the pages.
        max_batch_tokens: tokens computed in one step.
        max_running: sequences that run at once; at most `max_batch_tokens`, so that every decode fits in a step.
        eos_token_ids: tokens that end a sequence unless it ignores them.
    """

    def __init__(self, pool: PagePool, max_batch_tokens: int, max_running: int, eos_token_ids: Iterable[int] = ()) -> None:
        if not 1 <= max_running <= max_batch_tokens:
            raise ValueError(f"max_running must be in [1, max_batch_tokens = {max_batch_tokens}], not {max_running}")
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.eos_token_ids = frozenset(eos_token_ids)
        self.counters = Counters()
        self.running: list[Sequence] = []  # in scheduling order
        self.waiting: list[Sequence] = []  # in scheduling order
        self._sequences: dict[int, Sequence] = {}
        self._requests: dict[str, Request] = {}
        self._forget: list[int] = []
        self._planned: dict[Sequence, tuple[int, int]] = {}  # sequence -> (start, count) of the step being planned or run
        self._copies: dict[Sequence, tuple[int, int]] = {}

    # --- what comes and goes ---

    def add(self, request: Request) -> None:
        """Queue the sequences of a request. Those with a leader follow it until its prompt is computed."""
        self._requests[request.request_id] = request
        self.pool.events.started(request.request_id, request.tenant)
        for s in request.sequences.values():
            self._sequences[s.seq] = s
            self.counters.prompt_tokens += s.prompt_len
            if s.leader is None:
                insort(self.waiting, s, key=_ORDER)
            else:
                s.state = State.FOLLOWING
                s.leader.followers.append(s)

    def abort(self, request_id: str, choice: int | None = None) -> list[SequenceOutput]:
        """End a request (or one choice of it); its terminal outputs. Unknown or ended ones give none."""
        request = self._requests.get(request_id)
        live = request.sequences if request else {}
        doomed = list(live.values()) if choice is None else [live[choice]] if choice in live else []
        return [self._end(s, FinishReason.ABORT) for s in doomed]

    def has_request(self, request_id: str) -> bool:
        """Whether any sequence of the request is alive."""
        return request_id in self._requests

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no place in a step yet, followers included."""
        return len(self._sequences) - len(self.running)

    def idle(self) -> bool:
        """No sequence is alive."""
        return not self._sequences

    def _end(self, s: Sequence, reason: FinishReason, error: str | None = None) -> SequenceOutput:
        self._leave(s)
        s.state = State.FINISHED
        del self._sequences[s.seq]
        request = self._requests[s.request_id]
        del request.sequences[s.choice]
        request.ended_tokens += s.num_output
        if not request.sequences:
            del self._requests[s.request_id]
            total = request.ended_tokens
            self.pool.events.ended(s.request_id, request.tenant, total, total - request.resumed_tokens)
        self._release_followers(s)
        return SequenceOutput(s.request_id, s.choice, s.num_output, (), reason, error=error)

    def _leave(self, s: Sequence) -> None:
        """Take `s` out of the list it is in, and give back what it holds."""
        if s.state is State.FOLLOWING and s.leader is not None:
            s.leader.followers.remove(s)
        else:
            (self.running if s.state is State.RUNNING else self.waiting).remove(s)
        if s.pages:
            self.pool.release(s.pages)
            s.pages.clear()
            s.hashes.clear()
        if s.known_pages:
            self._forget.append(s.seq)
            s.known_pages = 0
        self._planned.pop(s, None)
        self._copies.pop(s, None)

    def _release_followers(self, s: Sequence) -> None:
        for follower in s.followers:
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
                "running" if any(s.state is State.RUNNING for s in r.sequences.values()) else "waiting",
                len(r.sequences),
                r.prompt_tokens,
                r.output_tokens,
                sum(len(s.pages) for s in r.sequences.values()),
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
        to_go = (len(s.tokens) - s.num_computed for some in (self.running, self.waiting) for s in some)
        return sum(count for count in to_go if count > 1)

    # --- planning a step ---

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute."""
        self._planned.clear()
        self._copies.clear()
        preempted = False
        # Decodes first, then chunks: `running` may shrink at its end while it is served, hence the copies.
        for decode in (True, False):
            for s in [s for s in self.running if (len(s.tokens) - s.num_computed == 1) == decode]:
                if s.state is State.RUNNING:
                    preempted |= self._serve(s)
        if not preempted:
            self._admit()
        return self._step_plan() if self._planned else None

    def _budget(self) -> int:
        return self.max_batch_tokens - sum(count for _, count in self._planned.values())

    def _serve(self, s: Sequence) -> bool:
        """Plan the next tokens of a running sequence; whether somebody (perhaps `s` itself) had to give way for it."""
        count = len(s.tokens) - s.num_computed
        if count > 1:
            count = min(count, self._budget())
            if count < 1:
                return False
        preempted = False
        while not self._hold_pages(s, s.num_computed + count):
            decision = relieve(self.running)
            self._preempt(decision.victim, decision.action)
            preempted = True
            if decision.victim is s:
                return True
        self._planned[s] = (s.num_computed, count)
        return preempted

    def _hold_pages(self, s: Sequence, end: int) -> bool:
        """Make the block table of `s` cover `end` tokens, with a page of its own to write first into; False: not now."""
        size = self.pool.page_size
        first = s.num_computed // size
        shared = first < len(s.pages) and not self.pool.writable(s.pages[first])
        missing = self.pool.pages_for(end) - len(s.pages)
        if missing <= 0 and not shared:
            return True
        pages = self.pool.allocate(max(missing, 0) + shared)
        if pages is None:
            return False
        if shared:
            source, s.pages[first] = s.pages[first], pages.pop()
            self._copies[s] = (source, s.pages[first])
            self.pool.release([source])
            if s.known_pages > first:  # the runner's block table names the old page: it learns the sequence anew
                self._forget.append(s.seq)
                s.known_pages = 0
        s.pages += pages
        return True

    def _preempt(self, s: Sequence, action: Action) -> None:
        self.counters.preemptions[action.value] += 1
        self._leave(s)
        s.recompute_until = max(s.recompute_until, s.num_computed)
        s.num_computed = 0
        s.state = State.WAITING
        insort(self.waiting, s, key=_ORDER)
        self._release_followers(s)

    # --- admission ---

    def _admit(self) -> None:
        """Start waiting sequences from the head of the queue, as long as places, tokens and pages last."""
        if not self.waiting or len(self.running) >= self.max_running:
            return
        budget = self._budget()
        promised = sum(self._missing(s) for s in self.running)
        growing = sum(self._may_grow(s) for s in self.running)
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            s = self.waiting[0]
            pages, hashes, computed = self._shareable(s)
            shared_tail = computed % self.pool.page_size != 0
            fresh = self.pool.pages_for(len(s.tokens)) - len(pages) + shared_tail
            # Room to grow, so that an admission is not paid for with a preemption a few steps later. None is asked for
            # by a sequence that would run alone: whatever the door let in fits then.
            headroom = growing // 4
            if self.pool.available - self.pool.cached_among(pages) - promised - headroom < fresh:
                return
            self._start(s, pages, hashes, computed)
            count = min(len(s.tokens) - computed, budget)
            if not self._hold_pages(s, computed + count):
                raise RuntimeError(f"admission counted pages for sequence {s.seq} that the pool does not have")
            self._planned[s] = (computed, count)
            budget -= count
            promised += self._missing(s)
            growing += self._may_grow(s)

    def _may_grow(self, s: Sequence) -> bool:
        return self.pool.pages_for(s.prompt_len + s.max_tokens) > len(s.pages)

    def _missing(self, s: Sequence) -> int:
        return max(self.pool.pages_for(len(s.tokens)) - len(s.pages), 0)

    def _shareable(self, s: Sequence) -> tuple[list[int], list[bytes], int]:
        """Pages that `s` can start from, their hashes, and how many tokens they hold: its leader's, or the cache's.

        At least one token is left to compute, for the logits that the first output token is drawn from.
        """
        leader, size = s.leader, self.pool.page_size
        if leader is not None and leader.state is State.RUNNING and not s.num_output and leader.num_computed >= s.prompt_len:
            computed = s.prompt_len - 1
            pages = leader.pages[: self.pool.pages_for(computed)]
            return pages, leader.hashes[: computed // size], computed
        if s.params.prompt_logprobs is not None and not s.num_output:
            return [], [], 0
        pages, hashes = self.pool.find(s.root, s.tokens, (len(s.tokens) - 1) // size)
        return pages, hashes, len(pages) * size

    def _start(self, s: Sequence, pages: list[int], hashes: list[bytes], computed: int) -> None:
        self.pool.retain(pages)
        self.waiting.pop(0)
        insort(self.running, s, key=_ORDER)
        s.state = State.RUNNING
        s.pages, s.hashes, s.num_computed = list(pages), list(hashes), computed
        if s.cached_tokens is None:
            s.cached_tokens = computed
            self.counters.prefix_query_tokens += s.prompt_len
            self.counters.prefix_hit_tokens += computed

    def _step_plan(self) -> StepPlan:
        rows: list[Row] = []
        new: list[NewSequence] = []
        gained: list[tuple[int, tuple[int, ...]]] = []
        for s, (start, count) in self._planned.items():
            rows.append(Row(s.seq, start, count, start + count == len(s.tokens)))
            known, have = s.known_pages, len(s.pages)
            if known == 0:
                new.append(NewSequence(s.seq, tuple(s.tokens), s.prompt_len, tuple(s.pages), s.params, s.seed))
            elif known < have:
                gained.append((s.seq, tuple(s.pages[known:])))
            s.known_pages = have
        forget, self._forget = tuple(self._forget), []
        return StepPlan(self.counters.steps, tuple(rows), tuple(new), tuple(gained), tuple(self._copies.values()), forget)

    # --- taking in what a step produced ---

    def apply(self, result: StepResult) -> list[SequenceOutput]:
        """Advance the planned sequences by `result`; what each gained, in the order of the plan's rows."""
        self.counters.steps += 1
        size = self.pool.page_size
        outputs: list[SequenceOutput] = []
        sampled = iter(result.sampled)
        prompt_logprobs = dict(result.prompt_logprobs)
        planned, self._planned = self._planned, {}
        for s, (start, count) in planned.items():
            end = start + count
            if start < s.recompute_until:
                self.counters.recomputed_tokens += min(end, s.recompute_until) - start
            s.num_computed = end
            answer = None
            if end == len(s.tokens):
                answer = next(sampled)
                if answer.seq != s.seq:
                    raise RuntimeError(f"the runner answered for sequence {answer.seq} where {s.seq} was planned")
                if answer.error is not None:  # before its pages of this step become findable
                    outputs.append(self._end(s, FinishReason.ERROR, answer.error))
                    continue
            if end // size > len(s.hashes):
                self._index_pages(s)
            if s.followers and end >= s.prompt_len:
                self._release_followers(s)
            if answer is not None:
                outputs.append(self._take_token(s, answer, prompt_logprobs.get(s.seq)))
        return outputs

    def _index_pages(self, s: Sequence) -> None:
        size = self.pool.page_size
        for i in range(len(s.hashes), s.num_computed // size):
            parent = s.hashes[-1] if s.hashes else s.root
            s.hashes.append(self.pool.register(s.pages[i], parent, s.tokens[i * size : (i + 1) * size]))

    def _take_token(self, s: Sequence, answer: Sampled, scores: tuple[TokenLogprob, ...] | None) -> SequenceOutput:
        token = answer.token
        index = s.num_output
        s.tokens.append(token)
        self.counters.output_tokens += 1
        cached = s.cached_tokens if index == 0 else None
        reason, stop_token = self._finish(s, token, index + 1)
        if reason is not None:
            self._end(s, reason)
        logprobs = None if answer.logprob is None else (answer.logprob,)
        return SequenceOutput(s.request_id, s.choice, index, (token,), reason, stop_token, cached, logprobs, scores)

    def _finish(self, s: Sequence, token: int, num_output: int) -> tuple[FinishReason | None, int | None]:
        if num_output >= s.params.min_tokens:
            if token in self.eos_token_ids and not s.params.ignore_eos:
                return FinishReason.STOP, token
            if token in s.params.stop_token_ids:
                return FinishReason.STOP, token
        if num_output >= s.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    # --- the books ---

    def check(self) -> None:
        """Count every page and every sequence.

        Raises:
            PoolCorrupt: pages do not add up.
            RuntimeError: a sequence is in the wrong list, or a list out of order.
        """
        self.pool.check(s.pages for s in self._sequences.values())
        for sequences, state in ((self.running, State.RUNNING), (self.waiting, State.WAITING)):
            if any(s.state is not state for s in sequences):
                raise RuntimeError(f"a sequence that is not {state.name} is listed as such")
            if [s.order for s in sequences] != sorted(s.order for s in sequences):
                raise RuntimeError(f"the {state.name} list is out of order")
        following = sum(s.state is State.FOLLOWING for s in self._sequences.values())
        if len(self.running) + len(self.waiting) + following != len(self._sequences):
            raise RuntimeError("a sequence is in no list, or in two")
        if any(s.pages for s in self.waiting):
            raise RuntimeError("a waiting sequence holds pages")
