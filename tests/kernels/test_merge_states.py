"""Merging attention states, and the decode of sequences with a shared prefix that is made of it."""

from __future__ import annotations

import math

import pytest
import torch
from interpreter import OUTSIDE, error, paged, poison, random, tolerance

from quire.kernels import reference
from quire.kernels.attention_tile import Scores
from quire.kernels.cascade import cascade_decode
from quire.kernels.layout import AttentionBatch
from quire.kernels.merge_states import merge_states

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 64), (5, 3, 80), (3, 7, 256), (40, 1, 128)])
def test_merge(rows: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    a, b = random((rows, heads, dim), dtype, device), random((rows, heads, dim), dtype, device)
    lse_a, lse_b = random((rows, heads), FP32, device, 5.0), random((rows, heads), FP32, device, 5.0)
    out, lse = poison(a.shape, dtype, device), poison(lse_a.shape, FP32, device)
    merge_states(a, lse_a, b, lse_b, out, lse)
    expected, expected_lse = reference.merge_states(a.double(), lse_a.double(), b.double(), lse_b.double())
    assert error(out, expected) <= tolerance(dtype)
    assert error(lse, expected_lse) <= 1e-5


def test_merge_with_sides_that_saw_nothing(device: str) -> None:
    a, b = random((4, 1, 64), FP32, device), random((4, 1, 64), FP32, device)
    none = -math.inf
    a[0], b[1] = math.nan, math.nan
    lse_a = torch.tensor([[none], [1.0], [none], [90.0]], device=device)
    lse_b = torch.tensor([[2.0], [none], [none], [-90.0]], device=device)
    out, lse = poison(a.shape, FP32, device), poison(lse_a.shape, FP32, device)
    merge_states(a, lse_a, b, lse_b, out, lse)
    expected, expected_lse = reference.merge_states(a, lse_a, b, lse_b)
    assert torch.equal(out.cpu(), torch.stack((b[0], a[1], torch.zeros_like(a[2]), a[3])).cpu())
    assert torch.equal(out, expected)
    assert torch.allclose(lse, expected_lse)
    assert lse[:, 0].tolist() == [2.0, 1.0, none, 90.0]


def test_merge_in_place_and_into_a_narrower_type(device: str) -> None:
    a, b = random((3, 2, 64), FP32, device), random((3, 2, 64), FP32, device)
    lse_a, lse_b = random((3, 2), FP32, device), random((3, 2), FP32, device)
    expected = reference.merge_states(a.double(), lse_a.double(), b.double(), lse_b.double())[0]
    narrow = poison(a.shape, BF16, device)
    merge_states(a, lse_a, b, lse_b, narrow)
    assert error(narrow, expected) <= tolerance(BF16)
    merge_states(a, lse_a, b, lse_b, b)
    assert error(b, expected) <= 1e-5


def test_merge_refuses_gaps(device: str) -> None:
    a, lse = random((3, 4, 64), FP32, device), random((3, 2), FP32, device)
    with pytest.raises(ValueError, match="contiguous"):
        merge_states(a[:, ::2], lse, a[:, ::2], lse, torch.empty(3, 2, 64, device=device))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "soft_cap"),
    [(4, 1, FP32, None), (6, 2, FP32, 2.0), (6, 2, FP16, None), (4, 1, BF16, 2.0), (6, 2, BF16, None)],
)
def test_cascade(heads: int, kv_heads: int, dtype: torch.dtype, soft_cap: float | None, device: str) -> None:
    """Rows that end with the prefix, one token and several pages after it; garbage between and after."""
    page_size, prefix_pages = 16, 3
    lens = [48, 49, 64, 90]
    batch, pages = paged([(47, 1), *((n - 1, 1) for n in lens)], kv_heads, 64, page_size, dtype, device)
    tables = batch.block_tables[1:].clone()
    tables[:, :prefix_pages] = batch.block_tables[0, :prefix_pages]
    shared = AttentionBatch(
        batch.row_starts[: len(lens) + 1], batch.kv_lens[1:], tables, batch.slots[1:], len(lens), (1,) * len(lens), tuple(lens)
    )
    tables[0, prefix_pages:] = OUTSIDE
    q = random((len(lens), heads, 64), dtype, device)
    out = poison(q.shape, dtype, device)
    cascade_decode(q, pages, tables, shared.kv_lens, prefix_pages, Scores(0.125, None, soft_cap), out)
    expected = reference.attention_states(q, pages, shared, 0.125, None, soft_cap)[0]
    assert error(out, expected) <= tolerance(dtype)
