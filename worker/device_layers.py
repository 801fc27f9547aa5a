"""The layers of a step on a device: from a graph where all rows are decodes, else eagerly. And the tokens sampled last, on the device.

Every rank of a replica has one. Whether a step is a graph's, and which, whether its rows share a prefix, which rows sample and in what
order: all of it follows from the plans alone, so the ranks decide alike. They must, since NCCL wants every operation issued in the same
order on all ranks, and a graph that holds some launched by all of them or by none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import AttentionBatch
from .cuda_graphs import Capture, DecodeGraphs, buckets_up_to
from .kv_store import KVStore
from .model import DecoderModel
from .plan import NewSequence, Row, StepPlan
from .protocol import SamplingParams
from .runner import Computed
from .sequence_table import PENDING, Gathered, SequenceTable, Slot
from .shared_prefix import shared_pages, worth_sharing
from .staging import Staging

WARM_CHUNK = 64  # tokens of a small prefill in the warm-up


class Decoding(NamedTuple):
    """How decode rows are computed.

    Attributes:
        capture: makes a graph of a decode step; None to run all steps eagerly.
        share_prefixes: whether the kernels read a prefix once for several rows.
    """

    capture: Capture | None = None
    share_prefixes: bool = True


class Ending(NamedTuple):
    """The rows of a step that sample, in the order in which they are computed."""

    rows: list[Row]
    slots: list[Slot]  # which know so many tokens now as have been computed
    owners: Tensor  # int64 [S], their places in the table, on the device
    hidden: Tensor  # [S, hidden], of their last tokens


class Pending(NamedTuple):
    """A token that has been drawn, and is not known on the host yet."""

    seq: int
    slot: Slot
    position: int


class WarmStep(NamedTuple):
    """A step of the warm-up. `share`: as for `DeviceLayers.compute`."""

    plan: StepPlan
    share: bool = False


class DeviceLayers:
    """One rank's layers, and what they read of a step's tokens.

    Args:
        model, kv, table: of this rank.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        how: graphs, and shared prefixes.

    Attributes:
        latest: int64 [max_running], the token that each sequence has drawn last, by its place in the table; on the device.
    """

    def __init__(self, model: DecoderModel, kv: KVStore, table: SequenceTable, max_running: int, max_len: int, how: Decoding) -> None:
        device = kv.pool.device
        self._model, self._kv, self._table = model, kv, table
        self._staging, self._samples = Staging(device), Staging(device)
        self.latest = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._max_running, self._max_len = max_running, max_len
        width = -(-max_len // kv.page_size)
        self.graphs = None if how.capture is None else DecodeGraphs(self._forward, max_running, width, device, how.capture)
        self._shares = how.share_prefixes

    def compute(self, step: Gathered, share: bool = False) -> Computed:
        """A step up to the last layer. Its result is good until the next call. `share`: its decodes read together what they share, whether
        that pays or not."""
        decodes = slice(step.num_decode)
        graphed = self.graphs is not None and self.graphs.holds(step)
        shared = shared_pages(step.tables[decodes], step.kv_lens[decodes], self._kv.page_size) if self._shares else 0
        if not share and not worth_sharing(step.num_decode, shared, self._kv.page_bytes, graphed):
            shared = 0
        ends = step.row_starts[1:]
        if self.graphs is not None and graphed and not shared:
            return Computed(step.rows, ends, self.graphs.run(step))
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
        return Computed(step.rows, ends, self._forward(tokens, owners, positions, batch))

    def ending(self, step: Gathered, computed: Computed) -> Ending | None:
        """What of a computed step samples; None when nothing does."""
        at = [i for i, row in enumerate(step.rows) if row.samples]
        if not at:
            return None
        ends = step.row_starts[1:][at] - 1
        places, owners = self._samples.upload([ends, step.owners[ends]])
        rows = [step.rows[i] for i in at]
        slots = [self._table[row.seq] for row in rows]
        for slot, row in zip(slots, rows, strict=True):  # less one where the row of a step ahead was dropped
            slot.num_tokens = row.start + row.num_tokens
        return Ending(rows, slots, owners, computed.hidden if len(at) == len(computed.hidden) else computed.hidden[places])

    def keep(self, ending: Ending, tokens: Tensor) -> list[Pending]:
        """The next step takes `tokens`, int64 [S] on the device, from there; in the table they are PENDING."""
        self.latest[ending.owners] = tokens
        drawn = [Pending(row.seq, slot, slot.num_tokens) for row, slot in zip(ending.rows, ending.slots, strict=True)]
        for slot in ending.slots:
            self._table.append(slot, PENDING)
        return drawn

    def settle(self, pending: Pending, token: int) -> None:
        """It has come."""
        if self._table.knows(pending.seq, pending.slot):  # a step ahead may have forgotten it
            self._table.settle(pending.slot, pending.position, token)

    def warm_steps(self, max_batch_tokens: int) -> list[WarmStep]:
        """Steps that compile every kernel and capture every graph, each on a pool and a table that are empty."""
        num_pages, page_size = self._kv.num_pages, self._kv.page_size
        longest = min(max_batch_tokens - 1, self._max_len - 1, num_pages * page_size)
        several = self._max_running > 1
        steps = [[1, count] for count in sorted({min(WARM_CHUNK, longest), longest}) if count > 1 and several]
        steps += [[1] * bucket for bucket in buckets_up_to(self._max_running)]  # kernels are compiled for numbers of rows, too
        warm = [WarmStep(warm_plan(counts, num_pages, page_size)) for counts in steps]
        half = self._max_len // 2 // page_size  # of pages; long tables are read by several programs, which are other kernels
        if half:
            warm.append(WarmStep(decode_plan(page_size, [(0,) * 2 * half])))
        if half and several and num_pages >= 3 and self._may_share():
            sharing = [[(0,) * pages + (own,) * pages for own in (1, 2)] for pages in (1, half)]
            warm += [WarmStep(decode_plan(page_size, tables), share=True) for tables in sharing]
        return warm

    def _may_share(self) -> bool:
        return self._shares and worth_sharing(self._max_running, self._kv.num_pages, self._kv.page_bytes, graphed=False)

    def _forward(self, tokens: Tensor, owners: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        known = torch.where(tokens == PENDING, self.latest[owners], tokens)
        return self._model.forward(known, positions, batch, self._kv)


def warm_plan(counts: list[int], num_pages: int, page_size: int) -> StepPlan:
    """A step with a row of so many tokens for each of `counts`, in sequences that are nobody's."""
    return _plan([(0, n, tuple((seq + i) % num_pages for i in range(-(-n // page_size)))) for seq, n in enumerate(counts)])


def decode_plan(page_size: int, tables: list[tuple[int, ...]]) -> StepPlan:
    """A step of one token for each of `tables`, which it fills, nobody's either."""
    return _plan([(len(table) * page_size - 1, len(table) * page_size, table) for table in tables])


def _plan(sequences: list[tuple[int, int, tuple[int, ...]]]) -> StepPlan:
    """A step that computes tokens [start, end) of each sequence, (start, end, its pages)."""
    how = SamplingParams(max_tokens=1, seed=0, top_p=0.9)
    new = tuple(NewSequence(seq, (0,) * end, end, pages, how, seq) for seq, (_, end, pages) in enumerate(sequences))
    rows = tuple(Row(seq, start, end - start, True) for seq, (start, end, _) in enumerate(sequences))
    return StepPlan(0, rows, new, (), (), ())
