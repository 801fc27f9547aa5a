"""The step scheduler: which tokens of which sequences are computed next, and what their results mean. Pure.

`plan()` says what one step computes, then `apply(result)` takes in what came of it, or `fail(error)` that it raised. Between the two
nothing may be called but `plan_ahead()`, which says what the step behind it computes where that can be told; the next `plan()` is then
that same plan, and what happened meanwhile to its sequences is seen when it is applied.

Every running sequence has `num_tokens - num_computed >= 1` tokens to go. One step serves, under `max_batch_tokens`:

    1. sequences with one token to go (decode), in scheduling order: a long prompt never stalls their streams
    2. sequences with more to go (prefill chunks), in scheduling order
    3. waiting sequences, in scheduling order, each only if the pool holds all its known tokens beside what 1 and 2 still need;
       those of a higher priority than a chunk of 2 come before it. Whose pages lie in host memory takes its place and waits for them

Scheduling order is priority, then arrival. When 1 or 2 find no page, or the head of those that wait finds no place or no pages,
`pressure` says who gives way and how, even if already planned in this step; for one that waits, only what has a strictly lower
priority. The first in the order never gives way, and is therefore never starved. Pages that are leaving are waited for: they come
back when their move has ended, and until then whoever needs them misses steps, and nobody is admitted behind it.

After a step that raised, `Isolation` names sequences that are computed alone until the one to blame is found; the others wait.
"""

from __future__ import annotations

from collections.abc import Iterable

from .admission import ANY, Admission
from .ahead import rows_ahead
from .candidates import candidates, shortage
from .decisions import Record
from .isolation import Isolation
from .page_pool import PagePool
from .plan import NewSequence, Row, Sampled, StepPlan, StepResult
from .pressure import DECIDE, Action, Decision, Reason, relieve
from .protocol import FinishReason, SequenceOutput, TokenLogprob
from .sequence import Sequence, State


