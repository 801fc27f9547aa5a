"""Paged prefill of mixed batches against the float64 oracle, its work list, and the promise that tiles leave no trace in the bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from interpreter import FP8, Rows, error, paged, poison, random, tolerance
from torch import Tensor

from quire.kernels import reference
from quire.kernels.attention_tile import Scores
from quire.kernels.layout import AttentionBatch, attention_batch
from quire.kernels.paged_prefill import PrefillLaunch, device_work, paged_prefill, work_list

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SMALL = PrefillLaunch(block_m=32, block_n=32, num_warps=4, num_stages=1)
MIXED = (40, 1), (0, 1), (0, 17), (31, 34), (64, 3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def prefill(
    q: Tensor, pages: Tensor, batch: AttentionBatch, scores: Scores, launch: PrefillLaunch = SMALL, first_row: int = 0
) -> tuple[Tensor, Tensor]:
    device = q.device
    out, lse = poison(q.shape, q.dtype, device.type), poison(q.shape[:2], FP32, device.type)
    work = device_work(batch, first_row, launch.block_m // (q.shape[1] // pages.shape[1]), scores.window, device)
    paged_prefill(q, pages, batch, work, scores, out, lse, launch)
    return out, lse


def check(
    rows: Rows, heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, device: str,
    launch: PrefillLaunch = SMALL, stored: torch.dtype | None = None, window: int | None = None, soft_cap: float | None = None,
) -> None:  # fmt: skip
    batch, pages = paged(rows, kv_heads, dim, page_size, stored or dtype, device, window)
    q = random((sum(batch.row_lens), heads, dim), dtype, device)
    out, lse = prefill(q, pages, batch, Scores(dim**-0.5, window, soft_cap), launch)
    expected, expected_lse = reference.attention_states(q, pages, batch, dim**-0.5, window, soft_cap)
    allowed = max(tolerance(dtype), tolerance(FP16)) if stored else tolerance(dtype)  # fp8 keys are met in float16
    assert error(out, expected) <= allowed
    assert error(lse, expected_lse) <= allowed


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_mixed_batch(dtype: torch.dtype, device: str) -> None:
    check(MIXED, 4, 1, 64, 16, dtype, device)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_around_pages(page_size: int, extra: int, device: str) -> None:
    check([(0, page_size + extra), (page_size, page_size + extra)], 1, 1, 64, page_size, FP32, device)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_groups(group: int, dtype: torch.dtype, device: str) -> None:
    check([(20, 9), (3, 1)], 2 * group, 2, 64, 32, dtype, device)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_head_dimensions(dim: int, dtype: torch.dtype, device: str) -> None:
    check([(37, 13)], 2, 1, dim, 32, dtype, device)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("dim", [80, 128])
def test_fp8_pages(dtype: torch.dtype, dim: int, device: str) -> None:
    check([(37, 13)], 2, 1, dim, 32, dtype, device, stored=FP8)


@pytest.mark.parametrize("window", [1, 16, 40, 1000])
def test_sliding_windows(window: int, device: str) -> None:
    check([(90, 20), (0, 40)], 2, 1, 64, 16, FP32, device, window=window)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_caps(soft_cap: float, device: str) -> None:
    check([(37, 13)], 2, 1, 64, 16, FP32, device, soft_cap=soft_cap)
    check([(37, 13)], 2, 1, 64, 16, BF16, device, soft_cap=soft_cap, window=20)


def test_rows_before_the_first_are_left_alone(device: str) -> None:
    batch, pages = paged(MIXED, 1, 64, 16, FP32, device)
    q = random((56, 2, 64), FP32, device)
    out, lse = prefill(q, pages, batch, Scores(0.125), first_row=2)
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert error(out[2:], reference.attention_states(q, pages, batch, 0.125)[0][2:]) <= 1e-5


def test_padded_work_is_no_work(device: str) -> None:
    batch, pages = paged([(5, 4)], 1, 64, 16, FP32, device)
    q = random((4, 2, 64), FP32, device)
    out = poison(q.shape, FP32, device)
    work = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    paged_prefill(q, pages, batch, work, Scores(0.125), out, None, SMALL)
    assert out.isnan().all()


def test_work_list_is_longest_first_and_complete() -> None:
    batch = attention_batch([(100, 1, [0] * 10), (0, 20, [0] * 10), (0, 5, [0]), (50, 9, [0] * 10)], 16)
    tiles = work_list(batch, 0, 8).tolist()
    assert tiles == [[0, 0], [3, 8], [3, 0], [1, 16], [1, 8], [1, 0], [2, 0]]
    assert work_list(batch, 1, 8).tolist() == tiles[1:]
    assert work_list(batch, 0, 8, window=10).tolist()[0] == [3, 0]
    assert work_list(batch, 0, 8).dtype == np.int32


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("cuts", [(0, 70), (0, 33, 70), (0, 1, 40, 69, 70)])
def test_bits_do_not_depend_on_chunks_or_neighbours(cuts: Sequence[int], window: int | None, dtype: torch.dtype, device: str) -> None:
    """The same tokens whole, in chunks beside other rows, and one by one as decode rows would come."""
    batch, pages = paged([(0, 70)], 1, 64, 16, dtype, device)
    table = batch.block_tables[0].tolist()
    q = random((70, 3, 64), dtype, device)
    scores = Scores(0.125, window)
    whole, whole_lse = prefill(q, pages, batch, scores)
    for begin, end in pairwise(cuts):
        beside = attention_batch([(0, 1, table), (begin, end - begin, table), (0, 5, table)], 16, device)
        stranger = random((6, 3, 64), dtype, device)
        out, lse = prefill(torch.cat((stranger[:1], q[begin:end], stranger[1:])), pages, beside, scores)
        assert torch.equal(out[1:-5], whole[begin:end])
        assert torch.equal(lse[1:-5], whole_lse[begin:end])
