"""Attention of one query a row over its own pages, with the keys of a row split over programs.

    out[b, h] = softmax(q[b, h] k^T * scale) v      over the keys [max(0, kv_len - window), kv_len) of row b

A program takes one (row, KV head, split). The query heads of a KV head are the rows of one small matrix product, padded to 16,
so that keys are read once and meet the tensor cores. The grid depends on shapes alone (a captured CUDA graph keeps it); how many
of its splits a row uses is computed in the programs from the row's length, and the others leave at once:

    keys a split = max(min_split_keys, ceil(visible / splits)), rounded up to whole tiles

A row of one split is written straight to `out`. The others leave partial results for a second kernel, which weighs them by their
log-sum-exp; it is not launched if the grid has one split, and leaves at once for rows of one. A row with kv_len 0 (padding) reads
nothing and becomes zeros, its log-sum-exp -inf.

`prefix_decode` is the same kernel with many queries a row: all of them look at the same keys, the pages of a shared prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOG2_E, NO_KEY, Scores, absorb, check_pages, finished, readable, scores_of, slots_of, unit_of, widened
from .launch import Chip, Shape, bucket_of, chip, dtype_name, itemsize, launch_of

TILE_BYTES = 16 * 1024
ROOMY_BYTES = 160 * 1024
SMALLEST_DOT = 16  # rows of the smallest matrix product
COMBINED_AT_ONCE = 16  # partial results that the second kernel holds
PROGRAMS_PER_MULTIPROCESSOR = 2
PREFIX_ROWS = 64  # query rows that meet a shared prefix together


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """Parameters of one launch. `block_n`: keys of a tile. Splits have at least `min_split_keys` keys; at most `max_splits` a row."""

    block_n: int
    num_warps: int
    num_stages: int
    min_split_keys: int = 256
    max_splits: int = 32


@triton.jit
def _split_keys(visible, num_splits, min_split_keys, BLOCK_N: tl.constexpr):
    """Keys of one split of a row with `visible` keys: a multiple of BLOCK_N."""
    keys = tl.maximum(min_split_keys, tl.cdiv(visible, num_splits))
    return tl.cdiv(keys, BLOCK_N) * BLOCK_N


@triton.jit
def _first_key(kv_len, window, BLOCK_N: tl.constexpr):
    """The first visible key, rounded down to a tile's start."""
    return tl.maximum(kv_len - window, 0) // BLOCK_N * BLOCK_N


