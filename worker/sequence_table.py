"""What a rank was told of each sequence, in a slot of three arrays on the host (tokens, block table, length).

So the inputs of a step are gathered with a few NumPy operations whatever the batch, and a plan carries differences only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.layout import AttentionBatch
from .plan import NewSequence, Row, StepPlan
from .protocol import SamplingParams

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class Slot:
    """One known sequence: its place in the arrays, and what the sampler needs."""

    index: int
    params: SamplingParams
    seed: int
    prompt_len: int
    num_tokens: int
    num_pages: int


class Gathered(NamedTuple):
    """One step's inputs on the host, and the rows in the order in which they are computed: those of one token first. T tokens, R rows."""

    rows: list[Row]
    owners: Int64Array  # [T] each token's place in the arrays
    tokens: Int64Array  # [T] PENDING where the token is not known here yet
    positions: Int64Array  # [T]
    slots: Int64Array  # [T]
    row_starts: Int64Array  # [R + 1]
    kv_lens: Int64Array  # [R]
    tables: Int32Array  # [R, W]
    num_decode: int


class Inputs(NamedTuple):
    """One step's inputs, on the model's device, and the rows in the order in which they are computed."""

    rows: list[Row]
    tokens: torch.Tensor
    positions: torch.Tensor
    batch: AttentionBatch
    ends: Int64Array  # for each row, the index after its last token


PENDING = -1  # a token that was sampled, and has not come from the device yet


class SequenceTable:
    """The known sequences.

    Args:
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
        page_size: tokens in a page.
        device: where the inputs go.
    """

    def __init__(self, max_running: int, max_len: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        self._tokens = np.zeros((max_running, max_len + 1), np.int32)
        self._tables = np.zeros((max_running, -(-max_len // page_size)), np.int32)
        self._free = list(range(max_running - 1, -1, -1))
        self._slots: dict[int, Slot] = {}

    def __getitem__(self, seq: int) -> Slot:
        return self._slots[seq]

    def knows(self, seq: int, slot: Slot) -> bool:
        """Whether `slot` is still the sequence's."""
        return self._slots.get(seq) is slot

    def reset(self) -> None:
        """Forget every sequence."""
        self._slots.clear()
        self._free = list(range(len(self._tokens) - 1, -1, -1))

    def apply(self, plan: StepPlan) -> None:
        """Take in what the plan says of sequences: forget, new, pages."""
        for seq in plan.forget:
            self._free.append(self._slots.pop(seq).index)
        for new in plan.new:
            self._learn(new)
        for seq, pages in plan.pages:
            slot = self._slots[seq]
            self._tables[slot.index, slot.num_pages : slot.num_pages + len(pages)] = pages
            slot.num_pages += len(pages)

    def tokens(self, slot: Slot) -> Int32Array:
        """The sequence's tokens; a view."""
        return self._tokens[slot.index, : slot.num_tokens]

    def append(self, slot: Slot, token: int) -> None:
        """The sequence's next token."""
        self._tokens[slot.index, slot.num_tokens] = token
        slot.num_tokens += 1

    def settle(self, slot: Slot, position: int, token: int) -> None:
        """The token at `position`, which was PENDING."""
        self._tokens[slot.index, position] = token

    def inputs(self, planned: tuple[Row, ...]) -> Inputs:
        """The tensors of a step that computes `planned`."""
        found = self.gather(planned)
        batch = AttentionBatch(
            row_starts=self._to_device(found.row_starts.astype(np.int32)),
            kv_lens=self._to_device(found.kv_lens.astype(np.int32)),
            block_tables=self._to_device(found.tables),
            slots=self._to_device(found.slots),
            num_decode=found.num_decode,
            row_lens=tuple(np.diff(found.row_starts).tolist()),
            kv_lens_list=tuple(found.kv_lens.tolist()),
        )
        return Inputs(found.rows, self._to_device(found.tokens), self._to_device(found.positions), batch, found.row_starts[1:])

    def gather(self, planned: tuple[Row, ...]) -> Gathered:
        """What a step that computes `planned` reads of the arrays."""
        rows = sorted(planned, key=lambda row: row.num_tokens > 1)  # stable: rows of one token first
        size = self._page_size
        slots = np.fromiter((self._slots[row.seq].index for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        num_decode = int((counts == 1).sum())
        row_starts = np.concatenate(([0], np.cumsum(counts)))
        if num_decode == len(rows):
            owners, positions = slots, starts
        else:
            owners = np.repeat(slots, counts)
            positions = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1] - starts, counts)
        kv_lens = starts + counts
        width = -(-int(kv_lens.max()) // size)
        kv_slots = self._tables[owners, positions // size].astype(np.int64) * size + positions % size
        tokens = self._tokens[owners, positions].astype(np.int64)
        return Gathered(rows, owners, tokens, positions, kv_slots, row_starts, kv_lens, self._tables[slots, :width], num_decode)

    def _learn(self, new: NewSequence) -> None:
        index = self._free.pop()
        self._tokens[index, : len(new.tokens)] = new.tokens
        self._tables[index, : len(new.pages)] = new.pages
        self._slots[new.seq] = Slot(index, new.params, new.seed, new.prompt_len, len(new.tokens), len(new.pages))

    def _to_device(self, array: Int32Array | Int64Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
