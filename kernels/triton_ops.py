"""The Triton kernels as the decoder calls them: the functions of `reference`, for tensors on a CUDA device (or in the interpreter).

Rows of one token go through the decode kernel, which splits long contexts over the chip and reads a prefix that all of them share
once, all others through the prefill kernel. In deterministic mode every row goes through the prefill kernel with one choice of tiles,
and norms take one row a program, so that a token's bits depend neither on the batch nor on how its prompt was cut.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import rms_norm as norm
from .attention_tile import Scores
from .cascade import cascade_decode
from .layout import AttentionBatch
from .paged_decode import paged_decode
from .paged_prefill import PrefillLaunch, device_work, paged_prefill, prefill_launch
from .rope_write import rope_and_write_kv
from .silu_mul import silu_mul

FIXED_NORM = norm.NormLaunch(elements=1, num_warps=4)


def fixed_attention(group: int) -> PrefillLaunch:
    """The deterministic mode's tiles: the smallest that hold a group of query heads, whatever the batch."""
    return PrefillLaunch(block_m=max(16, triton.next_power_of_2(group)), block_n=32, num_warps=4, num_stages=2)


class TritonOps:
    """`worker.model.Ops` in Triton. One for a model: it keeps the latest batch's work lists between layers."""

    silu_mul = staticmethod(silu_mul)
    rope_and_write_kv = staticmethod(rope_and_write_kv)

    def __init__(self, deterministic: bool = False) -> None:
        self._norm = FIXED_NORM if deterministic else None
        self._deterministic = deterministic
        self._batch: AttentionBatch | None = None
        self._work: dict[tuple[int, int, int], Tensor] = {}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `reference.rms_norm`."""
        return norm.rms_norm(x, weight, eps, self._norm)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `reference.add_rms_norm`."""
        return norm.add_rms_norm(x, residual, weight, eps, self._norm)

    def paged_attention(self, q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None) -> Tensor:
        """See `reference.paged_attention`; a row of kv_len 0 is padding and becomes zeros."""
        scores = Scores(scale, sliding_window)
        out = torch.empty_like(q)
        decoded = 0 if self._deterministic else batch.num_decode
        if decoded:
            rows = q[:decoded], pages, batch.block_tables[:decoded], batch.kv_lens[:decoded]
            if batch.prefix_pages and sliding_window is None:
                cascade_decode(*rows, batch.prefix_pages, scores, out[:decoded])
            else:
                paged_decode(*rows, scores, out[:decoded])
        if decoded < len(batch.row_lens):
            group = q.shape[1] // pages.shape[1]
            launch = fixed_attention(group) if self._deterministic else prefill_launch(q, pages)
            tile_queries = max(1, launch.block_m // group)
            work = self._work_of(batch, decoded, tile_queries, scores.window, q.device)
            paged_prefill(q, pages, batch, work, scores, out, launch=launch)
        return out

    def _work_of(self, batch: AttentionBatch, first_row: int, tile_queries: int, window: int, device: torch.device) -> Tensor:
        """The work list, made once a batch: all layers of a kind share it."""
        if batch is not self._batch:
            self._batch = batch
            self._work.clear()
        key = (first_row, tile_queries, window)
        if key not in self._work:
            self._work[key] = device_work(batch, first_row, tile_queries, window, device)
        return self._work[key]
