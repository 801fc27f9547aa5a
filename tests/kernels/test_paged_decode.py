"""Paged decode and its prefix variant against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from interpreter import FP8, Rows, error, paged, plain, poison, random, tolerance
from torch import Tensor

from quire.kernels import reference
from quire.kernels.attention_tile import Scores
from quire.kernels.launch import described
from quire.kernels.layout import AttentionBatch
from quire.kernels.paged_decode import DecodeLaunch, num_splits, paged_decode, prefix_decode

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE_SPLIT = DecodeLaunch(block_n=32, num_warps=4, num_stages=1, max_splits=1)
SPLITS = DecodeLaunch(block_n=32, num_warps=4, num_stages=1, min_split_keys=32, max_splits=4)
EDGES = (0, 1), (15, 1), (16, 1), (31, 1), (-1, 1), (77, 1)  # of keys: 1, a page, a page and one, two pages, none, many


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def decode(
    q: Tensor, pages: Tensor, batch: AttentionBatch, scores: Scores, launch: DecodeLaunch | None, prefix: int | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = poison(q.shape, q.dtype, q.device.type), poison(q.shape[:2], FP32, q.device.type)
    if prefix is None:
        paged_decode(q, pages, batch.block_tables, batch.kv_lens, scores, out, lse, launch)
    else:
        prefix_decode(q, pages, batch.block_tables[0, : prefix // pages.shape[3]], batch.kv_lens[:1], scores, out, lse, launch)
    return out, lse


def check(
    rows: Rows, heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, device: str,
    launch: DecodeLaunch = SPLITS, stored: torch.dtype | None = None, window: int | None = None, soft_cap: float | None = None,
) -> None:  # fmt: skip
    batch, pages = paged(rows, kv_heads, dim, page_size, stored or dtype, device, window)
    q = random((len(rows), heads, dim), dtype, device)
    scores = Scores(dim**-0.5, window, soft_cap)
    out, lse = decode(q, pages, batch, scores, launch)
    expected, expected_lse = reference.attention_states(q, pages, batch, *_parts(scores))
    assert error(out, expected) <= tolerance(dtype)
    seen = torch.isfinite(expected_lse)
    assert error(lse[seen], expected_lse[seen]) <= tolerance(dtype)
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert not out[~seen].any()


def _parts(scores: Scores) -> tuple[float, int | None, float | None]:
    return scores.scale, scores.sliding_window, scores.soft_cap


@pytest.mark.parametrize("launch", [ONE_SPLIT, SPLITS], ids=["one split", "splits"])
def test_lengths_around_pages(launch: DecodeLaunch, device: str) -> None:
    check(EDGES, 4, 1, 64, 16, FP32, device, launch)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_lengths_around_every_size_of_page(page_size: int, dtype: torch.dtype, device: str) -> None:
    lengths = 0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 7
    check([(length - 1, 1) for length in lengths], 2, 1, 64, page_size, dtype, device)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 17])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_groups(group: int, dtype: torch.dtype, device: str) -> None:
    check([(40, 1), (99, 1)], 2 * group, 2, 64, 32, dtype, device, ONE_SPLIT)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_head_dimensions(dim: int, dtype: torch.dtype, device: str) -> None:
    check([(70, 1), (2, 1)], 3, 1, dim, 32, dtype, device)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("dim", [80, 128])
def test_fp8_pages(dtype: torch.dtype, dim: int, device: str) -> None:
    # Queries meet fp8 keys in float16, so that is how exact float32 queries are.
    batch, pages = paged([(70, 1), (2, 1)], 1, dim, 32, FP8, device)
    q = random((2, 3, dim), dtype, device)
    out, lse = decode(q, pages, batch, Scores(dim**-0.5), SPLITS)
    expected, expected_lse = reference.attention_states(q, pages, batch, dim**-0.5)
    allowed = max(tolerance(dtype), tolerance(FP16))
    assert error(out, expected) <= allowed
    assert error(lse, expected_lse) <= allowed


def test_fp8_pages_as_bits(device: str) -> None:
    """What chips without fp8 are given: every value of the type, subnormal ones too, comes out as it is."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values[(values & 0x7F) == 0x7F] = 0  # NaN
    bits = torch.zeros(16, 1, 2, 16, 16, dtype=torch.uint8)
    bits[0, 0, 1] = values.view(16, 16)
    q = torch.zeros(16, 1, 16, dtype=FP16, device=device)
    table = torch.zeros(16, 1, dtype=torch.int32, device=device)
    # Row n sees n + 1 keys, all with the same weight: out[n] * (n + 1) is the running sum of values.
    lens = torch.arange(1, 17, dtype=torch.int32, device=device)
    out = torch.empty(16, 1, 16, dtype=FP32, device=device)
    paged_decode(q, bits.to(device), table, lens, Scores(1.0), out, None, DecodeLaunch(16, 4, 1))
    sums = bits[0, 0, 1].view(FP8).double().cumsum(0)
    assert torch.allclose(out[:, 0].double().cpu() * lens[:, None].double().cpu(), sums, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("window", [1, 16, 50, 1000])
def test_sliding_windows(window: int, device: str) -> None:
    check([(99, 1), (33, 1), (0, 1)], 2, 1, 64, 16, FP32, device, window=window)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_caps(soft_cap: float, device: str) -> None:
    check([(99, 1), (33, 1)], 2, 1, 64, 16, FP32, device, soft_cap=soft_cap)
    check([(99, 1), (33, 1)], 2, 1, 64, 16, BF16, device, soft_cap=soft_cap, window=40)


def test_more_splits_than_are_combined_at_once(device: str) -> None:
    check([(16 * 40 - 5, 1)], 2, 1, 64, 16, FP32, device, DecodeLaunch(16, 4, 1, min_split_keys=16, max_splits=40))


def test_splits_do_not_depend_on_lengths() -> None:
    launch, h100 = DecodeLaunch(64, 4, 3, min_split_keys=256, max_splits=32), described(90)
    assert num_splits(1, 8, 8192, launch, h100) == 32
    assert num_splits(16, 8, 8192, launch, h100) == 3
    assert num_splits(256, 8, 8192, launch, h100) == 1
    assert num_splits(1, 8, 512, launch, h100) == 2


def test_large_scores_do_not_overflow(device: str) -> None:
    batch, pages = paged([(60, 1)], 1, 64, 16, FP32, device)
    q = random((1, 2, 64), FP32, device, scale=300.0)
    out, _ = decode(q, pages, batch, Scores(1.0), SPLITS)
    assert error(out, reference.attention_states(q, pages, batch, 1.0)[0]) <= 1e-4  # scores of thousands: their own rounding shows


@pytest.mark.parametrize(("heads", "kv_heads", "rows", "dtype"), [(4, 1, 5, FP32), (7, 1, 11, BF16), (3, 3, 4, FP16), (3, 3, 4, BF16)])
def test_prefix(heads: int, kv_heads: int, rows: int, dtype: torch.dtype, device: str) -> None:
    batch, pages = paged([(95, 1)], kv_heads, 64, 16, dtype, device)
    q = random((rows, heads, 64), dtype, device)
    out, lse = decode(q, pages, batch, Scores(0.125), SPLITS, prefix=96)
    for i in range(rows):
        expected, expected_lse = reference.attention_states(q[i : i + 1], pages, batch, 0.125)
        assert error(out[i : i + 1], expected) <= tolerance(dtype)
        assert error(lse[i : i + 1], expected_lse) <= tolerance(dtype)


def test_prefix_refuses_a_window(device: str) -> None:
    batch, pages = paged([(31, 1)], 1, 64, 16, FP32, device)
    with pytest.raises(ValueError, match="window"):
        decode(random((2, 1, 64), FP32, device), pages, batch, Scores(1.0, sliding_window=8), None, prefix=32)


def test_queries_and_outputs_with_gaps(device: str) -> None:
    batch, pages = paged([(40, 1), (3, 1)], 2, 64, 16, FP32, device)
    wide = random((2, 10, 64), FP32, device)
    out = poison((2, 10, 64), FP32, device)
    paged_decode(wide[:, 2:6], pages, batch.block_tables, batch.kv_lens, Scores(0.125), out[:, 4:8], None, SPLITS)
    assert error(out[:, 4:8], reference.attention_states(wide[:, 2:6], pages, batch, 0.125)[0]) <= 1e-5
    assert out[:, :4].isnan().all()
    assert out[:, 8:].isnan().all()


def test_refuses_what_it_cannot_read(device: str) -> None:
    batch, pages = paged([(3, 1)], 2, 64, 16, FP32, device)
    q = random((1, 4, 64), FP32, device)
    for bad_q, bad_pages in ((q[:, :3], pages), (q[..., :32], pages), (q, pages[:, :, :, :15]), (q[..., ::2], pages[..., ::2])):
        with pytest.raises(ValueError, match=r"page|dimension"):
            decode(bad_q, bad_pages, batch, Scores(1.0), ONE_SPLIT)


def test_bfloat16_needs_the_mend() -> None:
    """Without it the interpreter is silently wrong. If this fails, Triton has repaired it: drop the mend from the rig."""
    batch, pages = paged([(40, 1)], 1, 64, 16, BF16, "cpu")
    q = random((1, 2, 64), BF16, "cpu")
    expected = reference.attention_states(q, pages, batch, 0.125)[0]
    with plain():
        assert error(decode(q, pages, batch, Scores(0.125), ONE_SPLIT)[0], expected) > 10 * tolerance(BF16)
    assert error(decode(q, pages, batch, Scores(0.125), ONE_SPLIT)[0], expected) <= tolerance(BF16)


def test_the_oracle_agrees_with_the_reference() -> None:
    batch, pages = paged([(40, 1), (7, 1), (0, 20), (50, 3)], 2, 64, 16, FP32, "cpu")
    q = random((25, 6, 64), FP32, "cpu")
    tables = batch.block_tables.where(batch.block_tables < len(pages), 0)
    clean = AttentionBatch(batch.row_starts, batch.kv_lens, tables, batch.slots, batch.num_decode, batch.row_lens, batch.kv_lens_list)
    got = reference.paged_attention(q.double(), pages.double(), clean, 0.125, 30)
    assert error(got, reference.attention_states(q, pages, batch, 0.125, 30)[0]) <= 1e-12
