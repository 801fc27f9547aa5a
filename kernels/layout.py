"""What every attention kernel is told about a step's batch: which tokens belong to which row, and where a row's pages are.

Rows are sequences (or chunks of them). The pool's layout is in the strides of the layer view that the kernels get:
`[pages, kv_heads, 2, page_size, head_dim]`, where 0 is K and 1 is V on the third axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step's rows. T tokens in all, R rows, block tables W pages wide; tensors are on the model's device.

    Attributes:
        row_starts: int32 [R + 1]; row r's tokens are [row_starts[r], row_starts[r + 1]) of the batch.
        kv_lens: int32 [R]; keys visible to the row's last token, that is the context after this step's write.
        block_tables: int32 [R, W]; entries past a row's last page may hold anything.
        slots: int64 [T]; page * page_size + offset where token t's K and V go.
        num_decode: the first so many rows have exactly one token each.
        row_lens: row_starts' differences, on the host.
        kv_lens_list: kv_lens, on the host.
        prefix_pages: so many pages, whole ones, begin the table of every decode row, and may be read once for all of them.
        work: what kernels have derived of the above, by a key of theirs: all layers share it, and a graph that reads it keeps it.
    """

    row_starts: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    num_decode: int
    row_lens: tuple[int, ...]
    kv_lens_list: tuple[int, ...]
    prefix_pages: int = 0
    work: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)


def attention_batch(rows: list[tuple[int, int, list[int]]], page_size: int, device: torch.device | str = "cpu") -> AttentionBatch:
    """The batch of `rows`, each (position of the first token, number of tokens, page ids).

    Rows of one token must stand first to be counted as decode rows. A plain way for tests, benchmarks and offline scoring; the
    runner keeps its tables between steps instead.
    """
    num_decode = 0
    while num_decode < len(rows) and rows[num_decode][1] == 1:
        num_decode += 1
    row_lens = tuple(count for _, count, _ in rows)
    kv_lens = tuple(start + count for start, count, _ in rows)
    starts = [0]
    slots: list[int] = []
    width = max(len(pages) for _, _, pages in rows)
    for start, count, pages in rows:
        starts.append(starts[-1] + count)
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(start, start + count)]
    tables = [pages + [0] * (width - len(pages)) for _, _, pages in rows]
    return AttentionBatch(
        row_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        num_decode=num_decode,
        row_lens=row_lens,
        kv_lens_list=kv_lens,
    )
