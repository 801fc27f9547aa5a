"""The model runner: turns a step plan into tensors, runs the model and the sampler, and answers with the tokens.

Of several ranks the leader's does just that, after sending the plan round; the others compute the same plan on their shards and
hear with a later one what was sampled. Sampled tokens are appended here; the scheduler hears of them, but need not send them
back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from .constraint import Constraints, Wanted
from .engine import Runner
from .kv_store import KVStore
from .model import DecoderModel
from .page_mover import PageMover, Place
from .parallel import GroupBroken, RankGroup
from .plan import MemoryBytes, Moved, Row, Sampled, StepPlan, StepResult
from .plan_wire import pack_end, pack_step
from .protocol import TokenLogprob
from .sampler import Sampler, SamplingRow, prompt_logprobs
from .sequence_table import Int64Array, SequenceTable, Slot

SCORED_ROWS = 64  # prompt positions whose logits are held at once: 64 x vocabulary floats


class Computed(NamedTuple):
    """A step up to the last layer: its rows in the order in which they were computed, where each ends, and hidden states [T, hidden]."""

    rows: list[Row]
    ends: Int64Array
    hidden: torch.Tensor


class _Chunk(NamedTuple):
    """Hidden rows [first, first + length) predict the prompt tokens at `position` and after."""

    first: int
    position: int
    length: int


class _Ranks:
    """What every rank does with a plan: keep the sequences, move pages, run the layers, and choose whose logits are wanted."""

    def __init__(self, model: DecoderModel, kv: KVStore, max_running: int, max_len: int, mover: PageMover | None = None) -> None:
        self._model = model
        self._kv = kv
        self._mover = mover or PageMover(kv, Place())
        self._table = SequenceTable(max_running, max_len, kv.page_size, kv.pool.device)

    def memory_bytes(self) -> MemoryBytes:
        """What is held here."""
        return MemoryBytes(self._model.weight_bytes(), self._kv.pool.nbytes)

    def close(self) -> None:
        """Pages travel no more."""
        self._mover.close()

    def _move(self, plan: StepPlan) -> None:
        """What a plan says beside its rows."""
        self._kv.copy_pages(plan.copies)
        self._mover.start(plan)
        self._table.apply(plan)

    def _compute(self, plan: StepPlan) -> Computed:
        self._move(plan)
        inputs = self._table.inputs(plan.rows)
        hidden = self._model.forward(inputs.tokens, inputs.positions, inputs.batch, self._kv)
        return Computed(inputs.rows, inputs.ends, hidden)

    def _chunks_to_score(self, slot: Slot, row: Row, end: int) -> Iterator[_Chunk]:
        """The positions of a row whose next prompt token gets a log-probability, if the row asks for that."""
        if slot.params.prompt_logprobs is None or slot.num_tokens > slot.prompt_len:
            return
        first, count = end - row.num_tokens, min(row.num_tokens, slot.prompt_len - 1 - row.start)
        for at in range(0, count, SCORED_ROWS):
            yield _Chunk(first + at, row.start + at + 1, min(SCORED_ROWS, count - at))

    def _score_chunks(self, step: Computed) -> None:
        """A follower's part in the leader's scoring of prompts: its columns of the logits."""
        for row, end in zip(step.rows, step.ends.tolist(), strict=True):
            for chunk in self._chunks_to_score(self._table[row.seq], row, end):
                self._chunk_logits(step.hidden, chunk)

    def _chunk_logits(self, hidden: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        return self._model.logits(hidden[chunk.first : chunk.first + chunk.length])

    def _last_logits(self, step: Computed) -> tuple[list[Row], torch.Tensor | None]:
        """The rows that sample, and the logits after their last tokens; None when there are none."""
        rows, ends = step.rows, step.ends
        at = [i for i, row in enumerate(rows) if row.samples]
        if not at:
            return [], None
        whole = len(at) == len(step.hidden)
        last = step.hidden if whole else step.hidden[torch.from_numpy(ends[at] - 1).to(step.hidden.device)]
        return [rows[i] for i in at], self._model.logits(last)


class ModelRunner(_Ranks, Runner):
    """Computes plans for one model on one device, and samples.

    Args:
        model, kv, sampler: what computes.
        constraints: which tokens grammars allow.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        mover: carries pages out of `kv` and into it; default: to its host pool and back alone.
        addresses: where the movers of all ranks are reached.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv: KVStore,
        sampler: Sampler,
        constraints: Constraints,
        max_running: int,
        max_len: int,
        mover: PageMover | None = None,
        addresses: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, kv, max_running, max_len, mover)
        self._addresses = addresses
        self._sampler = sampler
        self._constraints = constraints
        self._scores: dict[int, list[TokenLogprob]] = {}  # prompt logprobs of prompts that are still being computed

    def reset(self) -> None:
        """Forget every sequence, whatever a `run` that raised has left half done."""
        self._table.reset()
        self._scores.clear()
        self._constraints.reset()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that sequences to come will have."""
        self._constraints.prepare(grammar)

    def close(self) -> None:
        """No further step comes."""
        super().close()
        self._constraints.close()

    def poll(self) -> tuple[Moved, ...]:
        """The moves that have ended, on every rank."""
        return self._mover.poll()

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever one has."""
        self._mover.watch(wake)

    def addresses(self) -> tuple[str, ...]:
        """Where the movers of all ranks are reached."""
        return self._addresses

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        self._note(plan)
        if not plan.rows:
            self._move(plan)
            return StepResult(plan.step, ())
        step = self._compute(plan)
        scores = tuple(self._score_prompts(step))
        sampled = self._sample(step)
        return StepResult(plan.step, tuple(sampled[row.seq] for row in plan.rows if row.samples), scores)

    def _note(self, plan: StepPlan) -> None:
        """What a plan says of sequences, where the leader alone keeps something."""
        for seq in plan.forget:
            self._scores.pop(seq, None)
            self._constraints.forget(seq)
        for new in plan.new:
            self._constraints.learn(new)

    def _wanted(self, rows: list[Row], slots: list[Slot]) -> list[SamplingRow]:
        """What the sampler must know of the rows that sample."""
        tokens = [self._table.tokens(slot) for slot in slots]
        bound = {i: Wanted(rows[i].seq, s.params, tokens[i][s.prompt_len :]) for i, s in enumerate(slots) if s.params.grammar}
        allowed = self._constraints.allowed(bound) if bound else {}
        return [SamplingRow(s.params, s.seed, s.num_tokens, s.prompt_len, tokens[i], allowed.get(i)) for i, s in enumerate(slots)]

    def _sample(self, step: Computed) -> dict[int, Sampled]:
        rows, logits = self._last_logits(step)
        if logits is None:
            return {}
        slots = [self._table[row.seq] for row in rows]
        wanted = self._wanted(rows, slots)
        results: dict[int, Sampled] = {}
        for row, slot, drawn in zip(rows, slots, self._sampler.sample(logits, wanted), strict=True):
            self._table.append(slot, drawn.token)
            results[row.seq] = Sampled(row.seq, drawn.token, drawn.logprob, drawn.error)
        return results

    def _score_prompts(self, step: Computed) -> Iterator[tuple[int, tuple[TokenLogprob, ...]]]:
        """Log-probabilities of the prompt tokens after each computed position, for rows that ask; whole prompts are handed over."""
        for row, end in zip(step.rows, step.ends.tolist(), strict=True):
            slot = self._table[row.seq]
            for chunk in self._chunks_to_score(slot, row, end):
                targets = self._table.tokens(slot)[chunk.position : chunk.position + chunk.length].tolist()
                logits = self._chunk_logits(step.hidden, chunk)
                scores = self._scores.setdefault(row.seq, [])
                scores.extend(prompt_logprobs(logits, targets, slot.params.prompt_logprobs or 0))
            if row.samples and slot.params.prompt_logprobs is not None and slot.num_tokens == slot.prompt_len:
                whole = tuple(self._scores.pop(row.seq, ()))
                if len(whole) == slot.prompt_len - 1:  # a sequence that starts from its leader's pages has scored nothing
                    yield row.seq, whole


