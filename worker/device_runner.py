"""The model runner for GPUs: the host plans and prepares the next step while the device computes the present one.

    issue k + 1:  pages, inputs (one copy), forward (a graph where all rows are decodes, else eager), logits, draw
    collect k:    wait for its tokens, which are copied to the host as soon as they are drawn

The tokens of step k stay on the device (`DeviceLayers.keep`), and step k + 1 takes them from there, so they need not come to the host
first. The host's table holds PENDING in their place until they have come.

Of several ranks the leader draws, and the tensors' connection takes the tokens to the other ranks' devices within the step; they hear
the values with a later plan, at the same place between two steps at which the leader itself has come to know them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .constraint import Constraints
from .device_layers import Decoding, DeviceLayers, Pending
from .kv_store import KVStore
from .model import DecoderModel
from .page_mover import PageMover
from .parallel import RankGroup
from .plan import NewSequence, Sampled, StepPlan, StepResult
from .protocol import TokenLogprob
from .runner import FollowerRunner, ModelRunner
from .sampler import Held
from .staging import TURNS, Mark

if TYPE_CHECKING:
    from .device_sampler import DeviceSampler, Drawing  # which needs Triton

Progress = Callable[[int, int], None]


class _Issued(NamedTuple):
    """A step that the device has been given."""

    plan: StepPlan
    drawn: list[Pending]  # for each row that samples, in the drawing's order
    drawing: Drawing | None
    done: Mark
    scores: tuple[tuple[int, tuple[TokenLogprob, ...]], ...]


class DeviceRunner(ModelRunner):
    """Computes plans for one model on one device, one step ahead where the scheduler can say what comes next.

    Args:
        model, kv, sampler: what computes.
        constraints, mover, addresses: as for `ModelRunner`.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        how: graphs, and shared prefixes.
        group: the ranks that get the tokens; None when there is only this one.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv: KVStore,
        sampler: DeviceSampler,
        constraints: Constraints,
        max_running: int,
        max_len: int,
        mover: PageMover | None = None,
        addresses: tuple[str, ...] = (),
        *,
        how: Decoding,
        group: RankGroup | None = None,
    ) -> None:
        super().__init__(model, kv, sampler, constraints, max_running, max_len, mover, addresses)
        self._draws = sampler
        self._device = kv.pool.device
        self._group = group
        self._layers = DeviceLayers(model, kv, self._table, max_running, max_len, how)
        self._ahead: _Issued | None = None

    def reset(self) -> None:
        """Forget every sequence, whatever a `run` that raised has left half done."""
        Mark(self._device).wait()  # a step that is under way reads what its inputs were staged in
        super().reset()
        self._ahead = None

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        return self.run_ahead(plan, lambda: None)

    @torch.inference_mode()
    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        """Compute one step, and meanwhile begin the next one, which the next call must be for.

        Raises:
            RuntimeError: another step has been begun.
        """
        issued, self._ahead = self._ahead or self._issue(plan), None
        if issued.plan.step != plan.step:
            raise RuntimeError(f"step {plan.step} was to be computed, and step {issued.plan.step} had been begun")
        after = following()
        if after is not None:
            self._ahead = self._issue(after)
        return self._collect(issued)

    @torch.inference_mode()
    def warm_up(self, max_batch_tokens: int, progress: Progress | None = None) -> None:
        """Compile every kernel and capture every graph, on an empty pool; `progress` hears of (steps done, steps in all). With several
        ranks all do it at once, whose warm-ups are the same steps."""
        self._kv.warm_up()
        steps = self._layers.warm_steps(max_batch_tokens)
        for done, step in enumerate(steps):
            self._collect(self._issue(*step))
            self.reset()
            if progress is not None:
                progress(done + 1, len(steps))

    def _issue(self, plan: StepPlan, share: bool = False) -> _Issued:
        self._note(plan)
        self._move(plan)
        self._draws.learn([self._held(new) for new in plan.new if new.params.penalized])
        if not plan.rows:
            return _Issued(plan, [], None, Mark(self._device), ())
        step = self._table.gather(plan.rows)
        computed = self._layers.compute(step, share)
        scores = tuple(self._score_prompts(computed))
        ending = self._layers.ending(step, computed)
        if ending is None:
            return _Issued(plan, [], None, Mark(self._device), scores)
        wanted = self._wanted(ending.rows, ending.slots)
        places = [slot.index for slot in ending.slots]
        drawing = self._draws.begin(self._model.logits(ending.hidden), wanted, places, self._layers.latest)
        if self._group is not None:
            self._group.share(drawing.tokens)
        return _Issued(plan, self._layers.keep(ending, drawing.tokens), drawing, Mark(self._device), scores)

    def _held(self, new: NewSequence) -> Held:
        slot = self._table[new.seq]
        return Held(slot.index, self._table.tokens(slot), new.prompt_len)

    def _collect(self, issued: _Issued) -> StepResult:
        sampled: dict[int, Sampled] = {}
        issued.done.wait()  # also where nothing was drawn: what the inputs were staged in is used again
        results = issued.drawing.result() if issued.drawing is not None else []
        for pending, drawn in zip(issued.drawn, results, strict=True):
            self._layers.settle(pending, drawn.token)
            sampled[pending.seq] = Sampled(pending.seq, drawn.token, drawn.logprob, drawn.error)
        plan = issued.plan
        return StepResult(plan.step, tuple(sampled[row.seq] for row in plan.rows if row.samples), issued.scores)