class Scheduler(Admission):
    """Continuous batching over one page pool.

    Args:
        pool: the pages.
        max_batch_tokens: tokens computed in one step.
        max_running: sequences that run at once; at most `max_batch_tokens`, so that every decode fits in a step.
        eos_token_ids: tokens that end a sequence unless it ignores them.
        host_pages: pages of host memory.
        disk_pages: that may lie in files.
        preemption: `pressure.DECIDE`, or the action that is always taken.
    """

    def __init__(
        self,
        pool: PagePool,
        max_batch_tokens: int,
        max_running: int,
        eos_token_ids: Iterable[int] = (),
        host_pages: int = 0,
        preemption: str = DECIDE,
        disk_pages: int = 0,
    ) -> None:
        super().__init__(pool, max_batch_tokens, max_running, host_pages, disk_pages, preemption)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._pages_per_step = pool.pages_for(max_batch_tokens)
        self.isolation = Isolation()
        self._recomputed: list[tuple[Record, int]] = []  # tokens of this step that a decision has made it compute again
        self._waits: list[Record] = []  # in this step
        self._next: StepPlan | None = None  # planned ahead
        self._stood: tuple[Sequence | None, int] = (None, 0)  # who headed the queue after the latest plan, and departures until then

    # --- planning a step ---

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to compute and nothing to move."""
        if self._next is not None:
            plan, self._next = self._next, None
            self._planned, self._ahead = self._ahead, {}
            return plan
        self._planned.clear()
        self._copies.clear()
        self._waits.clear()
        self._below = ANY
        suspect = self.isolation.suspect()
        if suspect is not None:
            self._serve_alone(suspect)
        else:
            self._serve_all()
        self.host.evict_ahead(2 * self._pages_per_step, self._pages_per_step)
        self._stood = (self.waiting[0] if self.waiting else None, self._departures)
        return self._step_plan(self._planned, self.counters.steps) if self._planned or self.moves.pending() else None

    def plan_ahead(self) -> StepPlan | None:
        """The step after the planned one, which has not been applied yet; None when it depends on what comes of that (`ahead`)."""
        stuck = not self.waiting or ((self.waiting[0], self._departures) == self._stood and not self.moves.under_way())
        if not stuck or self._waits or self.isolation.suspect() is not None:
            return None
        rows = rows_ahead(self, self._planned)
        if rows is None:
            return None
        self._ahead = rows
        self._copies.clear()
        self.host.evict_ahead(2 * self._pages_per_step, self._pages_per_step)
        self._next = self._step_plan(rows, self.counters.steps + 1)
        return self._next

    def _serve_all(self) -> None:
        # `running` may change while it is served, hence the copies.
        for s in [s for s in self.running if len(s.tokens) - s.num_computed == 1]:
            if s.state is State.RUNNING:
                self._serve(s)
        for s in [s for s in self.running if len(s.tokens) - s.num_computed > 1]:
            self._admit(s.priority)
            if s.state is State.RUNNING:
                self._serve(s)
        self._admit(ANY)

    def _serve(self, s: Sequence) -> None:
        """Plan the next tokens of a running sequence, unless it has to give way itself."""
        count = len(s.tokens) - s.num_computed
        if count > 1:
            count = min(count, self._budget())
            if count < 1:
                return
        while lacking := self._hold_pages(s, s.num_computed + count):
            victim, decision = relieve(shortage(self, s, lacking), candidates(self), self.costs(), self.preemption, self.relief)
            if victim is None:
                self._below = min(self._below, s.priority)
                self._waits.append(self.decisions.add(self.counters.steps, s, decision))
                return
            self._give_way(victim, decision)
            if victim is s:
                return
        self._planned[s] = (s.num_computed, count)

    def _serve_alone(self, s: Sequence) -> None:
        """Plan the next tokens of one sequence and no other; whatever the door let in fits alone, once nothing is in transit."""
        if s.state is State.WAITING:
            if self.free_places() < 1:
                return
            self._drop_kept(s)
            origin = self._origin(s).on_device(self.pool.page_size)
            self._start(s, origin.shared(), origin.hashes, origin.computed)
        if s.state is not State.RUNNING:
            return
        count = min(len(s.tokens) - s.num_computed, self.max_batch_tokens)
        while self._hold_pages(s, s.num_computed + count):
            others = [other for other in self.running if other is not s]
            if not others:
                return
            self._give_way(others[-1], Decision(Action.RECOMPUTE, Reason.FAILED))
        self._planned[s] = (s.num_computed, count)

    def _step_plan(self, planned: dict[Sequence, tuple[int, int]], step: int) -> StepPlan:
        rows: list[Row] = []
        new: list[NewSequence] = []
        gained: list[tuple[int, tuple[int, ...]]] = []
        for s, (start, count) in planned.items():
            rows.append(Row(s.seq, start, count, start + count >= len(s.tokens)))  # above: with a token that is not known yet
            known, have = s.known_pages, len(s.pages)
            if known == 0:
                new.append(NewSequence(s.seq, tuple(s.tokens), s.prompt_len, tuple(s.pages), s.params, s.seed))
            elif known < have:
                gained.append((s.seq, tuple(s.pages[known:])))
            s.known_pages = have
        forget, self._forget = tuple(self._forget), []
        copies = tuple(self._copies.values())
        return StepPlan(step, tuple(rows), tuple(new), tuple(gained), copies, forget, *self.moves.take())

    # --- taking in what a step produced ---

    def apply(self, result: StepResult) -> list[SequenceOutput]:
        """Advance the planned sequences by `result`; what each gained, in the order of the plan's rows."""
        self.counters.steps += 1
        size = self.pool.page_size
        outputs: list[SequenceOutput] = []
        sampled = {answer.seq: answer for answer in result.sampled}
        prompt_logprobs = dict(result.prompt_logprobs)
        planned, self._planned = self._planned, {}
        for s, (start, count) in planned.items():
            if s.state is not State.RUNNING:  # it has left since the step was planned, which was ahead
                continue
            end = start + count
            if start < s.recompute_until:
                self._count_again(s, min(end, s.recompute_until) - start)
            s.num_computed = end
            answer = None
            if end == len(s.tokens):
                answer = sampled.get(s.seq)
                if answer is None:
                    raise RuntimeError(f"the runner did not answer for sequence {s.seq}")
                if answer.error is not None:  # before its pages of this step become findable
                    outputs.append(self._end(s, FinishReason.ERROR, answer.error))
                    continue
            if end // size > len(s.hashes):
                self._index_pages(s)
            if s.followers and end >= s.prompt_len:
                self._release_followers(s)
            if answer is not None:
                outputs.append(self._take_token(s, answer, prompt_logprobs.get(s.seq)))
        if planned:
            self.isolation.succeeded(planned)
        return outputs

    def fail(self, error: str) -> list[SequenceOutput]:
        """The planned step raised, and the runner has forgotten everything; the terminal output of the one to blame, if that is clear.

        All start over from the pages that were findable before this step. Nothing that it may have written was.
        """
        self.counters.steps += 1
        culprit = self.isolation.failed(self._planned)
        for s in reversed(self.running.copy()):
            self._give_way(s, Decision(Action.RECOMPUTE, Reason.FAILED))
        for s in self.frozen:
            s.known_pages = 0
        self._forget.clear()
        self._next = None
        return [] if culprit is None else [self._end(culprit, FinishReason.ERROR, error)]

    def page_maps(self) -> tuple[bytes, bytes]:
        """`PagePool.page_map` of the device, where m is what moves read, and `HostTier.page_map`."""
        return self.pool.page_map(page for pages in self.moves.held() for page in pages), self.host.page_map()

    def _count_again(self, s: Sequence, tokens: int) -> None:
        self.counters.recomputed_tokens += tokens
        if s.decision is not None:
            self._recomputed.append((s.decision, tokens))

    def took(self, plan: StepPlan, seconds: float) -> None:
        """The step of `plan`, which has been applied, took so long: what of that is the price of earlier decisions."""
        computed = sum(row.num_tokens for row in plan.rows)
        for record, tokens in self._recomputed:
            self.decisions.charge(record, seconds * tokens / computed)
        self._recomputed.clear()
        for record in self._waits:
            self.decisions.charge(record, seconds / max(len(self.running), 1))
        for record in self.emigrants.values():
            self.decisions.charge(record, seconds)
        aside = sum(s.recompute_until > 0 for some in (self.waiting, self.arriving) for s in some)
        self.counters.stall_s += seconds * (aside + len(self._waits))

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
        reason, stop_token = self.finish_of(s, token, index + 1)
        if reason is not None:
            self._end(s, reason)
        logprobs = None if answer.logprob is None else (answer.logprob,)
        return SequenceOutput(s.request_id, s.choice, index, (token,), reason, stop_token, cached, logprobs, scores)

    def finish_of(self, s: Sequence, token: int, num_output: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token`, the latest of `num_output` output tokens, ends `s`: why, and the stop token that does."""
        # Below min_tokens a grammar allows a token that ends it only where nothing else may follow.
        if num_output >= s.params.min_tokens or s.params.grammar:
            if token in self.eos_token_ids and not s.params.ignore_eos:
                return FinishReason.STOP, token
            if token in s.params.stop_token_ids:
                return FinishReason.STOP, token
        if num_output >= s.max_tokens:
            return FinishReason.LENGTH, None
        return None, None