class FollowerRunner(_Ranks):
    """Computes the leader's plans on another rank's shard. Its logits go to the leader, the tokens come back with the next plan."""

    def __init__(self, model: DecoderModel, kv: KVStore, max_running: int, max_len: int, mover: PageMover | None = None) -> None:
        super().__init__(model, kv, max_running, max_len, mover)
        self._waiting: list[Slot] = []  # in the order of the last plan's sampling rows

    def run(self, plan: StepPlan, sampled: tuple[int, ...]) -> None:
        """Compute one step; `sampled` are the tokens of the step before.

        Raises:
            ValueError: they are not as many as its sampling rows.
        """
        for slot, token in zip(self._waiting, sampled, strict=True):
            self._table.append(slot, token)
        if not plan.rows:
            self._move(plan)
            self._waiting = []
            return
        step = self._compute(plan)
        self._score_chunks(step)
        self._last_logits(step)
        self._waiting = [self._table[row.seq] for row in plan.rows if row.samples]


class LeaderRunner(Runner):
    """The leader's runner: every plan goes to the other ranks first, a plan that was made ahead while the step before is under way.
    A step that raised has left them in the middle of it, so it is the last one."""

    def __init__(self, runner: ModelRunner, group: RankGroup) -> None:
        self._runner = runner
        self._group = group
        self._sampled: tuple[int, ...] = ()  # which the other ranks have not been told of
        self._told = False  # they have the next plan already
        self._failure: str | None = None

    def memory_bytes(self) -> MemoryBytes:
        """What is held on this rank."""
        return self._runner.memory_bytes()

    def poll(self) -> tuple[Moved, ...]:
        """The moves that have ended, on every rank."""
        return self._runner.poll()

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake` whenever one has."""
        self._runner.watch(wake)

    def addresses(self) -> tuple[str, ...]:
        """Where the movers of all ranks are reached."""
        return self._runner.addresses()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that sequences to come will have."""
        self._runner.prepare(grammar)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step, with all ranks."""
        return self.run_ahead(plan, lambda: None)

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        """Compute one step, and where the runner does, begin the next one, with all ranks.

        Raises:
            GroupBroken: a rank is gone or silent, or an earlier step raised.
        """
        if self._failure is not None:
            raise GroupBroken(f"an earlier step failed: {self._failure}")
        try:
            if not self._told:
                self._tell(plan)
            self._told = False
            result = self._runner.run_ahead(plan, partial(self._following, following))
        except BaseException as error:
            self._failure = str(error) or repr(error)
            raise
        self._sampled += tuple(s.token for s in result.sampled)
        return result

    def _following(self, following: Callable[[], StepPlan | None]) -> StepPlan | None:
        after = following()
        if after is not None:
            self._tell(after)
            self._told = True
        return after

    def _tell(self, plan: StepPlan) -> None:
        self._group.send(pack_step(plan, self._sampled))
        self._sampled = ()

    def reset(self) -> None:
        """There is no way back: the other ranks cannot be told in the middle of a step. Raises: GroupBroken."""
        raise GroupBroken(f"the ranks cannot forget a step that failed: {self._failure}")

    def close(self) -> None:
        """Send the other ranks home."""
        self._group.send(pack_end())
        self._runner.close()
        self._group.close()
