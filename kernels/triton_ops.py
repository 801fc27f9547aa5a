"""The Triton kernels as the decoder calls them: the functions of `reference`, for tensors on a CUDA device (or in the interpreter).

Rows of one token go through the decode kernel, which splits long contexts over the chip and reads a prefix that all of them share
once, all others through the prefill kernel. In deterministic mode every row goes through the prefill kernel with one choice of tiles,
and norms, those of q and k too, have one choice of programs, so that a token's bits depend neither on the batch nor on how its prompt
was cut.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from . import rms_norm as norm
from .attention_tile import Scores
from .cascade import cascade_decode
from .layout import AttentionBatch
from .paged_decode import paged_decode
from .paged_prefill import PrefillLaunch, device_work, paged_prefill, prefill_launch
from .rope_write import RopeLaunch, rope_and_write_kv
from .silu_mul import silu_mul

# The table's entries go by the number of rows, and sums are added up in another order with each.
FIXED_NORM = norm.NormLaunch(elements=1, num_warps=4)
FIXED_ROPE = RopeLaunch(heads=8, num_warps=4)


def fixed_attention(group: int) -> PrefillLaunch:
    """The deterministic mode's tiles: the smallest that hold a group of query heads, whatever the batch."""
    return PrefillLaunch(block_m=max(16, triton.next_power_of_2(group)), block_n=32, num_warps=4, num_stages=2)


class TritonOps:
    """`worker.model.Ops` in Triton."""

    silu_mul = staticmethod(silu_mul)

    def __init__(self, deterministic: bool = False) -> None:
        fixed_norm = FIXED_NORM if deterministic else None
        self.rms_norm = partial(norm.rms_norm, launch=fixed_norm)
        self.add_rms_norm = partial(norm.add_rms_norm, launch=fixed_norm)
        self.rope_and_write_kv = partial(rope_and_write_kv, launch=FIXED_ROPE if deterministic else None)
        self._deterministic = deterministic

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
            key = decoded, tile_queries, scores.window
            if key not in batch.work:
                batch.work[key] = device_work(batch, *key, q.device)
            work = batch.work[key]
            paged_prefill(q, pages, batch, work, scores, out, launch=launch)
        return out
