"""Causal attention of chunks of queries over their rows' pages, those of earlier chunks included.

    out[t, h] = softmax(q[t, h] k^T * scale) v      over keys [max(0, p - window + 1), p] of t's row, p the position of token t

A program takes one tile of one row's queries for one KV head: the tile's rows are queries times the head's group, so keys are
read once for the group, whatever its size. Which tiles there are stands in a work list on the device, longest first, so that
chunks of any lengths and rows of one token fill one grid. Keys that every query of a tile sees are walked over without masks.

A query's result does not depend on its tile: tiles of keys start at fixed positions, and a hidden tile leaves the running softmax as
it was, bit for bit. So with one launch's parameters the same token gives the same bits alone, in a batch, and however its prompt
was cut into chunks; decode rows that go through this kernel too agree with their own recompute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import EVERYTHING, NO_KEY, Scores, absorb, check_pages, finished, readable, scores_of, slots_of, unit_of, widened
from .launch import Chip, Shape, bucket_of, chip, dtype_name, itemsize, launch_of
from .layout import AttentionBatch


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """Parameters of one launch. A tile has `block_m` query rows (queries times group) and meets `block_n` keys at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def _walk(
    acc, row_max, row_sum, queries, position, begin, lowest, end,
    k_base, v_base, table, scale, soft_cap, window, stride_page, stride_slot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [max(begin, lowest), end) into the running softmax. Without MASKED all of them are seen by every query."""
    d = tl.arange(0, BLOCK_D)
    unit = unit_of(scale, soft_cap, HAS_CAP)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < end
        if HAS_WINDOW:
            there &= key >= lowest
        if MASKED:
            at = slots_of(table, key, there, stride_page, stride_slot, PAGE)[:, None] + d[None, :]
        else:
            at = slots_of(table, key, None, stride_page, stride_slot, PAGE)[:, None] + d[None, :]
        if D != BLOCK_D:
            loaded = there[:, None] & (d < D)[None, :]
            k = tl.load(k_base + at, mask=loaded, other=0.0)
            v = tl.load(v_base + at, mask=loaded, other=0.0)
        elif MASKED:
            k = tl.load(k_base + at, mask=there[:, None], other=0.0)
            v = tl.load(v_base + at, mask=there[:, None], other=0.0)
        else:
            k = tl.load(k_base + at)
            v = tl.load(v_base + at)
        k = widened(k, queries)
        v = widened(v, queries)
        s = scores_of(queries, k, scale, soft_cap, HAS_CAP)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen &= key[None, :] > position[:, None] - window
            s = tl.where(seen, s, float("-inf"))
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, s, unit, v)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["window", "stride_table"])
def _prefill_kernel(
    q, pages, tables, row_starts, kv_lens, work, out, lse,
    scale, soft_cap, window,
    stride_q_token, stride_q_head, stride_page, stride_head, stride_kv, stride_slot, stride_table, stride_out_token, stride_out_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    row = tl.load(work + tile * 2)
    if row < 0:
        return
    first_query = tl.load(work + tile * 2 + 1)
    row_start = tl.load(row_starts + row)
    row_len = tl.load(row_starts + row + 1) - row_start
    kv_len = tl.load(kv_lens + row)
    tile_queries = tl.minimum(BLOCK_M // GROUP, row_len - first_query)
    first_position = kv_len - row_len + first_query
    end = first_position + tile_queries

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = m < tile_queries * GROUP
    cell = real[:, None] & (d < D)[None, :]
    token = (row_start + first_query + m // GROUP).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    position = first_position + m // GROUP
    queries = tl.load(q + token[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :], mask=cell, other=0.0)
    if pages.dtype.element_ty.primitive_bitwidth == 8:
        queries = queries.to(tl.float16)

    k_base = pages + kv_head.to(tl.int64) * stride_head
    v_base = k_base + stride_kv
    table = tables + row.to(tl.int64) * stride_table
    row_max = tl.full((BLOCK_M,), NO_KEY, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(first_position - window + 1, 0)
        masked_from = lowest // BLOCK_N * BLOCK_N
    else:
        masked_from = (first_position + 1) // BLOCK_N * BLOCK_N
        acc, row_max, row_sum = _walk(
            acc, row_max, row_sum, queries, position, 0, 0, masked_from,
            k_base, v_base, table, scale, soft_cap, window, stride_page, stride_slot,
            D, BLOCK_D, BLOCK_N, PAGE, HAS_CAP, HAS_WINDOW, False,
        )  # fmt: skip
    acc, row_max, row_sum = _walk(
        acc, row_max, row_sum, queries, position, masked_from, lowest, end,
        k_base, v_base, table, scale, soft_cap, window, stride_page, stride_slot,
        D, BLOCK_D, BLOCK_N, PAGE, HAS_CAP, HAS_WINDOW, True,
    )  # fmt: skip
    result, row_lse = finished(acc, row_max, row_sum)
    at_out = token[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=cell)
    if HAS_LSE:
        tl.store(lse + token * heads + head, row_lse, mask=real)


def work_list(batch: AttentionBatch, first_row: int, tile_queries: int, window: int = EVERYTHING) -> np.ndarray:
    """Tiles of the rows from `first_row` on: int32 [tiles, 2] of (row, first query in the row), most keys first.

    Args:
        batch: the rows.
        first_row: rows before it are somebody else's work.
        tile_queries: queries of one tile.
        window: keys that a query sees at most.
    """
    lens = np.asarray(batch.row_lens[first_row:], np.int64)
    kv_lens = np.asarray(batch.kv_lens_list[first_row:], np.int64)
    counts = -(-lens // tile_queries)
    rows = np.repeat(np.arange(len(lens)), counts)
    first = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_queries
    last = np.minimum(first + tile_queries, lens[rows])
    keys = np.minimum(kv_lens[rows] - lens[rows] + last, window + last - first)
    order = np.argsort(-keys, kind="stable")
    return np.stack((rows + first_row, first), axis=1)[order].astype(np.int32)


def prefill_rule(shape: Shape, on: Chip) -> PrefillLaunch:
    """The largest tiles that compile without spilling. A warp group of sm_90 takes 64 query rows; two of them share their keys.

    float32 products hold their operands in registers, in three parts each: small tiles, for tests rather than for speed.
    """
    wide = shape.head_dim > 128
    if itemsize(shape.dtype) == 4:
        rows = triton.next_power_of_2(max(shape.group, 16))
        return PrefillLaunch(rows, 16, 8, 3) if wide else PrefillLaunch(rows, 32, 4, 3)
    if wide:
        return PrefillLaunch(128 if on.arch == 90 else 64, 32, 8, 3)
    if on.arch < 90:
        return PrefillLaunch(128, 32, 8, 3)
    return PrefillLaunch(128, 128, 8, 3) if on.arch >= 100 and shape.head_dim == 64 else PrefillLaunch(128, 64, 8, 5)


def prefill_launch(q: Tensor, pages: Tensor) -> PrefillLaunch:
    """The table's or the rule's parameters for these queries and pages; `block_m` fixes the tiles of the work list."""
    group = q.shape[1] // pages.shape[1]
    shape = Shape("paged_prefill", dtype_name(q.dtype, pages.dtype), q.shape[2], group, pages.shape[3], bucket_of(q.shape[0]))
    return launch_of(PrefillLaunch, prefill_rule, shape, chip(q.device))


def paged_prefill(
    q: Tensor,
    pages: Tensor,
    batch: AttentionBatch,
    work: Tensor,
    scores: Scores,
    out: Tensor,
    lse: Tensor | None = None,
    launch: PrefillLaunch | None = None,
) -> None:
    """Attention of the tiles in `work`; tokens of other rows are left as they are.

    Args:
        q: [T, Hq, D], float32, float16 or bfloat16; the last axis without gaps.
        pages: layer view [P, Hkv, 2, page_size, D] that already holds this step's K and V, in q's type or float8_e4m3fn.
        batch: the rows.
        work: int32 [tiles, 2], what `work_list` gives for `launch.block_m // group` queries a tile, on q's device. Row -1: no tile.
        scores: scale, window, soft cap.
        out: [T, Hq, D], written.
        lse: float32 [T, Hq] contiguous, written with the log-sum-exp of the scores; None if nobody asks.
        launch: parameters that `work` was made for; None for those of `prefill_launch`.

    Raises:
        ValueError: the shapes do not go together, an innermost axis has gaps, or a tile is smaller than a group.
    """
    check_pages(q, pages)
    on = chip(q.device)
    launch = prefill_launch(q, pages) if launch is None else launch
    kv_heads, page_size, dim = pages.shape[1], pages.shape[3], pages.shape[4]
    group = q.shape[1] // kv_heads
    if launch.block_m < group:
        raise ValueError(f"a tile of {launch.block_m} query rows does not hold a group of {group} heads")
    _prefill_kernel[(work.shape[0], kv_heads)](
        q, readable(pages, on), batch.block_tables, batch.row_starts, batch.kv_lens, work, out, lse,
        scores.scale, scores.soft_cap or 1.0, scores.window,
        q.stride(0), q.stride(1), pages.stride(0), pages.stride(1), pages.stride(2), pages.stride(3), batch.block_tables.stride(0),
        out.stride(0), out.stride(1),
        D=dim, BLOCK_D=triton.next_power_of_2(dim), GROUP=group, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, PAGE=page_size,
        HAS_CAP=scores.soft_cap is not None, HAS_WINDOW=scores.sliding_window is not None, HAS_LSE=lse is not None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def device_work(batch: AttentionBatch, first_row: int, tile_queries: int, window: int, device: torch.device) -> Tensor:
    """`work_list` on the device; the copy does not wait where the host's side is pinned."""
    host = torch.from_numpy(work_list(batch, first_row, tile_queries, window))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