# Not on the alignment of the tables: behind a shared prefix they begin anywhere.
@triton.jit(
    do_not_specialize=["window", "num_splits", "min_split_keys", "num_queries", "stride_table"], do_not_specialize_on_alignment=["tables"]
)
def _decode_kernel(
    q, pages, tables, kv_lens, out, lse, partial, partial_lse,
    scale, soft_cap, window, num_splits, min_split_keys, num_queries,
    stride_q_token, stride_q_head, stride_page, stride_head, stride_kv, stride_slot, stride_table, stride_len,
    stride_out_token, stride_out_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, HAS_CAP: tl.constexpr, HAS_LSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    kv_len = tl.load(kv_lens + row * stride_len)
    first = _first_key(kv_len, window, BLOCK_N)
    split_keys = _split_keys(kv_len - first, num_splits, min_split_keys, BLOCK_N)
    begin = first + split * split_keys
    if (begin >= kv_len) & (split > 0):
        return
    end = tl.minimum(begin + split_keys, kv_len)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = row * QUERIES + m // GROUP
    head = kv_head * GROUP + m % GROUP
    real = (m < QUERIES * GROUP) & (query < num_queries)
    cell = real[:, None] & (d < D)[None, :]
    at_q = query.to(tl.int64)[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    queries = tl.load(q + at_q, mask=cell, other=0.0)
    if pages.dtype.element_ty.primitive_bitwidth == 8:
        queries = queries.to(tl.float16)

    k_base = pages + kv_head.to(tl.int64) * stride_head
    v_base = k_base + stride_kv
    table = tables + row.to(tl.int64) * stride_table
    lowest = kv_len - window
    unit = unit_of(scale, soft_cap, HAS_CAP)
    row_max = tl.full((BLOCK_M,), NO_KEY, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = (key < end) & (key >= lowest)
        at = slots_of(table, key, there, stride_page, stride_slot, PAGE)[:, None] + d[None, :]
        if D == BLOCK_D:
            loaded = there[:, None]
        else:
            loaded = there[:, None] & (d < D)[None, :]
        k = widened(tl.load(k_base + at, mask=loaded, other=0.0), queries)
        v = widened(tl.load(v_base + at, mask=loaded, other=0.0), queries)
        s = scores_of(queries, k, scale, soft_cap, HAS_CAP)
        s = tl.where(there[None, :], s, float("-inf"))
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, s, unit, v)
    result, row_lse = finished(acc, row_max, row_sum)

    at_lse = query.to(tl.int64) * (kv_heads * GROUP) + head
    if SPLIT:
        one_split = m * 0 + first + split_keys >= kv_len
        at_part = at_lse * num_splits + split
        tl.store(partial + at_part[:, None] * D + d[None, :], result, mask=cell & (one_split == 0)[:, None])
        tl.store(partial_lse + at_part, row_lse, mask=real & (one_split == 0))
        cell &= one_split[:, None]
        real &= one_split
    at_out = query.to(tl.int64)[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=cell)
    if HAS_LSE:
        tl.store(lse + at_lse, row_lse, mask=real)


@triton.jit(do_not_specialize=["window", "num_splits", "min_split_keys"])
def _combine_kernel(
    partial, partial_lse, kv_lens, out, lse,
    window, num_splits, min_split_keys, stride_len, stride_out_token, stride_out_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One (query, head): out = sum_i e^(lse_i - lse) partial_i with lse = log sum_i e^lse_i."""
    query, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    kv_len = tl.load(kv_lens + query // QUERIES * stride_len)
    visible = kv_len - _first_key(kv_len, window, BLOCK_N)
    split_keys = _split_keys(visible, num_splits, min_split_keys, BLOCK_N)
    used = tl.cdiv(visible, split_keys)
    if used <= 1:
        return
    d = tl.arange(0, BLOCK_D)
    base = (query.to(tl.int64) * heads + head) * num_splits
    largest = tl.full((1,), NO_KEY, tl.float32)
    weight_sum = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, used, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        there = split < used
        part_lse = tl.load(partial_lse + base + split, mask=there, other=float("-inf"))
        at = (base + split)[:, None] * D + d[None, :]
        part = tl.load(partial + at, mask=there[:, None] & (d < D)[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(part_lse, 0))
        shrink = tl.exp2((largest - new_largest) * LOG2_E)
        weight = tl.exp2((part_lse - new_largest) * LOG2_E)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        weight_sum = weight_sum * shrink + tl.sum(weight, 0)
        largest = new_largest
    at_out = query.to(tl.int64) * stride_out_token + head * stride_out_head + d
    tl.store(out + at_out, (acc / weight_sum).to(out.dtype.element_ty), mask=d < D)
    if HAS_LSE:
        total = largest + tl.log2(weight_sum) / LOG2_E
        tl.store(lse + query * heads + head + tl.arange(0, 1), total)


def decode_rule(shape: Shape, on: Chip) -> DecodeLaunch:
    """Tiles of 16 KiB of keys and as many of values; where shared memory allows it two of each are on their way while one is used.

    A tile needs the block table before it can be asked for, which takes every second stage: 5 stages are two tiles in flight.
    """
    dim, size = triton.next_power_of_2(shape.head_dim), itemsize(shape.dtype)
    block_n = min(max(TILE_BYTES // (dim * size), 16), 128)
    deep = 5 if on.shared_bytes >= ROOMY_BYTES else 3
    if dim * size > 512:  # float32 products hold their operands in registers, in three parts each
        return DecodeLaunch(block_n, num_warps=8, num_stages=3)
    return DecodeLaunch(block_n, num_warps=4, num_stages=deep)


def prefix_rule(shape: Shape, on: Chip) -> DecodeLaunch:
    """As `decode_rule`, with four times the query rows: more warps where a warp group does not hold them, and smaller tiles on sm_100,
    where the compiler gives eight warps half of the registers."""
    launch = decode_rule(shape, on)
    if shape.head_dim <= 128 and on.arch == 90:
        return launch
    smaller = min(32, 4096 // triton.next_power_of_2(shape.head_dim))
    return DecodeLaunch(min(launch.block_n, smaller) if on.arch >= 100 else launch.block_n, num_warps=8, num_stages=3)


def paged_decode(
    q: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    kv_lens: Tensor,
    scores: Scores,
    out: Tensor,
    lse: Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> None:
    """Attention of one query a row.

    Args:
        q: [B, Hq, D], float32, float16 or bfloat16; the last axis without gaps.
        pages: layer view [P, Hkv, 2, page_size, D] in q's type or float8_e4m3fn, any strides but the last.
        block_tables: int32 [B, W], any row stride; entries past a row's last page may hold anything.
        kv_lens: int32 [B]; keys that the row sees, its own included. 0 is a padded row: zeros come out.
        scores: scale, window, soft cap.
        out: [B, Hq, D], written.
        lse: float32 [B, Hq] contiguous, written with the log-sum-exp of the scores; None if nobody asks.
        launch: parameters other than the table's.

    Raises:
        ValueError: the shapes do not go together, or an innermost axis has gaps.
    """
    _attend(_Rows(q, pages, block_tables, kv_lens, 1, block_tables.stride(0), 1), scores, out, lse, launch)


def prefix_decode(
    q: Tensor,
    pages: Tensor,
    prefix_table: Tensor,
    prefix_len: Tensor,
    scores: Scores,
    out: Tensor,
    lse: Tensor,
    launch: DecodeLaunch | None = None,
) -> None:
    """Attention of many queries over the same keys: the pages of a prefix that B sequences share are read once for several queries.

    Args:
        q: [B, Hq, D].
        pages: as for `paged_decode`.
        prefix_table: int32 [W], the prefix's pages.
        prefix_len: int32 [1], its keys, on the device.
        scores: without a sliding window.
        out: [B, Hq, D], written.
        lse: float32 [B, Hq] contiguous, written.
        launch: parameters other than the table's.

    Raises:
        ValueError: as `paged_decode`, or there is a window (queries at different positions would see different keys).
    """
    if scores.sliding_window is not None:
        raise ValueError("a shared prefix and a sliding window do not go together")
    tile_rows = SMALLEST_DOT if pages.dtype == torch.float32 else PREFIX_ROWS
    queries = max(1, tile_rows * pages.shape[1] // q.shape[1])
    _attend(_Rows(q, pages, prefix_table[None], prefix_len, queries, 0, 0), scores, out, lse, launch)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Queries and where their keys are: `queries` of them share a row of the tables."""

    q: Tensor
    pages: Tensor
    tables: Tensor
    kv_lens: Tensor
    queries: int
    stride_table: int
    stride_len: int


def num_splits(rows: int, kv_heads: int, width_keys: int, launch: DecodeLaunch, on: Chip) -> int:
    """Splits in the grid, from shapes alone: enough programs to fill the chip, none that no row could use."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * on.multiprocessors, rows * kv_heads)
    return max(1, min(wanted, triton.cdiv(width_keys, launch.min_split_keys), launch.max_splits))


def _attend(rows: _Rows, scores: Scores, out: Tensor, lse: Tensor | None, launch: DecodeLaunch | None) -> None:
    q, pages = rows.q, rows.pages
    check_pages(q, pages)
    on = chip(q.device)
    (count, heads, dim), (_, kv_heads, _, page_size, _) = q.shape, pages.shape
    group = heads // kv_heads
    block_m = max(SMALLEST_DOT, triton.next_power_of_2(group * rows.queries))
    if launch is None:
        kernel, rule = ("paged_decode", decode_rule) if rows.queries == 1 else ("prefix_decode", prefix_rule)
        shape = Shape(kernel, dtype_name(q.dtype, pages.dtype), dim, group, page_size, bucket_of(count))
        launch = launch_of(DecodeLaunch, rule, shape, on)
    tiles = triton.cdiv(count, rows.queries)
    splits = num_splits(tiles, kv_heads, rows.tables.shape[1] * page_size, launch, on)
    partial = torch.empty(count * heads * splits * dim if splits > 1 else 0, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(count * heads * splits if splits > 1 else 0, dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(dim)
    _decode_kernel[(tiles, kv_heads, splits)](
        q, readable(pages, on), rows.tables, rows.kv_lens, out, lse, partial, partial_lse,
        scores.scale, scores.soft_cap or 1.0, scores.window, splits, launch.min_split_keys, count,
        q.stride(0), q.stride(1), pages.stride(0), pages.stride(1), pages.stride(2), pages.stride(3), rows.stride_table, rows.stride_len,
        out.stride(0), out.stride(1),
        D=dim, BLOCK_D=block_d, GROUP=group, QUERIES=rows.queries, BLOCK_M=block_m, BLOCK_N=launch.block_n,
        PAGE=page_size, HAS_CAP=scores.soft_cap is not None, HAS_LSE=lse is not None, SPLIT=splits > 1,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(count, heads)](
            partial, partial_lse, rows.kv_lens, out, lse,
            scores.window, splits, launch.min_split_keys, rows.stride_len, out.stride(0), out.stride(1),
            D=dim, BLOCK_D=block_d, QUERIES=rows.queries, BLOCK_N=launch.block_n, BLOCK_S=COMBINED_AT_ONCE, HAS_LSE=lse is not None,
            num_warps=4,
        )  # fmt: skip