class DeviceFollower(FollowerRunner):
    """Issues on another rank's device what the leader's `DeviceRunner` issues, and as far ahead.

    Args:
        model, kv: what computes.
        group: the ranks.
        mover: as for `ModelRunner`.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        how: as for the leader.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv: KVStore,
        group: RankGroup,
        max_running: int,
        max_len: int,
        mover: PageMover | None = None,
        *,
        how: Decoding,
    ) -> None:
        super().__init__(model, kv, max_running, max_len, mover)
        self._device = kv.pool.device
        self._group = group
        self._layers = DeviceLayers(model, kv, self._table, max_running, max_len, how)
        self._drawn: deque[Pending] = deque()  # step by step, each in the order of its plan's sampling rows
        self._under_way: deque[Mark] = deque()

    def close(self) -> None:
        """Pages travel no more. Waits for what the device has been given, in which the other ranks need this one."""
        for done in self._under_way:
            done.wait()
        super().close()

    @torch.inference_mode()
    def run(self, plan: StepPlan, sampled: tuple[int, ...]) -> None:
        """Begin one step; returns before it has ended. `sampled` are the tokens of the steps whose ends the leader has seen since the plan
        before: those of the latest step are not among them when this one was planned ahead.

        Raises:
            ValueError: there are more than sampling rows that wait for one.
        """
        if len(sampled) > len(self._drawn):
            raise ValueError(f"the leader tells of {len(sampled)} tokens, and {len(self._drawn)} have been drawn")
        for token in sampled:
            self._layers.settle(self._drawn.popleft(), token)
        if len(self._under_way) == TURNS:  # what its inputs were staged in is used again
            self._under_way.popleft().wait()
        self._issue(plan)
        self._under_way.append(Mark(self._device))

    @torch.inference_mode()
    def warm_up(self, max_batch_tokens: int) -> None:
        """As `DeviceRunner.warm_up`, at the same time."""
        self._kv.warm_up()
        for step in self._layers.warm_steps(max_batch_tokens):
            self._issue(*step)
            Mark(self._device).wait()
            self._table.reset()
            self._drawn.clear()

    def _issue(self, plan: StepPlan, share: bool = False) -> None:
        self._move(plan)
        if not plan.rows:
            return
        step = self._table.gather(plan.rows)
        computed = self._layers.compute(step, share)
        self._score_chunks(computed)
        ending = self._layers.ending(step, computed)
        if ending is None:
            return
        self._model.logits(ending.hidden)
        tokens = torch.empty(len(ending.rows), dtype=torch.int64, device=self._device)
        self._group.share(tokens)
        drawn = {pending.seq: pending for pending in self._layers.keep(ending, tokens)}
        self._drawn.extend(drawn[row.seq] for row in plan.rows if row.samples)
