"""Decode of sequences that begin with the same pages: the prefix is read once for several of them, the rest by each on its own.

Attention over all keys is the merge of attention over the prefix and over what follows (see `merge_states`). Rows keep nothing else in
common: their positions are in the keys already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_tile import Scores
from .merge_states import merge_states
from .paged_decode import paged_decode, prefix_decode


def cascade_decode(q: Tensor, pages: Tensor, block_tables: Tensor, kv_lens: Tensor, prefix_pages: int, scores: Scores, out: Tensor) -> None:
    """`paged_decode` of rows whose block tables begin with the same `prefix_pages` pages.

    Args:
        q: [B, Hq, D].
        pages: layer view [P, Hkv, 2, page_size, D].
        block_tables: int32 [B, W]; the first `prefix_pages` columns are alike in all rows.
        kv_lens: int32 [B]; all at least the prefix's keys, but for padded rows of 0, which get the prefix's attention.
        prefix_pages: whole pages, at least one.
        scores: without a sliding window.
        out: [B, Hq, D], contiguous, written.

    Raises:
        ValueError: there is a window, or the shapes do not go together.
    """
    prefix_keys = prefix_pages * pages.shape[3]
    rest = (kv_lens - prefix_keys).clamp_(min=0)
    prefix_len = torch.full((1,), prefix_keys, dtype=torch.int32, device=q.device)
    shared, own = torch.empty(2, *q.shape, dtype=torch.float32, device=q.device)
    # Not halves of one tensor: kernels are compiled for pointers that are multiples of 16, and the second half may begin anywhere.
    shared_lse, own_lse = (torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2))
    prefix_decode(q, pages, block_tables[0, :prefix_pages], prefix_len, scores, shared, shared_lse)
    paged_decode(q, pages, block_tables[:, prefix_pages:], rest, scores, own, own_lse)
    merge_states(shared, shared_lse, own, own_lse, out)
