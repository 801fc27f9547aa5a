"""The model runner for one GPU: the host plans and prepares the next step while the device computes the present one.

    issue k + 1:  pages, inputs (one copy), forward (a graph where all rows are decodes, else eager), logits, draw
    collect k:    wait for its tokens, which are copied to the host as soon as they are drawn

The tokens of step k go into `_latest` on the device, by the sequence's place in the table, and step k + 1 takes them from there, so
they need not come to the host first. The host's table holds PENDING in their place until they have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import AttentionBatch
from .cuda_graphs import Capture, DecodeGraphs
from .kv_store import KVStore
from .model import DecoderModel
from .page_mover import PageMover
from .plan import NewSequence, Row, Sampled, StepPlan, StepResult
from .protocol import SamplingParams, TokenLogprob
from .runner import Computed, ModelRunner
from .sampler import SamplingRow
from .sequence_table import PENDING, Gathered, Slot
from .shared_prefix import shared_pages, worth_sharing
from .staging import Mark, Staging

if TYPE_CHECKING:
    from .device_sampler import DeviceSampler, Drawing  # which needs Triton

WARM_CHUNK = 64  # tokens of a small prefill in the warm-up

Progress = Callable[[int, int], None]


class _Issued(NamedTuple):
    """A step that the device has been given."""

    plan: StepPlan
    drawn: list[tuple[int, Slot, int]]  # for each row that samples, in the drawing's order: (sequence, slot, position of the token)
    drawing: Drawing | None
    done: Mark
    scores: tuple[tuple[int, tuple[TokenLogprob, ...]], ...]


class DeviceRunner(ModelRunner):
    """Computes plans for one model on one device, one step ahead where the scheduler can say what comes next.

    Args:
        model, kv, sampler: what computes.
        mover, addresses: as for `ModelRunner`.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        capture: makes a graph of a decode step; None to run all steps eagerly.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv: KVStore,
        sampler: DeviceSampler,
        max_running: int,
        max_len: int,
        mover: PageMover | None = None,
        addresses: tuple[str, ...] = (),
        *,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(model, kv, sampler, max_running, max_len, mover, addresses)
        device = kv.pool.device
        self._draws = sampler
        self._device = device
        self._staging, self._samples = Staging(device), Staging(device)
        self._latest = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._max_running, self._max_len = max_running, max_len
        width = -(-max_len // kv.page_size)
        self._graphs = None if capture is None else DecodeGraphs(self._decode, max_running, width, device, capture)
        self._ahead: _Issued | None = None

    def reset(self) -> None:
        """Forget every sequence, whatever a `run` that raised has left half done."""
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

    def warm_up(self, max_batch_tokens: int, progress: Progress | None = None) -> None:
        """Compile every kernel and capture every graph, on an empty pool; `progress` hears of (steps done, steps in all)."""
        longest = min(max_batch_tokens - 1, self._max_len - 1, self._kv.num_pages * self._kv.page_size)
        steps = [[1, count] for count in sorted({min(WARM_CHUNK, longest), longest}) if count > 1 and self._max_running > 1]
        steps += [[1] * bucket for bucket in (self._graphs.buckets if self._graphs else (1, self._max_running))]
        for done, counts in enumerate(steps):
            self.run(_warm_plan(counts, self._kv.num_pages, self._kv.page_size))
            self.reset()
            if progress is not None:
                progress(done + 1, len(steps))
        self._latest.zero_()

    def _issue(self, plan: StepPlan) -> _Issued:
        for seq in plan.forget:
            self._scores.pop(seq, None)
        self._move(plan)
        if not plan.rows:
            return _Issued(plan, [], None, Mark(self._device), ())
        step = self._table.gather(plan.rows)
        computed = self._forward(step)
        scores = tuple(self._score_prompts(computed))
        at = [i for i, row in enumerate(step.rows) if row.samples]
        if not at:
            return _Issued(plan, [], None, Mark(self._device), scores)
        ends = step.row_starts[1:][at] - 1
        places, owners = self._samples.upload([ends, step.owners[ends]])
        slots = [self._table[step.rows[i].seq] for i in at]
        for slot, i in zip(slots, at, strict=True):  # less one where the row of a step ahead was dropped
            slot.num_tokens = step.rows[i].start + step.rows[i].num_tokens
        wanted = [SamplingRow(s.params, s.seed, s.num_tokens, s.prompt_len, self._table.tokens(s)) for s in slots]
        last = computed.hidden if len(at) == len(computed.hidden) else computed.hidden[places]
        drawing = self._draws.begin(self._model.logits(last), wanted)
        self._latest[owners] = drawing.tokens
        drawn = [(step.rows[i].seq, slot, slot.num_tokens) for i, slot in zip(at, slots, strict=True)]
        for slot in slots:
            self._table.append(slot, PENDING)
        return _Issued(plan, drawn, drawing, Mark(self._device), scores)

    def _collect(self, issued: _Issued) -> StepResult:
        sampled: dict[int, Sampled] = {}
        issued.done.wait()  # also where nothing was drawn: what the inputs were staged in is used again
        results = issued.drawing.result() if issued.drawing is not None else []
        for (seq, slot, position), drawn in zip(issued.drawn, results, strict=True):
            if self._table.knows(seq, slot):  # a step ahead may have forgotten it
                self._table.settle(slot, position, drawn.token)
            sampled[seq] = Sampled(seq, drawn.token, drawn.logprob, drawn.error)
        plan = issued.plan
        return StepResult(plan.step, tuple(sampled[row.seq] for row in plan.rows if row.samples), issued.scores)

    def _forward(self, step: Gathered) -> Computed:
        decodes = slice(step.num_decode)
        graphed = self._graphs is not None and self._graphs.holds(step)
        shared = shared_pages(step.tables[decodes], step.kv_lens[decodes], self._kv.page_size)
        if not worth_sharing(step.num_decode, shared, self._kv.page_bytes, graphed):
            shared = 0
        ends = step.row_starts[1:]
        if self._graphs is not None and graphed and not shared:
            return Computed(step.rows, ends, self._graphs.run(step))
        arrays = [step.owners, step.tokens, step.positions, step.slots]
        arrays += [array.astype(np.int32) for array in (step.row_starts, step.kv_lens)]
        owners, tokens, positions, slots, row_starts, kv_lens, tables = self._staging.upload([*arrays, step.tables])
        batch = AttentionBatch(
            row_starts=row_starts,
            kv_lens=kv_lens,
            block_tables=tables,
            slots=slots,
            num_decode=step.num_decode,
            row_lens=tuple(np.diff(step.row_starts).tolist()),
            kv_lens_list=tuple(step.kv_lens.tolist()),
            prefix_pages=shared,
        )
        return Computed(step.rows, ends, self._decode(tokens, owners, positions, batch))

    def _decode(self, tokens: Tensor, owners: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        known = torch.where(tokens == PENDING, self._latest[owners], tokens)
        return self._model.forward(known, positions, batch, self._kv)


def _warm_plan(counts: list[int], num_pages: int, page_size: int) -> StepPlan:
    """A step with a row of so many tokens for each of `counts`, in sequences that are nobody's."""
    new, rows = [], []
    for seq, count in enumerate(counts):
        pages = tuple((seq + i) % num_pages for i in range(-(-count // page_size)))
        new.append(NewSequence(seq, (0,) * count, count, pages, SamplingParams(max_tokens=1, seed=0, top_p=0.9), seq))
        rows.append(Row(seq, 0, count, True))
    return StepPlan(0, tuple(rows), tuple(new), (), (), ())
